"""Attacks on real models and texts: what can be read of tokens and labels from what leaves a device.

Where a mechanism bounds what any attack can find, the attack is held against that bound; more would
contradict the claim. Where nothing is claimed (clear embeddings, gradients without DP), the attack shows why
not: every token is found. Methods: ``privacy/inversion.py``, ``privacy/attack_labels.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients.released import Releases
from clients.split import SplitDevice
from fedlam_app.base.keys import rng
from fedlam_app.base.plain import plain_fields
from fedlam_app.base.wire import FORMATS
from fedlam_app.config import RunConfig, Scalar, parse, to_flat
from fedlam_app.experiments.audited import exchange, worker_in
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.models.split import SplitModel
from fedlam_app.privacy import attack_labels, inversion
from fedlam_app.privacy.noise import Stream
from fedlam_app.tasks.text import TextBatch
from fedlam_app.tasks.text_classification import TextClassification

NOISES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)  # over the norm of the gradient that is noised
SPREADS = (1.0, 2.0, 4.0, 8.0, 16.0)  # noise over the root mean square of a coordinate of an embedding
SLACK = 0.03  # above the bound of label attacks, beside three standard errors
LEAST_TOKENS = 6  # in a text that is attacked through its gradient


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack's success."""

    what: str
    setting: str
    recovered: float  # share
    expected: float = math.nan  # what theory says, or what is found by whoever sees something else
    limit: float = math.nan  # above it a claim is contradicted; NaN where none is made
    samples: int = 0

    @property
    def contradicts(self) -> bool:
        """Whether the attack finds more than a claim allows."""
        return self.recovered > self.limit

    def record(self) -> dict[str, object]:
        """Return the attack as JSON; what does not apply is null."""
        return plain_fields(asdict(self)) | {"contradicts": self.contradicts}


# --- clear embeddings ----------------------------------------------------------------------------------


def embeddings(task: TextClassification, texts: int) -> Iterator[Attack]:
    """Attack word embeddings as they cross the cut: clear, coded, and under noise of several strengths."""
    model = task.build_model()
    batch = task.collate(task.encoded["train"][:texts])
    table = _table(model)
    with torch.no_grad():
        tokens = model.embedding(batch.texts)[0]
    values, true = tokens.values.numpy(), _true(batch)
    width, what = values.shape[1], "tokens from word embeddings"
    for name in ("fp32", "int8", "int4"):
        coded = FORMATS[name].decode(FORMATS[name].encode(values), len(values), width)
        found = inversion.recovered(inversion.nearest(coded, table), true)
        yield Attack(what=what, setting=f"clear, {name}", recovered=found, samples=len(true))
    spread = float(np.sqrt((values.astype(np.float64) ** 2).mean()))
    most = max(float(np.linalg.norm(part)) for part in np.split(values, _ends(batch)))  # of a text
    for factor in SPREADS:
        noise = rng(task.seed, "inversion", int(factor)).normal(0.0, factor * spread, values.shape)
        guessed = inversion.nearest((values + noise).astype(np.float32), table)
        setting = f"noise of {factor:g} coordinates (z = {factor * spread / most:.3g})"
        found = inversion.recovered(guessed, true)
        yield Attack(what=what, setting=setting, recovered=found, samples=len(true))


def _true(batch: TextBatch) -> NDArray[np.int64]:
    return batch.texts.ids.numpy()


def _ends(batch: TextBatch) -> NDArray[np.int64]:
    return batch.texts.lengths.numpy().cumsum()[:-1]


def _table(model: SplitModel) -> NDArray[np.float32]:
    table: Any = model.embedding
    while not hasattr(table, "table"):  # behind the device's own blocks
        table = table.embedding
    return np.asarray(table.table.weight.detach().float().numpy())


# --- one vector a text ---------------------------------------------------------------------------------


