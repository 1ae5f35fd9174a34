"""The virtual clock without a fleet: how long a device takes for a step, and what waiting for it costs.

    log d_k evenly spaced over log ``fedbuff.spread``, dealt to the devices by a keyed permutation

These are the quantiles of the log-uniform law and not draws from it, so that the slowest device is exactly
``spread`` times slower than the fastest, however few they are. The unit is one local step of the median
device. A step takes as long as the slowest device of its cohort, and as all of them together where the rule
is sequential.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from strategies.algorithm import Algorithm
from strategies.participation import Arrays, Drawn, Heard


def durations(seed: int, devices: Sequence[int], spread: float) -> NDArray[np.float64]:
    """Return the virtual seconds (N,) of one local step, in the order of ``devices``; their median is 1."""
    places = rng(seed, "clock").permutation(len(devices)) / max(1, len(devices) - 1)  # in [0, 1]
    times: NDArray[np.float64] = spread**places
    return times / np.median(times)


class Paced(Drawn):
    """The rule's cohort does all the work, and everybody waits for the slowest."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        config, devices = algorithm.config, algorithm.devices
        times = durations(config.seed, devices, config.fedbuff.spread)
        self.times: dict[int, float] = dict(zip(devices, times.tolist(), strict=True))
        self.now, self.taken = 0.0, 0  # virtual time, and the steps that were taken by then

    def settle(self, heard: Heard) -> None:
        self.now, self.taken = self.end(), self.taken + 1

    def seconds(self) -> float:
        return self.now

    def end(self) -> float:
        """Return the virtual time at which the next step ends."""
        waits = [self.times[device] for device in self.algorithm.cohort(self.taken + 1)]
        return self.now + (sum(waits) if self.algorithm.sequential else max(waits, default=0.0))

    def state(self) -> Arrays:
        return {"fleet.now": np.array(self.now), "fleet.taken": np.array(self.taken)}

    def load(self, state: Arrays) -> None:
        self.now, self.taken = float(state.pop("fleet.now")), int(state.pop("fleet.taken"))
