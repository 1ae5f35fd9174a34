"""What an edge server remembers of its devices, 16 bytes each: last loss, norm and round, and how often."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.selection.base import Outcome


class History:
    """Struct of arrays over all N devices."""

    def __init__(self, devices: int) -> None:
        self.loss = np.full(devices, np.inf, np.float32)
        self.norm = np.full(devices, np.inf, np.float32)
        self.last = np.zeros(devices, np.int32)
        self.count = np.zeros(devices, np.int32)

    def note(self, outcome: Outcome) -> None:
        """Remember those whose updates arrived."""
        ids = outcome.ids[outcome.arrived]
        self.loss[ids] = outcome.loss[outcome.arrived]
        self.norm[ids] = outcome.norm[outcome.arrived]
        self.last[ids] = outcome.number
        self.count[ids] += 1

    def jain(self) -> float:
        """Return Jain's fairness index of how often each device took part, in [1/N, 1]; 0 before anyone has.

        (sum x)^2 / (N sum x^2): R. Jain, D. Chiu, W. Hawe, DEC-TR-301, 1984.
        """
        count = self.count.astype(np.float64)
        squares = float(count @ count)
        return float(count.sum()) ** 2 / (len(count) * squares) if squares else 0.0

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        return {name: getattr(self, name) for name in ("loss", "norm", "last", "count")}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""
        for name in ("loss", "norm", "last", "count"):
            setattr(self, name, np.array(state[name]))