def vectors(config: RunConfig, folder: Path, texts: int, words: int = 4096) -> Attack:
    """Attack what ``release-once`` releases of a device's texts, by what it makes of every single word.

    The attacker knows the device's frozen front and so the clear vector of a text of any one word. Those
    tried are the words of the texts and others, ``words`` in all. Frequent words lie near to any text, so
    what counts is how much more of a text its own vector finds than another's. Those lie at most 2 C apart,
    so that no attack whatever finds more by 2 Phi(1 / z) - 1, their distance in total variation.
    """
    blocks = config.split.device_blocks or config.model.blocks - 1  # a late cut, where none is named
    keys: dict[str, Scalar] = {"split.device-blocks": blocks, "text.train": texts}
    task = _task(config, folder, {"privacy.mechanism": "release-once", **keys})
    worker = worker_in(folder, task.config, task)
    noised = Releases(worker).of(0)
    every = [task.encoded["train"][i][0].astype(np.int64) for i in task.shards[0]]
    marks = functools.reduce(np.intersect1d, every)  # what stands in every text, as CLS and SEP do
    own = [np.setdiff1d(ids, marks) for ids in every]
    present = np.unique(np.concatenate(own))
    others = np.setdiff1d(np.arange(len(_table(worker.model))), present)
    more = rng(task.seed, "inversion words").permutation(others)[: max(0, words - len(present))]
    asked = np.concatenate([present, more])
    front = worker.model.embedding
    assert isinstance(front, PooledEmbedding)
    around = np.isin(every[0][[0, -1]], marks)
    before, after = every[0][:1][around[:1]], every[0][-1:][around[1:]]
    single = [(np.array([*before, word, *after], np.int32), 0) for word in asked]
    with torch.no_grad():
        parts = [task.collate(single[start : start + 512]).texts for start in range(0, len(single), 512)]
        clear = torch.cat([front.vectors(part) for part in parts]).double().numpy()
    guesses = asked[inversion.best_guesses(noised.vectors, clear, max(map(len, own)))]
    found = inversion.found_in_texts(guesses, own)
    other, count = inversion.found_in_texts(np.roll(guesses, 1, axis=0), own), sum(map(len, own))
    return Attack(
        what="words from one released vector a text",
        setting=f"d = {noised.vectors.shape[1]}, z = {noised.z:.3g}; another's finds {100.0 * other:.1f} %",
        recovered=found,
        expected=other,
        limit=other + 2.0 * attack_labels.bound(noised.z) - 1.0 + 3.0 * math.sqrt(0.25 / count),
        samples=count,
    )


# --- labels --------------------------------------------------------------------------------------------


def labels(config: RunConfig, folder: Path, texts: int, noise: float, releases: int) -> Attack:
    """Attack the labels of real texts through noised Jacobians, each sample shown ``releases`` times.

    The server moves what it shows by a little, so that each is a release of its own.
    """
    keys: dict[str, Scalar] = {
        "privacy.mechanism": "jacobian",
        "privacy.noise-multiplier": noise,
        "privacy.target-epsilon": math.inf,
        "split.heads": "frozen",
        "split.device-blocks": 0,
        "text.train": texts,
        "train.batch-rows": texts,
        "wire.representation": "fp32",
        "wire.jacobian": "fp32",
    }
    task = _task(config, folder, keys)
    device = SplitDevice(worker_in(folder, task.config, task))
    batch = task.batch(0, 1, 0)
    with torch.no_grad():
        shown = device.model.backbone(device.model.embedding(batch.texts)[0])
        logits = device.model.head(shown, None)
        units = torch.eye(shown.shape[1])  # of which a linear head makes its weight
        weight = device.model.head(units, None) - device.model.head(0.0 * units[:1], None)
    sent = [exchange(device, 1, (shown + 1e-4 * j).numpy()) * len(shown) for j in range(releases)]
    candidates = attack_labels.jacobians(logits.numpy(), weight.T.numpy(), task.config.privacy.clip)
    found = attack_labels.likeliest(np.stack(sent), candidates) == batch.targets.numpy()
    most = attack_labels.bound(noise, releases)
    return Attack(
        what="labels from noised Jacobians",
        setting=f"z = {noise:.3g}, {releases} release{'s' if releases > 1 else ''}",
        recovered=float(found.mean()),
        expected=most,
        limit=most + SLACK + 3.0 * math.sqrt(most * (1.0 - most) / len(found))
        if logits.shape[1] == 2
        else math.nan,
        samples=len(found),
    )


