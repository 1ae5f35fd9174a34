"""The devices of one round of adapter space: where each starts, how much it does, and what of it travels.

A device of rank r has r components of each factor of its model (``Layout.within``). It is sent what it does
not keep (``Plan.keeps``) and hands in what the plan names (``Plan.returns``); the rest of its vector is known
without a word. Fed-SB's compact vectors have a length of their own, without factors to cut.

Whoever starts alike (the same model, the same rank) shares one vector on the wire and one mask here: work and
memory are by kind of device, not by device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.packing import chunked
from fedlam_app.base.records import TrainReport
from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm, Vectors
from strategies.participation import Turn


class Cohort:
    """A round's devices, in ascending order, and what came of them, by device."""

    def __init__(
        self,
        algorithm: Algorithm,
        number: int,
        turn: Turn,
        models: Vectors,
        rows: Sequence[int],
    ) -> None:
        """Device ``turn.ids[i]`` starts from ``models[rows[i]]``."""
        self.number, self.turn, self.devices = number, turn, list(turn.ids)
        self.plan, self.models, self.layout = algorithm.plan(number), models, algorithm.layout
        self.compact = models.shape[1] != self.layout.size
        ranks = [algorithm.rank(k) for k in turn.ids]
        self.kinds = dict(zip(turn.ids, zip(rows, ranks, strict=True), strict=True))  # (row, rank)
        self.steps = dict(zip(turn.ids, turn.steps, strict=True))
        self.factors = dict(zip(turn.ids, turn.factors, strict=True))
        self.losses: dict[int, float] = {}  # of those whose work counts
        self.norms: dict[int, float] = {}  # of their updates
        self.bytes_up: dict[int, int] = {}  # of everybody who answered, as serialised
        self.bytes_down: dict[int, int] = {}
        self._masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
        self._widths: dict[int, int] = {}  # by rank: a round asks for it once a device

    def chunks(self, algorithm: Algorithm) -> dict[int, int]:
        """Return whose sum each device's vector enters (``packing.py``); nothing where they travel apart.

        Sums are for linear rules, and for devices that start alike and hand in the same places.
        """
        alike = len(set(self.kinds.values())) == 1 and all(self.steps.values())
        if not algorithm.linear or not alike or self.compact or self.plan.probe:
            return {}
        return dict(zip(self.devices, chunked(len(self.devices)), strict=False))

    def full(self, device: int) -> Vector:
        """Return a device's whole vector (p,) as it starts, zero past its rank; the caller's to write to."""
        row, rank = self.kinds[device]
        return self.models[row] * (True if self.compact else self.layout.within(rank))

    def sent(self, device: int) -> Vector:
        """Return what is sent to a device."""
        row, _ = self.kinds[device]
        return self.models[row] if self.compact else self.models[row][self._mask("sent", device)]

    def returned(self, device: int) -> NDArray[np.bool_]:
        """Return the mask (p,) of what a device hands in."""
        return self._mask("returned", device)

    def width(self, device: int) -> int:
        """Return how many values a device hands in."""
        rank = self.kinds[device][1]
        if rank not in self._widths:
            self._widths[rank] = int(np.count_nonzero(self.returned(device)))
        return self._widths[rank]

    def _mask(self, name: str, device: int) -> NDArray[np.bool_]:
        key = (name, self.kinds[device][1])
        if key not in self._masks:
            plan, layout = self.plan, self.layout
            part = ~layout.part(plan.keeps) if name == "sent" else layout.part(plan.returns)
            whole = np.ones(self.models.shape[1], bool)
            self._masks[key] = whole if self.compact else layout.within(key[1]) & part
        return self._masks[key]


@dataclass(frozen=True)
class Said:
    """The scalars of one device's answer."""

    size: int  # values that it handed in
    weight: float
    loss: float
    norm: float


def scalars(report: TrainReport) -> dict[int, Said]:
    """Return what each device said; all or none, where they are not as many."""
    each = zip(report.sizes, report.weights, report.losses, report.norms, strict=True)
    return dict(zip(report.devices, (Said(*one) for one in each), strict=True))
