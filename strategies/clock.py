"""The virtual clock: how long each device takes for one local step, and what waiting for the slowest costs.

    log d_k evenly spaced over log ``fedbuff.spread``, dealt to the devices by a keyed permutation

These are the quantiles of the log-uniform law and not draws from it, so that the slowest device is exactly
``spread`` times slower than the fastest, however few they are. The unit is one local step of the median
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng


def durations(seed: int, devices: Sequence[int], spread: float) -> NDArray[np.float64]:
    """Return the virtual seconds (N,) of one local step, in the order of ``devices``; their median is 1."""
    places = rng(seed, "clock").permutation(len(devices)) / max(1, len(devices) - 1)  # in [0, 1]
    times: NDArray[np.float64] = spread**places
    return times / np.median(times)


def slowest(times: Mapping[int, float], cohort: Sequence[int]) -> float:
    """Return how long a synchronous step takes: as long as the slowest device of its cohort."""
    return max(times[device] for device in cohort)
