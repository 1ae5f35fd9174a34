"""What can be read of a text: from clear embeddings everything, from what ``release-once`` lets out nothing.

Rotten Tomatoes and MiniLM; the releases are made by the devices' own code at the shipped settings (d = 32,
epsilon = 8, one fifth of it for labels, public directions of IMDb), with three and with five of the six
blocks on the device; fewer are refused. The attacks have no language model and know how many words a text
has:

nearest   the words whose own clean vectors lie nearest to the released one
linear    ridge regression from noised public texts of the same kind (IMDb) to bags of words

Both guess words that are in any text (a list of the most frequent ones finds three in ten without seeing
anything), so what counts is by how much more of a text its own release finds than that of another text.

Membership: the adversary knows all of a batch but one text and projects the gradient of the first layer's
LoRA A off their span. What is left lies in the span of the missing text's tokens, whatever noise the
Jacobians have: arXiv:2505.00321's noise on gradients does not hide who took part. Under ``release-once`` the
span is that of a noised vector; a test against the clean one can only do what the vector's own mu = 2 / z
(one text replaced by another) allows: AUC <= Phi(mu / sqrt(2)).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from benchmarks.record import Figure, write_result
from clients.adapter import Worker
from clients.released import Releases
from fedlam_app.base.keys import rng
from fedlam_app.base.vectors import pack
from fedlam_app.config import Scalar, parse
from fedlam_app.models.batched import BatchedBackbone
from fedlam_app.models.factors import layout_of
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.models.split import Tokens
from fedlam_app.models.text import Texts
from fedlam_app.privacy.clip import clip_samples
from fedlam_app.privacy.inversion import best_guesses, found_in_texts, nearest, recovered
from fedlam_app.privacy.membership import loss_threshold
from fedlam_app.privacy.projection import public_sample
from fedlam_app.tasks.text_classification import TextClassification

SEED = 3
DEVICES, TEXTS = 4, 512
BATCH, TRIALS = 8, 40  # of the membership attack
RIDGE = 10.0
BASE: dict[str, Scalar] = {
    "job": "train", "task": "text-classification", "strategy": "fedsgd-lora", "seed": SEED,
    "text.source": "rotten-tomatoes", "text.train": TEXTS, "text.test": 16, "text.max-tokens": 48,
    "train.devices": DEVICES, "privacy.mechanism": "release-once",
}  # fmt: skip
Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def main() -> int:
    """Attack, write ``results/privacy_inputs.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        for blocks in (3, 5):
            worker = worker_of(Path(folder), {"split.device-blocks": blocks})
            figures += recovery(worker, blocks)
        figures += clear(worker)
        for epsilon in (8.0, 1.0):
            figures += membership_released(Path(folder), epsilon)
        figures += membership_clear(Path(folder))
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4f} {figure.unit} {figure.bound}")
    write_result("privacy_inputs", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


def worker_of(folder: Path, keys: dict[str, Scalar]) -> Worker:
    """Return the devices of a run."""
    config = parse({**BASE, **keys, "results": str(folder / str(sorted(keys.items())))})
    return Worker(config, TextClassification(config))


# --- tokens ---------------------------------------------------------------------------------------------


def recovery(worker: Worker, blocks: int) -> list[Figure]:
    """Return what the two attacks on released vectors find."""
    task, front = worker.task, worker.model.embedding
    assert isinstance(task, TextClassification) and isinstance(front, PooledEmbedding)
    releases = Releases(worker)
    released = np.concatenate([releases.of(k).vectors for k in range(DEVICES)])
    places = np.concatenate([task.shards[k] for k in range(DEVICES)])
    words = [np.unique(task.encoded["train"][i][0][1:-1]).astype(np.int64) for i in places]  # no CLS, no SEP
    longest = max(map(len, words))
    guesses = best_guesses(released, one_word_vectors(worker), longest)
    scores = linear_scores(worker, released, releases.of(0).z)
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :longest]
    found = []
    for name, attack in (("nearest words", guesses), ("linear", ranked)):
        whole = found_in_texts(attack, words)
        beyond = whole - found_in_texts(np.roll(attack, 1, axis=0), words)
        found += [
            (f"{name} find, beyond another text's", beyond, "<= 0.01"),
            # With a block or more before it, a text's vector is not near those of its frequent words either.
            (
                f"{name} find, frequent words and all",
                whole,
                "<= 0.01" if blocks and attack is guesses else "",
            ),
        ]
    where = f"release-once, {blocks} blocks on the device"
    return [
        Figure("privacy", f"{where}: noise multiplier", releases.of(0).z, "sigma / C"),
        *(Figure("privacy", f"{where}: {name}", value, "of a text's words", at) for name, value, at in found),
    ]


