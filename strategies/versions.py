"""Which model each device of a turn began with: the newest one, or, where nobody waits, an older one.

:class:`Newest` is synchronous work. :class:`Versions` is FedBuff's (J. Nguyen et al., "Federated Learning
with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639) for any rule: the models at which
devices are still at work are kept, and what comes back j steps late counts s(j) = 1 / sqrt(1 + j):

    gradient space      s(j) g_k(w_{t-j}), divided by the batch sizes alone
    rules that average  w_t + s(j) (v_k - w_{t-j})
    other rules         v_k, at weight s(j) n_k

Departures: the last two lines are ours (the paper has plain gradients). What a rule broadcasts to be kept
(FLoRA's merges) is taken in when a device's work is run, even where it began before; where a step changes
the length of the vectors (Fed-SB's first), everybody at work begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm, Vectors
from strategies.participation import Turn


class Newest:
    """Everybody begins with the current model."""

    apart: ClassVar[bool] = False  # each result ages on its own

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    def models(self) -> Vectors:
        """Return the models (m, p) that devices begin with."""
        return self.algorithm.models()

    def rows(self, turn: Turn) -> list[int]:
        """Return the row of :meth:`models` that each device of a turn began with."""
        return self.algorithm.rows(turn.ids)

    def aged(self, turn: Turn, place: int, vector: Vector, weight: float) -> tuple[Vector, float]:
        """Return the vector and weight at which the ``place``-th device of a turn counts."""
        return vector, weight

    def stepped(self, used: Collection[int]) -> None:
        """Note that the rule has taken a step; on the versions ``used``, devices are still at work."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from; every name begins with ``versions.``."""
        return {}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""


class Versions(Newest):
    """Devices begin when they are free, and come back to a model that has moved on."""

    apart: ClassVar[bool] = True

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        self.steps = 0
        self.kept: dict[int, Vectors] = {0: algorithm.models()}  # by the number of steps that made them

    def models(self) -> Vectors:
        return np.concatenate(list(self.kept.values()))  # (sum of m, p)

    def rows(self, turn: Turn) -> list[int]:
        first, total = {}, 0
        for version, models in self.kept.items():
            first[version], total = total, total + len(models)
        own = self.algorithm.rows(turn.ids)
        return [first[version] + row for version, row in zip(turn.versions, own, strict=True)]

    def aged(self, turn: Turn, place: int, vector: Vector, weight: float) -> tuple[Vector, float]:
        version = turn.versions[place]
        damp = 1.0 / math.sqrt(1.0 + self.steps - version)
        if damp == 1.0:
            return vector, weight
        if self.algorithm.space == "gradient":
            return (damp * vector.astype(np.float64)).astype(vector.dtype), weight
        if not self.algorithm.linear:
            return vector, damp * weight
        (row,) = self.algorithm.rows([turn.ids[place]])
        moved = vector.astype(np.float64) - self.kept[version][row]
        return (self.algorithm.models()[row] + damp * moved).astype(vector.dtype), weight

    def stepped(self, used: Collection[int]) -> None:
        self.steps += 1
        newest = self.algorithm.models()
        former = self.kept
        self.kept = {version: former[version] for version in sorted(used) if version in former}
        if any(models.shape[1] != newest.shape[1] for models in self.kept.values()):
            self.kept = dict.fromkeys(self.kept, newest)
        self.kept[self.steps] = newest

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "versions.steps": np.array(self.steps),
            "versions.numbers": np.array(list(self.kept), np.int64),
            "versions.models": np.stack(list(self.kept.values())),  # (versions, m, p)
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        self.steps = int(state.pop("versions.steps"))
        numbers, models = state.pop("versions.numbers"), state.pop("versions.models")
        self.kept = dict(zip(numbers.tolist(), models, strict=True))
