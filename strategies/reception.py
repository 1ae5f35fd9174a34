"""How a turn's results come together: each on its own, or as a sum that is not divided by its own weights.

:class:`Straight` gives the rule every result (``over_air.py`` is the third way). :class:`Summed` is for rules
that average (``Algorithm.linear``) when devices were drawn with unlike chances p_k and their weights make up
for it: a ratio of sums would be biased, so the update is divided by what the weights add up to in the mean,

    w <- w + sum_k a_k (v_k - w) / base,      a_k = n_k / (N p_k)        (D. Horvitz, D. Thompson, JASA 1952)

with w where the devices began. Gradients are weighted by batches, whose sum over everyone nobody knows, and
other rules do not average: they get the weights a_k alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm
from strategies.participation import Turn

Doubles = NDArray[np.float64]


class Straight:
    """The rule takes each result as it is."""

    apart: ClassVar[bool] = False  # needs each result, and not only their sum
    private: ClassVar[bool] = False  # single results are nobody else's business

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.gone: set[int] = set()  # who takes no part any more (``device_dp.py``)

    @property
    def alone(self) -> bool:
        """Whether a step is taken even if nobody comes."""
        return False

    def tells(self, books: dict[int, str], failed: Callable[[str], None]) -> None:
        """Put privacy ledgers into ``books``, and failures into ``failed``, from now on."""

    def admitted(self, turn: Turn, number: int) -> Turn:
        """Return the part of a turn that may work."""
        return turn

    def begin(self, turn: Turn) -> None:
        """Open a turn."""

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        """Take one result (p,)."""
        self.algorithm.fold(device, vector, weight)

    def fold_sum(self, total: Doubles, weight: float) -> None:
        """Take the weighted sum (p,) of some results."""
        self.algorithm.fold_sum(total, weight)

    def end(self, number: int) -> None:
        """Close the turn, before the rule steps."""

    def summary(self) -> dict[str, float]:
        """Return what the run's log says of it."""
        return {}

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from; every name begins with ``privacy.``."""
        return {}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`, and take what was its out of ``state``."""


class Summed(Straight):
    """The rule gets one result: the sum's."""

    def begin(self, turn: Turn) -> None:
        self.turn, self.weight = turn, 0.0
        self.total: Any = 0.0

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self.fold_sum(np.multiply(vector, weight, dtype=np.float64), weight)

    def fold_sum(self, total: Doubles, weight: float) -> None:
        self.total, self.weight = self.total + total, self.weight + weight

    def end(self, number: int) -> None:
        if self.weight == 0.0:
            return
        start = 0.0 if self.algorithm.space == "gradient" else self.algorithm.models()[0].astype(np.float64)
        update = self.total / self.weight - start
        base = self.turn.base or self.weight
        update *= self.weight / base
        received = (start + update).astype(self.algorithm.models().dtype)
        self.algorithm.fold(self.turn.ids[0], received, base)
