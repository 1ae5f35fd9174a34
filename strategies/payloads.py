"""How many bytes a round of adapter space asks each device to send and to take, before anybody works.

Rounds are of few sorts (a length of the model, a plan), and counting passes over all devices: it is done
once a sort.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.records import framed_bytes
from strategies.algorithm import Algorithm, Plan
from strategies.cohort import Cohort
from strategies.participation import Turn

Bytes = NDArray[np.float64]  # (N,)


class Payloads:
    """Of one experiment."""

    def __init__(self, algorithm: Algorithm, ids: NDArray[np.int64]) -> None:
        self.algorithm, self.ids = algorithm, ids
        self._known: dict[tuple[int, Plan], tuple[Bytes, Bytes]] = {}

    def of(self, number: int) -> tuple[Bytes, Bytes]:
        """Return what each device (N,) sends and is sent in a round, without the entries that it lacks."""
        sort = self.algorithm.models().shape[1], self.algorithm.plan(number)
        if sort not in self._known:
            self._known[sort] = self._count(number)
        return self._known[sort]

    def _count(self, number: int) -> tuple[Bytes, Bytes]:
        ranks = self.algorithm.ranks()  # (N,)
        up, down = np.zeros(len(ranks)), np.zeros(len(ranks))
        for rank in np.unique(ranks):
            sample = [int(self.ids[np.argmax(ranks == rank)])]
            models, rows = self.algorithm.models(), self.algorithm.rows(sample)
            alike = Cohort(self.algorithm, number, Turn(ids=sample, steps=[1], factors=[1.0]), models, rows)
            up[ranks == rank] = framed_bytes((alike.width(sample[0]),))
            down[ranks == rank] = framed_bytes(alike.sent(sample[0]).shape)
        return up, down
