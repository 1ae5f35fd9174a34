"""Labels at the second cut, on MiniLM and Rotten Tomatoes: the noise, what an attack finds, what stays clear.

Everything goes through the device's own code and a real order. Representations are the backbone's, of the
batches of a run at its start; each sample is shown k times, a little moved, as a server may. The attack knows
head and representations, so all that it does not know are the labels: Phi(sqrt(k) / z) bounds what it finds,
and two mutants (no clip; noise over the batch) must pass the bound, or the attack would prove nothing. Clear
embeddings give every token away, whatever the labels' epsilon.
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
from pytest import MonkeyPatch
from scipy import stats

from benchmarks.record import Figure, write_result
from fedlam_app.base.split_payload import position
from fedlam_app.base.wire import FORMATS
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.tasks.text_classification import TextClassification
from tests import broken_privacy as broken
from tests.private_devices import Alone, clipped, guessed

SEED = 3
CLIP = 0.2  # below every gradient of a head that has learnt nothing yet: the bound is then tight
DEVICES, BATCHES = 4, 6  # on which the attack runs
BASE: dict[str, Scalar] = {
    "job": "train", "task": "text-classification", "strategy": "fedsgd-lora", "seed": SEED,
    "text.source": "rotten-tomatoes", "text.train": 512, "text.test": 16, "text.max-tokens": 48,
    "model.blocks": 3, "train.devices": DEVICES, "train.batch-rows": 16, "train.rounds": 8,
    "train.local-steps": 1, "split.heads": "frozen", "privacy.mechanism": "jacobian",
    "wire.embedding": "fp32", "wire.representation": "fp32", "wire.jacobian": "fp32",
    "federation.supernodes": 1, "federation.server-threads": 1,
}  # fmt: skip
MUTANTS = {"no clip": broken.unclipped, "noise over the batch": broken.over_the_batch}
Rows = NDArray[Any]


class Shown:
    """Devices at a noise multiplier, and what the server's backbone makes of their batches."""

    def __init__(self, folder: Path, z: float, clip: float = CLIP) -> None:
        keys: dict[str, Scalar] = {"privacy.noise-multiplier": z, "privacy.clip": clip}
        keys |= {"privacy.target-epsilon": float("inf"), "results": str(folder / f"{z}-{clip}")}
        self.alone, self.z, self.clip = Alone(BASE | keys), z, clip

    def rows(self, device: int, step: int) -> Rows:
        """Return the representations (B, D) of a batch."""
        task, model = self.alone.task, self.alone.device.model
        batch = task.batch(device, *position(step, self.alone.device.local_steps))
        with torch.no_grad():
            tokens, _ = model.embedding(task.inputs(model, batch))
            return np.asarray(model.backbone(tokens).numpy())

    def noise(self, device: int, step: int, rows: Rows) -> Rows:
        """Return what was added (B, D), over C."""
        sent, _ = self.alone.answer(device, step, rows)
        own = self.alone.gradients(rows, self.alone.targets(device, step))
        return np.asarray((sent - clipped(own, self.clip)) / self.clip)

    def recovered(self, known: dict[tuple[int, int], Rows], k: int) -> float:
        """Return the share of labels that are found from k releases of each sample."""
        right: list[bool] = []
        for (device, step), rows in known.items():
            shown = [rows + np.float32(1e-3) * j for j in range(k)]
            sent = np.stack([self.alone.answer(device, step, each)[0] for each in shown])
            each_label = [
                np.stack([clipped(self.alone.gradients(r, np.full(len(r), y)), self.clip) for r in shown])
                for y in (0, 1)
            ]
            right += (guessed(sent, *each_label) == self.alone.targets(device, step)).tolist()
        return float(np.mean(right))


