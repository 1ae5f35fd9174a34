"""Device work on whole models: train from an adapter vector, or score one.

The model is resident: one per process and experiment, built once, its trainable parameters overwritten by
the vector that arrives. Frozen weights never travel; what the strategy broadcasts to be kept (merges of
low-rank factors, Fed-SB's basis) is applied to the resident model once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from clients.compact import Compact
from clients.faults import tampered
from clients.ledgers import Ledgers
from clients.loop import local_steps
from clients.memory import Kept, Memory
from clients.private import Round, dp_sgd
from fedlam_app.base.keys import seed_of
from fedlam_app.base.layout import expand, factors_at
from fedlam_app.base.packing import Answer, distance
from fedlam_app.base.records import EvaluateOrder, MaskedOrder, TrainOrder, cut
from fedlam_app.base.vectors import Vector, pack, unpack
from fedlam_app.config import RunConfig
from fedlam_app.models.factors import layout_of, merge, probe
from fedlam_app.models.remembering import remembering
from fedlam_app.models.split import SplitModel
from fedlam_app.privacy.noise import digest
from fedlam_app.rules_privacy import AT_THE_CUT
from fedlam_app.tasks.base import Task

NOTHING: Vector = np.zeros(0, np.float32)  # what a polled device hands in


class Worker:
    """One experiment's task and resident model, serving any of its devices."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self.config = config
        self.task = task
        self.memory = Memory(config)
        self.ledgers = Ledgers(config, self.memory.folder)
        self._kept = Kept(self.memory)
        self._build()

    def _build(self) -> None:
        self.model: SplitModel = self.task.build_model().to(torch_device(self.config.device))
        if self.config.model.tuning == "none":
            self.model.backbone = remembering(self.model.backbone)
        self.named = self.model.trainable()
        self.parameters = list(self.named.values())
        self.layout = layout_of(self.model, self.config.model.alpha / self.config.model.rank)
        self.initial = pack(self.parameters)
        self.modules = np.concatenate(
            [np.full(p.numel(), not name.startswith("backbone.")) for name, p in self.named.items()]
        )  # (p,) whether it lives on the device in a split
        self._applied = 0  # entries that the resident model has taken in
        self._told = digest()  # of all of them
        self._basis: NDArray[np.float32] | None = None

    def train(self, vector: Vector, device: int, round: int) -> tuple[Vector, float]:
        """Return a device's vector (p,) after its local steps from ``vector``, and their mean loss."""
        unpack(vector, self.parameters)
        steps, everything = self.config.train.local_steps, np.ones(self.layout.size, bool)
        loss = self._steps(device, round, steps, "a+b+other", 0.0, 1.0, everything)
        return pack(self.parameters), loss

    def evaluate(self, vector: Vector, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Return the task's sums a user of one evaluation chunk, (users, columns)."""
        unpack(vector, self.parameters)
        self.model.eval()
        return self.task.evaluate(self.model, chunk, antennas)

    def obey(self, order: TrainOrder, place: int) -> Answer:
        """Return what the ``place``-th device of an order hands in."""
        device, steps = order.devices[place], order.steps[place]
        privacy = self.config.privacy
        if privacy.mechanism in AT_THE_CUT or (
            privacy.secure and steps and not isinstance(order, MaskedOrder)
        ):
            raise ValueError(f"what this order asks for '{privacy.mechanism}' does not make private")
        self.bring(order.first, order.kinds, order.entry_ranks, order.entries)
        if privacy.mechanism == "dp-sgd" and (order.probe or order.compact):
            raise ValueError("DP-SGD trains LoRA's own factors, and this order asks for other numbers")
        sent = cut(order.vectors, order.sizes)[order.rows[place]]
        work = self._compact_work if order.compact else self._work
        vector, start, loss = work(order, place, sent)
        if privacy.withholds:
            loss = 0.0 if steps else float("nan")  # of a poll that is no answer
        weight = self.task.examples(device) * order.factors[place]
        if steps == 0:
            return Answer(device, vector, weight, loss, 0.0)
        vector = tampered(self.config, device, vector)
        return Answer(device, vector, weight, loss, 0.0 if order.probe else distance(vector, start))

    def _work(self, order: TrainOrder, place: int, sent: Vector) -> tuple[Vector, Vector, float]:
        """Train or poll; return what comes back, where that began, and the loss."""
        device, round, steps = order.devices[place], order.round, order.steps[place]
        has, keeps = self.layout.within(order.ranks[place]), self.layout.part(order.keeps)
        start = np.where(has & keeps, self.initial, np.float32(0))
        start[has & ~keeps] = sent
        own = has & keeps
        if own.any() and (known := order.known[place]):
            start[own] = self.memory.load(device, known)["kept"]
        unpack(start, self.parameters)
        if steps == 0:
            return NOTHING, NOTHING, self._polled(device, round)
        if order.probe:
            vector, loss = probe(self.model, self.layout, lambda: self._probed(device, round)), 0.0
        else:
            noise = order.noise[place] if order.noise else 1.0
            loss = self._steps(device, round, steps, order.trains, order.proximal, noise, has)
            vector = pack(self.parameters)
        if own.any():
            self.memory.save(device, round, {"kept": vector[own]}, parent=order.known[place])
        returned = has & self.layout.part(order.returns)
        return vector[returned], start[returned], loss

    def score(self, order: EvaluateOrder, place: int) -> NDArray[np.float64]:
        """Return the task's sums of the ``place``-th pair of an order, (owners or 1, users, columns)."""
        self.bring(order.first, order.kinds, order.entry_ranks, order.entries)
        vector = order.vectors[order.rows[place]]
        if self._basis is not None and len(vector) != self.layout.size:
            vector = expand(vector, self._basis, self.layout)
        tables = []
        # Owners that differ in their heads alone share one pass of the backbone.
        shared = order.keeps == "modules" and not any(name.startswith("embedding.") for name in self.named)
        with _remembered(self.model.backbone) if shared else nullcontext(lambda: None) as again:
            for owned in self._owned(vector, order):
                tables.append(self.evaluate(owned, order.chunks[place], order.antennas))
                again()
        return np.stack(tables)

    def _owned(self, vector: Vector, order: EvaluateOrder) -> Iterator[Vector]:
        """Yield the vector as each owner has it, or as it is where there are no owners."""
        if not order.owners:
            yield vector
        own = self.modules if order.keeps == "modules" else self.layout.part(order.keeps)
        for device, version in zip(order.owners, order.known, strict=True):
            yield _replaced(vector, own, self.memory.load(device, version).get("kept"))

    def bring(
        self, first: int, kinds: Sequence[str], ranks: Sequence[int], joined: NDArray[np.float32]
    ) -> None:
        """Take in the entries up to the last that the order names, from it or from this site's files."""
        total = first + len(kinds)
        if total < self._applied:  # the run went back to an earlier round
            self._build()
        if kinds:
            sizes = [sum(r * (p.inputs + p.outputs) for p in self.layout.pairs) for r in ranks]
            for number, (kind, rank, vector) in enumerate(
                zip(kinds, ranks, cut(joined, sizes), strict=True), start=first
            ):
                self._kept.add(number, kind, rank, vector)
        while self._applied < total:
            kind, rank, vector = self._kept.get(self._applied)
            if kind == "merge":
                merge(self.model, self.layout, vector, rank)
            else:
                self._basis = vector
            self._told = digest(self._told, kind, rank, vector)
            self._applied += 1

    def _steps(
        self,
        device: int,
        round: int,
        steps: int,
        trains: str,
        proximal: float,
        noise: float,
        within: NDArray[np.bool_],
    ) -> float:
        """Train the parts that the plan names, in place; ``within`` masks (p,) what the device has."""
        chosen = self.layout.part(trains)
        start, trained, masks = 0, {}, []
        for name, parameter in self.named.items():
            parameter.requires_grad_(bool(chosen[start]))
            if chosen[start]:
                trained[name] = parameter
                here = torch.from_numpy(within[start : start + parameter.numel()])
                masks.append(here.to(parameter.device).view_as(parameter))
            start += parameter.numel()
        try:
            if self.config.privacy.mechanism == "dp-sgd":
                self._seed(device, round)
                ordered = Round(
                    device=device, number=round, steps=steps, proximal=proximal, noise=noise, told=self._told
                )
                dp_sgd(self, ordered, trained, masks)
                return 0.0
            parameters = list(trained.values())
            return local_steps(
                self._losses(device, round), parameters, self.config.train, round, steps, proximal=proximal
            )
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def _compact_work(self, order: TrainOrder, place: int, sent: Vector) -> tuple[Vector, Vector, float]:
        """Train or poll Fed-SB's squares between the two fixed factors."""
        assert self._basis is not None
        device, round, steps = order.devices[place], order.round, order.steps[place]
        compact = Compact(self.named, self.layout, factors_at(self.layout, self._basis, self.layout.rank))
        compact.load(sent)
        if steps == 0:
            return NOTHING, NOTHING, self._polled(device, round)
        loss = local_steps(
            self._losses(device, round),
            compact.parameters,
            self.config.train,
            round,
            steps,
            before_step=compact.pull,
            after_step=compact.push,
        )
        return compact.vector(), sent, loss

    def _seed(self, device: int, round: int) -> None:
        """Make the model ready to train; dropout is the one draw that torch makes by itself: key it too."""
        self.model.train()
        seed = seed_of(self.config.seed, "dropout", device, round)
        # Not torch.manual_seed: it asks every kind of accelerator, which takes as long as a small step.
        torch.default_generator.manual_seed(seed)
        if self.model.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def _losses(self, device: int, round: int) -> Callable[[int], torch.Tensor | None]:
        """Return the loss of a local step; ``None`` where its batch is empty."""
        self._seed(device, round)

        def loss(step: int) -> torch.Tensor | None:
            batch = self.task.batch(device, round, step)
            return self.task.loss(self.model, batch) if self.task.weight(batch) > 0.0 else None

        return loss

    def _first_loss(self, device: int, round: int) -> torch.Tensor | None:
        """Return the loss of a round's first batch that is not empty; ``None`` where all are."""
        loss = self._losses(device, round)
        values = (loss(step) for step in range(self.config.train.local_steps))
        return next((value for value in values if value is not None), None)

    def _probed(self, device: int, round: int) -> torch.Tensor:
        if (value := self._first_loss(device, round)) is None:
            raise ValueError(f"device {device} has no batch in round {round} to take a gradient of")
        return value

    def _polled(self, device: int, round: int) -> float:
        """Return the loss that training would begin with, at the resident vector; NaN without any batch."""
        with torch.no_grad():
            value = self._first_loss(device, round)
        return float("nan") if value is None else value.item()


def _replaced(vector: Vector, own: NDArray[np.bool_], kept: NDArray[np.generic] | None) -> Vector:
    """Return a vector with a device's own part in its place; a device that starts has none yet."""
    vector = vector.copy()
    if kept is not None:
        vector[own] = kept
    return vector


@contextmanager
def _remembered(backbone: nn.Module) -> Iterator[Callable[[], None]]:
    """Let a backbone repeat its answers from the first on, whenever the yielded function was called."""
    answers: list[torch.Tensor] = []
    place = 0

    def forward(tokens: object) -> torch.Tensor:
        nonlocal place
        if place == len(answers):
            answers.append(type(backbone).forward(backbone, tokens))
        place += 1
        return answers[place - 1]

    def again() -> None:
        nonlocal place
        place = 0

    backbone.forward = forward
    try:
        yield again
    finally:
        del backbone.forward


def torch_device(name: str) -> torch.device:
    """Return the device that 'auto', 'cpu' or 'cuda' means here; 'cuda' without one is a ``ValueError``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds no CUDA device here; use 'auto' or 'cpu'")
    wanted = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wanted else "cpu")
