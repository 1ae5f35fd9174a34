"""What the server knows of the devices' own modules, embedding and head, where they train.

``personal``: nothing; each device keeps its own, and none travels. ``averaged``: every so many rounds the
devices hand theirs in, the mean is weighted by what each has worked since (McMahan et al., AISTATS 2017,
arXiv:1602.05629), and it goes down to a device with the next order that it gets. With one step between two
averages, plain descent on the devices and batch sizes as weights, this is descent on the pooled batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector, WeightedMean, pack
from fedlam_app.models.split import SplitModel


class Modules:
    """The mean of the devices' modules, and who has it."""

    def __init__(self, model: SplitModel, averaged: bool) -> None:
        named = model.trainable()
        self._device = np.concatenate(
            [np.full(p.numel(), not name.startswith("backbone.")) for name, p in named.items()]
        )  # (p,)
        self._start = pack(named.values())
        self.mean: Vector = self._start[self._device]  # (q,)
        self.averaged = averaged and len(self.mean) > 0
        self.personal = not averaged and len(self.mean) > 0
        self.number = 0  # averages so far
        self._has: dict[int, int] = {}  # the last average that each device was told
        self._work: dict[int, float] = {}
        self._sum = WeightedMean()

    def news(self, device: int) -> bytes:
        """Return the mean where a device has not been told the latest, else nothing."""
        return self.mean.tobytes() if self._has.get(device, 0) < self.number else b""

    def told(self, device: int) -> None:
        """Note that a device answered an order, so it has the latest mean."""
        self._has[device] = self.number

    def worked(self, device: int, weight: float) -> None:
        """Add what a device has worked since the last average."""
        self._work[device] = self._work.get(device, 0.0) + weight

    def share(self, device: int) -> float:
        """Return what a device has worked since the last average."""
        return self._work.get(device, 0.0)

    def fold(self, device: int, vector: NDArray[np.floating]) -> bool:
        """Take in one device's modules (q,); false where they are not finite or not of the right length."""
        if vector.shape != self.mean.shape or not np.isfinite(vector).all():
            return False
        self._sum.add(vector, self._work[device])
        return True

    def step(self) -> None:
        """Make the mean of what was folded the modules of everyone."""
        if self._sum.weight > 0.0:
            self.mean, self.number = self._sum.value(), self.number + 1
        self._work, self._sum = {}, WeightedMean()

    def whole(self, server: Vector) -> Vector:
        """Return the full vector (p,) of a server part and the mean."""
        full = self._start.copy()
        full[~self._device], full[self._device] = server, self.mean
        return full

    def state(self, devices: Sequence[int]) -> dict[str, NDArray[np.generic]]:
        """Return what a resumed run needs."""
        table = np.array([[self._has.get(k, 0), self._work.get(k, 0.0)] for k in devices], np.float64)
        return {"modules.mean": self.mean, "modules.number": np.array(self.number), "modules.devices": table}

    def load(self, state: dict[str, NDArray[np.generic]], devices: Sequence[int]) -> None:
        """Continue from :meth:`state`."""
        self.mean = state.pop("modules.mean").astype(self.mean.dtype)
        self.number = int(state.pop("modules.number"))
        for k, (has, work) in zip(devices, state.pop("modules.devices"), strict=True):
            self._has[k] = int(has)
            if work:
                self._work[k] = float(work)