def one_word_vectors(worker: Worker) -> Floats:
    """Return what every word of the vocabulary would release as a text of its own, without noise (V, d)."""
    task, front = worker.task, worker.model.embedding
    assert isinstance(task, TextClassification) and isinstance(front, PooledEmbedding)
    around = task.encoded["train"][0][0]
    found, vocabulary = [], len(front.embedding.table.weight)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        for start in range(0, vocabulary, 512):
            own = torch.arange(start, min(start + 512, vocabulary))
            ids = torch.stack(
                [torch.full_like(own, int(around[0])), own, torch.full_like(own, int(around[-1]))], 1
            )
            found.append(front.vectors(Texts(ids.flatten(), torch.full_like(own, 3), None)))
    return torch.cat(found).double().numpy()


def linear_scores(worker: Worker, released: Floats, z: float) -> Floats:
    """Return how much each word (V,) of the public texts' is expected in each text (B, V), by its release."""
    task, front, config = worker.task, worker.model.embedding, worker.config
    assert isinstance(task, TextClassification) and isinstance(front, PooledEmbedding)
    samples = task.encode(public_sample(config.text, "imdb"))
    with torch.no_grad():
        parts = [front.vectors(task.collate(samples[i : i + 50]).texts) for i in range(0, len(samples), 50)]
    vectors = torch.cat(parts).double().numpy()
    draw = rng(SEED, "attacker")
    seen = vectors + z * config.privacy.clip * draw.standard_normal(vectors.shape)
    bags = np.zeros((len(samples), len(front.embedding.table.weight)))  # type: ignore[union-attr,arg-type]
    for row, (ids, _) in zip(bags, samples, strict=True):
        row[np.asarray(ids[1:-1], np.int64)] = 1.0
    centre, mean = seen.mean(0), bags.mean(0)
    gram = (seen - centre).T @ (seen - centre) + RIDGE * np.eye(seen.shape[1])
    weights = np.linalg.solve(gram, (seen - centre).T @ (bags - mean))  # (d, V)
    return np.asarray(mean + (released - centre) @ weights)


def clear(worker: Worker) -> list[Figure]:
    """Return what the nearest word finds of clear embeddings."""
    task, front = worker.task, worker.model.embedding
    assert isinstance(task, TextClassification) and isinstance(front, PooledEmbedding)
    table = np.asarray(front.embedding.table.weight.detach().numpy())  # type: ignore[union-attr,operator]
    ids = np.concatenate([ids for ids, _ in task.encoded["train"][:100]]).astype(np.int64)
    share = recovered(nearest(table[ids], table), ids)
    return [Figure("privacy", "clear embeddings: nearest words find", share, "of the tokens", ">= 1.0")]


# --- membership -----------------------------------------------------------------------------------------


class Span:
    """The gradient of the first layer's LoRA A on batches, and what adversaries make of it."""

    def __init__(self, worker: Worker) -> None:
        backbone: Any = worker.model.backbone
        self.worker, self.core = worker, backbone.model.base_model.model
        self.batched = BatchedBackbone(backbone)
        self.layout = layout_of(backbone, 2.0)
        start = pack(p for p in backbone.parameters() if p.requires_grad).copy()
        for _, b in self.layout.factors(start):  # at B = 0, A has no gradient
            b[:] = rng(SEED, "span").normal(0.0, 0.02, b.shape)
        self.start = start
        self.first = next(
            i for i, p in enumerate(self.layout.pairs) if ".layer.0.attention.self.query" in p.name
        )

    def gradient(self, tokens: Tokens, labels: torch.Tensor, z: float, trial: int) -> Floats:
        """Return dL/dA (r, D) of a batch, its Jacobians clipped to 1 and noised."""
        owners = np.zeros(len(tokens.lengths), np.int64)
        shown = self.batched.forward(self.start[None], [0], tokens, owners).requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(self.worker.model.head(shown, None), labels, reduction="sum")
        (own,) = torch.autograd.grad(loss, shown)
        noise = torch.from_numpy(rng(SEED, "jacobian noise", trial).standard_normal(own.shape))
        noised = clip_samples(own, [1] * len(own), 1.0) + z * noise.to(own)
        gradients, _ = self.batched.backward(noised)
        return np.asarray(self.layout.factors(gradients[0].astype(np.float64))[self.first][0])

    def inputs(self, tokens: Tokens) -> Floats:
        """Return what the first layer takes of packed tokens (N, D)."""
        places = torch.cat([torch.arange(n) for n in tokens.lengths.tolist()])
        at = self.core.embeddings
        with torch.no_grad():
            x = tokens.values + at.token_type_embeddings.weight[0] + at.position_embeddings.weight[places]
            return np.asarray(at.LayerNorm(x).double().numpy())

    def told(self, gradient: Floats, known: Floats, candidate: Floats) -> float:
        """Return which share of the gradient, off the span of ``known`` inputs, lies in the candidate's."""
        basis = _orthonormal(known)
        rest = gradient - gradient @ basis.T @ basis
        own = _orthonormal(candidate - candidate @ basis.T @ basis)
        return float(np.linalg.norm(rest @ own.T)) / max(float(np.linalg.norm(rest)), 1e-30)