def noise_figures(folder: Path) -> list[Figure]:
    """Measure the noise of 1e5 numbers and more, and its relations."""
    shown = Shown(folder, z=0.8)
    rows = shown.rows(0, 1)
    found = [shown.noise(0, 1, rows + np.float32(1e-3) * j) for j in range(1 + 100_000 // rows.size)]
    noise = np.concatenate([part.ravel() for part in found]) / 0.8
    pairs = [
        (found[0], found[1]),
        (found[0], shown.noise(1, 1, rows)),
        (found[0], shown.noise(0, 2, rows)),
        (found[0], shown.noise(0, 1, rows + np.float32(1e-6))),
    ]
    worst = max(abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) for a, b in pairs)
    again = float(np.abs(shown.noise(0, 1, rows) - found[0]).max())
    apart = worst / (4.0 / rows.size**0.5)
    pvalue = float(stats.kstest(noise, "norm").pvalue)
    return [
        Figure("privacy", "cut: std of the noise over z C, from 1", abs(noise.std() - 1.0), "", "<= 0.01"),
        Figure("privacy", "cut: Kolmogorov-Smirnov of the noise", pvalue, "p", "> 0.01"),
        Figure(
            "privacy", "cut: noise of other steps, devices, contents: |corr| sqrt(n) / 4", apart, "", "< 1"
        ),
        Figure("privacy", "cut: difference of a release and its repetition", again, "C", "== 0"),
    ]


def label_figures(folder: Path) -> list[Figure]:
    """Attack the labels, in the code as it is and in two mutants."""
    first = Shown(folder, z=1.0)
    known = {(k, t): first.rows(k, t) for k in range(DEVICES) for t in range(1, BATCHES + 1)}
    figures = []
    for z, k in ((1.0, 1), (1.0, 4), (2.0, 1), (2.0, 4)):
        found, bound = Shown(folder, z).recovered(known, k), float(stats.norm.cdf(k**0.5 / z))
        name = f"cut: labels found at z = {z:g} in {k} releases"
        figures += [
            Figure("privacy", name, 100.0 * found, "%"),
            Figure("privacy", f"{name}, less the bound {bound:.3f}", found - bound, "share", "<= 0.03"),
        ]
    for name, mutant in MUTANTS.items():
        with MonkeyPatch.context() as patch:
            mutant(patch)
            found = Shown(folder, 2.0).recovered(known, 1)
        past = found - float(stats.norm.cdf(0.5))
        figures.append(Figure("privacy", f"cut: mutant '{name}' past the bound", past, "share", "> 0.03"))
    return figures


def token_figures(folder: Path) -> list[Figure]:
    """Read the tokens from the embeddings of a round, and the ledgers of a run in each mode."""
    figures = []
    for mechanism in ("jacobian", "logit", "randomised-response"):
        heads = "frozen" if mechanism == "jacobian" else "averaged"
        flat = BASE | {
            "privacy.mechanism": mechanism,
            "split.heads": heads,
            "results": str(folder / mechanism),
        }
        flat |= {"text.train": 128, "train.rounds": 4}  # two epochs
        config = parse(flat)
        task = TextClassification(config)
        federation = federate(config, "{}", task, task.build_model())
        grid = InProcessGrid(app, 1, flat)
        for number in range(1, config.train.rounds + 1):
            federation.train_round(grid, number)
        spent = [Ledger.from_json(book).epsilon for book in federation.ledgers.values()]
        over, left = max(spent) - config.privacy.target_epsilon, config.privacy.target_epsilon - min(spent)
        figures += [
            Figure("privacy", f"cut: {mechanism}, largest epsilon over its target", over, "epsilon", "<= 0"),
            Figure(
                "privacy", f"cut: {mechanism}, target over the smallest epsilon", left, "epsilon", "<= 0.01"
            ),
        ]
    for form in ("fp32", "int8", "int4"):
        share = tokens_found(TextClassification(parse(BASE)), form)
        bound = "== 100" if form == "fp32" else ""
        figures.append(
            Figure("privacy", f"cut: tokens read from clear embeddings in {form}", 100.0 * share, "%", bound)
        )
    return figures


def tokens_found(task: TextClassification, form: str) -> float:
    """Return the share of tokens whose nearest word vector is their own, as coded on the wire."""
    model, batch = task.build_model(), task.batch(0, 1, 0)
    table = model.embedding.table.weight.detach().numpy()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        tokens, _ = model.embedding(task.inputs(model, batch))
    values = tokens.values.numpy()
    sent = FORMATS[form].decode(FORMATS[form].encode(values), *values.shape)
    near = (2.0 * sent @ table.T - (table**2).sum(1)).argmax(1)
    return float((near == batch.texts.ids.numpy()).mean())


def main() -> int:
    """Measure, write ``results/privacy_cut.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["FEDLAM_DEVICES"] = str(Path(name) / "devices")
        folder = Path(name)
        figures = [*noise_figures(folder), *label_figures(folder), *token_figures(folder)]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    samples = DEVICES * BATCHES * int(str(BASE["train.batch-rows"]))
    write_result("privacy_cut", figures, seed=SEED, extra={"samples attacked": samples, "clip": CLIP})
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
