"""No federation: every device keeps and trains its own model. The baseline that sharing must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlam_app.base.vectors import Vector
from strategies.algorithm import Vectors


class Local:
    """One vector a device; a device that did not reply keeps its last one."""

    def init(self, vector: Vector, devices: Sequence[int]) -> None:
        self._slot = {device: slot for slot, device in enumerate(devices)}
        self._vectors = np.repeat(vector[None], len(devices), axis=0)  # (devices, p)

    def rows(self) -> list[int]:
        return list(range(len(self._vectors)))

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self._vectors[self._slot[device]] = vector

    def step(self) -> None:
        pass

    def models(self) -> Vectors:
        return self._vectors

    def load(self, models: Vectors) -> None:
        self._vectors = models.copy()