def _orthonormal(rows: Floats) -> Floats:
    _, strengths, directions = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(directions[strengths > 1e-6 * strengths[0]])


def auc(span: Span, batch: Any, z: float) -> float:
    """Return the AUC of ``TRIALS`` batches with the candidate, and as many with another text in its place.

    ``batch(i)`` gives text i as it crosses and as the adversary knows it (tokens each), and its label.
    """
    told: dict[bool, list[float]] = {True: [], False: []}
    for trial in range(TRIALS):
        chosen = rng(SEED, "trial", trial).choice(TEXTS // DEVICES, BATCH + 1, replace=False)
        for member in (True, False):
            taking = [*chosen[: BATCH - 1], chosen[BATCH - 1 if member else BATCH]]
            crossed = [batch(int(i)) for i in taking]
            whole = Tokens(
                torch.cat([one.values for one, _, _ in crossed]),
                torch.cat([one.lengths for one, _, _ in crossed]),
            )
            gradient = span.gradient(whole, torch.tensor([y for *_, y in crossed]), z, trial)
            known = np.concatenate([span.inputs(one) for one, _, _ in crossed[:-1]])
            told[member].append(span.told(gradient, known, span.inputs(batch(int(chosen[BATCH - 1]))[1])))
    return loss_threshold(-np.array(told[True]), -np.array(told[False])).auc


def membership_clear(folder: Path) -> list[Figure]:
    """Return the AUC with clear embeddings, at growing noise on the Jacobians."""
    worker = worker_of(folder, {"model.blocks": 3, "privacy.mechanism": "none", "model.precision": "float64"})
    task, span = worker.task, Span(worker)

    def batch(i: int) -> tuple[Tokens, Tokens, int]:
        own = task.of(0, np.array([i]))
        with torch.no_grad():
            tokens, _ = worker.model.embedding(own.texts)
        return tokens, tokens, int(own.targets[0])

    return [
        Figure(
            "privacy",
            f"clear embeddings, Jacobians noised at z = {z:g}: membership by the span of LoRA A",
            auc(span, batch, z),
            "AUC",
            ">= 0.99",
        )
        for z in (0.0, 1.0, 10.0)
    ]


def membership_released(folder: Path, epsilon: float) -> list[Figure]:
    """Return the AUC under ``release-once``; the others' releases and the clean candidate are known."""
    keys: dict[str, Scalar] = {
        "model.blocks": 3,
        "split.device-blocks": 1,
        "privacy.target-epsilon": epsilon,
        "model.precision": "float64",
    }
    worker = worker_of(folder, keys)
    task, span, front = worker.task, Span(worker), worker.model.embedding
    assert isinstance(front, PooledEmbedding)
    made = Releases(worker).of(0)

    def batch(i: int) -> tuple[Tokens, Tokens, int]:
        own = task.of(0, np.array([i]))
        with torch.no_grad():
            clean, _ = front(own.texts)
            sent = front.lift(torch.from_numpy(made.vectors[[i]]).to(clean.values))
        return Tokens(sent, clean.lengths), clean, int(own.targets[0])

    most = float(stats.norm.cdf(2.0 / made.z / np.sqrt(2.0)))
    name = f"release-once, epsilon = {epsilon:g}: membership by the span of LoRA A"
    return [
        Figure("privacy", name, auc(span, batch, 0.0), "AUC", f"<= {min(most, 0.7):.3f}"),
        Figure("privacy", f"release-once, epsilon = {epsilon:g}: the most any test can do", most, "AUC"),
    ]


if __name__ == "__main__":
    sys.exit(main())
