"""How a run's noise is spread over its releases: what each device's own noise multiplier is multiplied by.

Devices calibrate z_k for even releases, so a plan must cost no more than even releases do: T of factor 1
(``privacy/schedule.py``).

    late      the factor of release t of T is fixed beforehand; over all T the plan costs T
    channel   a device's factor follows its own SNR a |h|^2 / b, or its packet's odds (1 - e) / e of coming
              through, against its own mean so far; it never spends more than is left of T

What a release is follows from how devices are charged. ``dp-sgd``: a round. ``jacobian`` and ``logit``: an
epoch, whose steps share the factor of its first, for the ledger charges an epoch once, at its least noise.
``client``: a step of the sum, with one factor for everybody (its quality is the mean of the devices').

The state of the channel says nothing of data, nor does the schedule; norms, losses and gradients have no part
in either. A device that is drawn has spent, whether its packet comes through or not. The ledger is the judge
in any case: a plan can waste a budget and not pass it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedlam_app.config import RunConfig, sampling_rate
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.privacy.schedule import Prices, even_share, late_weights, rescaled, variances
from strategies.participation import Arrays, Turn

Doubles = NDArray[np.float64]

BY_EPOCH = ("jacobian", "logit")
SURE = 1e6  # odds of a packet that never gets lost
LABELS = 2.0  # gradients of neighbours are 2 C apart, and a label's calibrated z is over that


class Even:
    """What a device's releases cost, were they all alike."""

    def __init__(self, config: RunConfig, examples: Doubles, steps: int) -> None:
        """``examples`` (N,) are the devices', ``steps`` the turns of the run."""
        self.config, self.examples = config, examples
        self.mechanism, train = config.privacy.mechanism, config.train
        batches = max(1, -(-int(examples.sum()) // (train.devices * train.batch_rows)))
        self.each = batches if self.mechanism in BY_EPOCH else 1  # turns of a release
        self.total = -(-steps // self.each)  # releases of the run
        share = train.share if self.mechanism == "dp-sgd" else 1.0
        self.own = math.ceil(self.total * share)  # of a device

    def release(self, number: int) -> int:
        """Return which release (0-based) a turn belongs to."""
        return min((number - 1) // self.each, self.total - 1)

    def event(self, device: int) -> tuple[float, int]:
        """Return the sampling rate of an event, and the events of a release."""
        privacy, train = self.config.privacy, self.config.train
        if self.mechanism == "dp-sgd":
            return sampling_rate(self.config, float(self.examples[device])), train.local_steps
        if self.mechanism == "client" and privacy.cohort == "poisson":
            return train.share, 1
        return 1.0, 1

    def z(self, device: int) -> float:
        """Return the noise over C that a device with a fresh ledger calibrates."""
        privacy = self.config.privacy
        budget = privacy.budget(device)
        if self.mechanism == "client":  # one noise for all, for the largest budget that has an end
            budgets = map(privacy.budget, range(len(self.examples)))
            budget = max(filter(math.isfinite, budgets), default=math.inf)
        if privacy.noise_multiplier > 0.0 or math.isinf(budget):
            return privacy.noise_multiplier
        q, events = self.event(device)
        found = Ledger(budget, privacy.delta).calibrate(q, self.own * events)
        return found * (LABELS if self.mechanism == "jacobian" else 1.0)


class Uniform:
    """All factors are 1."""

    def factors(self, number: int, turn: Turn) -> list[float]:
        """Return the devices' factors in a turn; nothing where all are 1."""
        return []

    def settle(self) -> None:
        """End the turn."""

    def state(self) -> Arrays:
        """Return what a resumed run needs."""
        return {}

    def load(self, state: Arrays) -> None:
        """Continue from :meth:`state`."""


class Late(Uniform):
    """Factors that were fixed beforehand."""

    def __init__(self, even: Even, rho: float) -> None:
        self.even, self.known = even, dict[tuple[float, float], Doubles]()
        self.shape = np.sqrt(variances(late_weights(even.total, rho), float(even.total)))

    def factors(self, number: int, turn: Turn) -> list[float]:
        at = self.even.release(number)
        return [float(self._of(k)[at]) for k in turn.ids]

    def _of(self, device: int) -> Doubles:
        q, events = self.even.event(device)
        key = q, 0.0 if q == 1.0 else self.even.z(device)
        if key not in self.known:
            args = q, key[1], events * self.even.own / self.even.total, self.even.config.privacy.delta
            self.known[key] = rescaled(self.shape, *args)
        return self.known[key]


class ByChannel(Uniform):
    """Factors that follow the channel: who has spent how much of its plan is the state."""

    def __init__(self, even: Even, common: bool) -> None:
        """``common``: one factor for all, and one plan."""
        self.even, self.common, rows = even, common, 1 if common else len(even.examples)
        self.left = np.full(rows, float(even.own))  # of the budget, in even releases
        self.count = np.zeros(rows)  # releases so far
        self.sums = np.zeros(rows)  # of their qualities
        self.last = np.full(rows, -1.0)  # the release that was priced last
        self.factor = np.ones(rows)  # and its factor
        self._prices: dict[tuple[float, float], Prices] = {}
        self._spent: Callable[[], None] = lambda: None

    def factors(self, number: int, turn: Turn) -> list[float]:
        at, quality = self.even.release(number), _quality(turn)
        rows = [0] if self.common else turn.ids
        values = [float(quality.mean())] if self.common and len(quality) else quality.tolist()
        found = [self._priced(row, at, value) for row, value in zip(rows, values, strict=False)]

        def spend() -> None:
            for row, value, (factor, cost) in zip(rows, values, found, strict=False):
                if self.last[row] != at:
                    self.left[row] = max(self.left[row] - cost, 0.0)
                    self.count[row], self.sums[row] = self.count[row] + 1.0, self.sums[row] + value
                    self.last[row], self.factor[row] = at, factor

        self._spent = spend
        own = [factor for factor, _ in found]
        return own * len(turn.ids) if self.common else own

    def settle(self) -> None:
        self._spent()
        self._spent = lambda: None

    def state(self) -> Arrays:
        return {name: getattr(self, name) for name in ("left", "count", "sums", "last", "factor")}

    def load(self, state: Arrays) -> None:
        for name, array in state.items():
            setattr(self, name, np.array(array, np.float64))

    def _priced(self, row: int, at: int, quality: float) -> tuple[float, float]:
        """Return a row's factor in a release, and its cost."""
        if self.last[row] == at:
            return float(self.factor[row]), 0.0
        mean = (self.sums[row] + quality) / (self.count[row] + 1.0)
        price = even_share(self.left[row], self.even.own - self.count[row], quality, mean)
        return self._of_prices(row).factor(price)

    def _of_prices(self, row: int) -> Prices:
        q, events = self.even.event(row)
        key = q, 0.0 if q == 1.0 else self.even.z(row)
        if key not in self._prices:
            delta = self.even.config.privacy.delta
            self._prices[key] = Prices(*key, float(events * self.even.own), delta)
        return self._prices[key]


def plan_of(config: RunConfig, even: Even) -> Uniform:
    """Return the plan of ``privacy.schedule``."""
    privacy = config.privacy
    if privacy.schedule == "late":
        return Late(even, privacy.late_weight)
    return ByChannel(even, privacy.mechanism == "client") if privacy.schedule == "channel" else Uniform()


def _quality(turn: Turn) -> Doubles:
    """Return 1 / D (k,) of a turn's devices: their SNRs, or their packets' odds of coming through."""
    if turn.snr:
        return np.array(turn.snr)
    error = np.clip(np.array(turn.error), 0.0, 1.0)
    return np.minimum((1.0 - error) / np.maximum(error, 1.0 / SURE), SURE)
