"""No federation: every device keeps and trains its own model. The baseline that sharing must beat.

    v_{t+1}^k = what device k made of v_t^k

Bytes: as FedAvg where the vectors travel, for nothing is averaged but everything is kept on the server.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm, Vectors


class Local(Algorithm):
    """One vector a device; a device that did not reply keeps its last one."""

    unlike_ranks = True

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(vector, devices, layout)
        self._slot = {device: slot for slot, device in enumerate(devices)}
        self._vectors = np.repeat(vector[None], len(devices), axis=0)  # (devices, p)

    def rows(self, cohort: Sequence[int]) -> list[int]:
        return [self._slot[device] for device in cohort]

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self._vectors[self._slot[device]] = vector

    def step(self) -> None:
        pass

    def models(self) -> Vectors:
        return self._vectors

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        self._vectors = state["models"].astype(self._vectors.dtype)