def _task(config: RunConfig, folder: Path, keys: dict[str, Scalar]) -> TextClassification:
    """Return the task of one device in a run of its own."""
    own: dict[str, Scalar] = {"train.devices": 1, "train.rounds": 1, "train.local-steps": 1}
    own |= {"results": str(folder), "text.partition": "iid", "privacy.ledgers": "", "data.cache": str(folder)}
    return TextClassification(parse(to_flat(config) | own | keys))


# --- the gradient of LoRA's A --------------------------------------------------------------------------


def gradients(task: TextClassification, texts: int, noises: tuple[float, ...] = NOISES) -> Iterator[Attack]:
    """Attack the LoRA gradient of one text at a time, clipped to its own norm C, with noise z C added.

    B is drawn, as it is after a step: at B = 0 the gradient of A is zero.
    """
    model = task.build_model()
    trained = model.server_side()
    with torch.no_grad():
        for name, p in trained.items():
            if "lora_B" in name:
                p.copy_(torch.from_numpy(rng(task.seed, "span", name).normal(0.0, 0.02, p.shape)))
    first = _first(model, task)
    rows = sum(trained[name].shape[0] for name in first)
    chosen = [s for s in task.encoded["train"] if LEAST_TOKENS <= len(s[0]) <= rows][:texts]
    if not chosen:  # all are longer: of those, the beginnings
        chosen = [(ids[:rows], label) for ids, label in task.encoded["train"][:texts]]
    bases: dict[float, list[NDArray[np.floating]]] = {noise: [] for noise in noises}
    for number, sample in enumerate(chosen):
        whole = torch.autograd.grad(task.loss(model, task.collate([sample])), list(trained.values()))
        norm = float(torch.stack([g.norm() for g in whole]).norm())
        own = [g.numpy() for name, g in zip(trained, whole, strict=True) if name in first]
        for noise in noises:
            stream = Stream(b"attack", task.seed, number, str(noise))
            noised = [g + stream.normal(g.shape, noise * norm) for g in own]
            bases[noise].append(inversion.span(noised, len(sample[0])))
    found: dict[float, list[NDArray[np.bool_]]] = {noise: [] for noise in noises}
    for place in range(max(len(ids) for ids, _ in chosen)):
        words = _inputs(model, place)  # (V, D): the same for all texts
        long = [number for number, (ids, _) in enumerate(chosen) if len(ids) > place]
        true = np.array([chosen[number][0][place] for number in long])
        for noise in noises:
            guessed, _ = inversion.closest(words, [bases[noise][number] for number in long])
            found[noise].append(guessed == true)
    for noise in noises:
        right = np.concatenate(found[noise])
        yield Attack(
            what="tokens and places from a LoRA gradient",
            setting="no DP" if noise == 0.0 else f"z = {noise:g}",
            recovered=float(right.mean()),
            samples=len(right),
        )


class _Caught(Exception):
    """Ends a forward pass where its first adapted layer begins."""


def _adapted(model: SplitModel) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def _first(model: SplitModel, task: TextClassification) -> list[str]:
    """Return the names of A in the layers that see what the first adapted layer sees: queries, values, ..."""
    seen: dict[str, Tensor] = {}

    def see(name: str, given: tuple[Tensor, ...]) -> None:
        seen[name] = given[0]

    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: see(name, given))
        for name, module in _adapted(model).items()
    ]
    with torch.no_grad():
        model(task.inputs(model, task.collate(task.encoded["train"][:1])))
    for hook in hooks:
        hook.remove()
    one = next(iter(seen.values()))
    return [f"{name}.lora_A.default.weight" for name, found in seen.items() if found is one]


def _inputs(model: SplitModel, place: int) -> NDArray[np.float32]:
    """Return what the first adapted layer would see of every word at a place, (V, D)."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _Caught

    hook = next(iter(_adapted(model).values())).register_forward_pre_hook(catch)
    table = torch.from_numpy(_table(model))
    backbone: Any = model.backbone
    try:
        with torch.no_grad():
            backbone.model(inputs_embeds=table[:, None], position_ids=torch.tensor([[place]]))
    except _Caught:
        pass
    finally:
        hook.remove()
    return np.asarray(caught[0][:, 0].numpy())
