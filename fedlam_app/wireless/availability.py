"""When devices can be reached: sessions whose length is known, and a day that the whole fleet follows.

    P(on | local hour h) = p(h) = min(on-share (1 + A cos(2 pi (h - 3) / 24)), 0.999)
    on-duration  X ~ LogNormal(ln on-minutes, 1.2)
    off-duration with hazard  b(t) / (1 - p(t))        where        p(t) = int_0^inf b(t - u) P(X > u) du

The devices that are on at t are those that came at some t - u and stay longer than u. So the rate b at which
devices come is the deconvolution of p by X's survival, over a day of 5-minute steps (FFT, exact integrals of
the survival), and a device that is off comes with the hazard that makes the rate b. This gives P(on | h) at
every hour, however long sessions are beside the day. Where p would fall faster than sessions end, b would be
negative: it is 0 there and smaller elsewhere, so that the day has a weaker swing and the same mean. The first
state is drawn from the same law, with its age.

Source of the shape: reachable is idle, charging and unmetered (K. Bonawitz et al., "Towards Federated
Learning at Scale: System Design", arXiv:1902.01046, report, as it is remembered, a swing of four between
night and day); the lognormal, its 1.2, and the phase are assumptions, and the construction of b is this
project's. Local times differ by 0, 6, 12 and 18 h, so that the fleet as a whole keeps ``on-share`` at any
time. Residual sessions are known: who leaves in the middle of a round is never left to a coin.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from fedlam_app.tables.wireless import FleetConfig

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ids = NDArray[np.int64]
Arrays = dict[str, NDArray[np.generic]]

SIGMA = 1.2  # of ln(on-duration)
ZONES_H = (0, 6, 12, 18)
STEPS = 288  # of a day
CEILING = 0.999


class Law(Protocol):
    """When devices come and go."""

    def begin(self, draw: np.random.Generator) -> tuple[Flags, Doubles]:
        """Return who is on at time 0, and until when each stays as it is [s]: (N,) both."""

    def until(self, ids: Ids, on: Flags, at_s: Doubles, draw: np.random.Generator) -> Doubles:
        """Return until when ``ids``, which became ``on`` at ``at_s``, stay so [s]: (k,) all."""

    def state(self) -> Arrays:
        """Return the arrays that a resumed run continues from."""

    def load(self, state: Arrays) -> None:
        """Continue from :meth:`state`."""


class Sessions:
    """Who is on (N,), and until when [s] each stays as it is (N,); float64, for a run may last for weeks."""

    def __init__(self, law: Law, draw: np.random.Generator) -> None:
        self.law = law
        self.on, self.until_s = law.begin(draw)

    def advance(self, to_s: float, draw: np.random.Generator) -> None:
        """Move on to ``to_s``, over as many comings and goings as there are until then."""
        due = np.flatnonzero(self.until_s <= to_s)
        while len(due):
            on = ~self.on[due]
            self.on[due] = on
            until = self.law.until(due, on, self.until_s[due], draw)
            self.until_s[due] = until
            due = due[until <= to_s]

    def state(self) -> Arrays:
        """Return the arrays that a resumed run continues from."""
        return {"on": self.on.copy(), "until_s": self.until_s.copy(), **self.law.state()}

    def load(self, state: Arrays) -> None:
        """Continue from :meth:`state`."""
        self.on = np.array(state["on"], np.bool_)
        self.until_s = np.array(state["until_s"], np.float64)
        self.law.load(state)


class Always:
    """Devices that never leave."""

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def begin(self, draw: np.random.Generator) -> tuple[Flags, Doubles]:
        return np.ones(self.devices, np.bool_), np.full(self.devices, np.inf)

    def until(self, ids: Ids, on: Flags, at_s: Doubles, draw: np.random.Generator) -> Doubles:
        return np.full(len(ids), np.inf)

    def state(self) -> Arrays:
        return {}

    def load(self, state: Arrays) -> None:
        """There is nothing to continue from."""


class Diurnal:
    """The law above. Times inside are hours."""

    def __init__(self, config: FleetConfig, zone_h: NDArray[np.uint8]) -> None:
        """``zone_h`` (N,) is a device's local time less ours [h]."""
        self.zone_h = zone_h
        self.median_h = config.on_minutes / 60.0
        self.hours = np.linspace(0.0, 24.0, STEPS + 1)
        day = config.on_share * (1.0 + config.diurnal * np.cos(2.0 * np.pi * (self.hours - 3.0) / 24.0))
        wanted = np.minimum(day, CEILING)[1:]
        days = math.ceil(self.median_h * math.exp(6.0 * SIGMA) / 24.0)
        # The integral of P(X > u) over each step of u; days repeat, so steps at the same hour are added up.
        stays = np.diff(self._stay(np.linspace(0.0, 24.0 * days, STEPS * days + 1)))
        kernel = np.fft.rfft(stays.reshape(days, STEPS).sum(0))
        rate = np.fft.irfft(np.fft.rfft(wanted) / kernel, STEPS)
        reached = np.maximum(rate, 1e-9)
        self.rate = reached * (rate.mean() / reached.mean())  # devices that come, an hour and device
        share = np.fft.irfft(np.fft.rfft(self.rate) * kernel, STEPS)  # p, at the end of each step
        self.share = np.minimum(np.concatenate([share[-1:], share]), CEILING)
        off = 1.0 - (self.share[1:] + self.share[:-1]) / 2.0
        self.hazard = np.concatenate([[0.0], np.cumsum(self.rate / off)]) * (24.0 / STEPS)  # integrated

    def begin(self, draw: np.random.Generator) -> tuple[Flags, Doubles]:
        on = draw.random(len(self.zone_h)) < np.interp(self.zone_h, self.hours, self.share)
        until_h = np.empty(len(on))
        for zone in np.unique(self.zone_h):
            mine = np.flatnonzero(self.zone_h == zone)
            there = mine[on[mine]]
            until_h[there] = self._rest(float(zone), draw.random((2, len(there))))
            away = mine[~on[mine]]
            until_h[away] = self._away(np.full(len(away), float(zone)), draw)
        return on, until_h * 3600.0

    def until(self, ids: Ids, on: Flags, at_s: Doubles, draw: np.random.Generator) -> Doubles:
        hours = np.empty(len(ids))
        hours[on] = self.median_h * np.exp(SIGMA * draw.standard_normal(int(on.sum())))
        local = (at_s[~on] / 3600.0 + self.zone_h[ids[~on]]) % 24.0
        hours[~on] = self._away(local, draw)
        return at_s + hours * 3600.0

    def state(self) -> Arrays:
        return {}

    def load(self, state: Arrays) -> None:
        """There is nothing to continue from."""

    def _stay(self, hours: Doubles) -> Doubles:
        """Return E min(X, hours), the integral of P(X > u) up to ``hours``."""
        with np.errstate(divide="ignore"):
            z = np.log(hours / self.median_h) / SIGMA
        return self.median_h * math.exp(SIGMA**2 / 2.0) * ndtr(z - SIGMA) + hours * ndtr(-z)

    def _rest(self, local: float, uniform: Doubles) -> Doubles:
        """Return how long [h] devices that are on at the hour ``local`` stay yet, from draws (2, k)."""
        ages = np.concatenate([[0.0], self.median_h * np.exp(SIGMA * np.linspace(-6.0, 6.0, 512))])
        middle = (ages[1:] + ages[:-1]) / 2.0
        came = self.rate[((local - middle) % 24.0 * (STEPS / 24.0)).astype(np.int64) % STEPS]
        seen = np.concatenate([[0.0], np.cumsum(came * np.diff(self._stay(ages)))])
        age = np.interp(uniform[0] * seen[-1], seen, ages)
        with np.errstate(divide="ignore"):
            longer = ndtr(-np.log(age / self.median_h) / SIGMA)  # P(X > age)
        # 1 - U, for U may be 0, and nobody stays for ever.
        return np.maximum(self.median_h * np.exp(-SIGMA * ndtri((1.0 - uniform[1]) * longer)) - age, 0.0)

    def _away(self, local: Doubles, draw: np.random.Generator) -> Doubles:
        """Return how long [h] devices that are off at the hours ``local`` stay so."""
        wanted = np.interp(local, self.hours, self.hazard) + draw.standard_exponential(len(local))
        days, rest = np.divmod(wanted, self.hazard[-1])
        return 24.0 * days + np.interp(rest, self.hazard, self.hours) - local
