"""Devices as somebody measured them, in place of the models: links of a known rate, and sessions on record.

    link       a = b (2^(r / b) - 1)  so that b log2(1 + a / b) = r  at the equal share b of the band
    session    trace r of a device, again and again: on at edge 0, off at edge 1, ..., at edge 0 + finish time

Files: ``traces.py``. A link by FLASH's file has a rate r of its own each round, lognormal with the user's
mean and standard deviation (FLASH draws it normal, and negative now and then); one by FedScale's capacity
file always its 'communication', both ways. r replaces the rate model, so these links have efficiency 1 and no
cap or floor; it is kept at the equal share alone, and on a band of another width it is what a radio of that
gain would do. An r / b above 100 b/s/Hz is cut, for its gain would be no float32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlam_app.wireless.availability import Arrays, Doubles, Flags, Ids
from fedlam_app.wireless.rates import Link
from fedlam_app.wireless.traces import Behaviour

Floats = NDArray[np.float32]

FREE = Link(efficiency=1.0, cap=math.inf, snr_factor=1.0, floor_db=-400.0)
EXPONENT = 100.0


class MeasuredLinks:
    """Rates (N, 2) [b/s] up and down, in place of a radio."""

    link = FREE

    def __init__(self, mean_bps: Doubles, std_bps: Doubles, power_w: float) -> None:
        """``mean_bps`` and ``std_bps`` (N, 2) of each device's rate over the rounds."""
        variance = np.log1p(np.square(std_bps / mean_bps))  # of ln(rate)
        self.level = (np.log(mean_bps) - variance / 2.0).astype(np.float32)
        self.spread = np.sqrt(variance).astype(np.float32)
        self.power_w = power_w

    def advance(self, dt_s: float, draw: np.random.Generator) -> None:
        """Nothing of it depends on time."""

    def look(
        self, ids: Ids, share_hz: float, down_hz: float, draw: np.random.Generator
    ) -> tuple[Floats, Floats, Floats]:
        """Return uplink gain a [Hz], downlink rate [b/s], transmit power [W] of this round: (k,) each.

        The downlink is the user's own at any ``down_hz``.
        """
        normal = draw.standard_normal((len(ids), 2), dtype=np.float32)
        rate = np.exp(self.level[ids] + self.spread[ids] * normal)  # (k, 2)
        bits = np.minimum(rate[:, 0] / np.float32(share_hz), np.float32(EXPONENT))  # a second and Hz
        gain = np.expm1(bits * np.float32(math.log(2.0))) * np.float32(share_hz)
        return gain, rate[:, 1], np.full(len(ids), self.power_w, np.float32)

    def state(self) -> Arrays:
        """Return the arrays that a resumed run continues from: none."""
        return {}

    def load(self, state: Arrays) -> None:
        """There is nothing to continue from."""


class Recorded:
    """Sessions of a behaviour file; see ``availability.Law``.

    The end of a trace and its start are not joined: who is on over it is known to stay until the end alone.
    """

    def __init__(self, behaviour: Behaviour, trace: NDArray[np.int32]) -> None:
        """``trace`` (N,) is the trace of each device."""
        self.behaviour, self.trace = behaviour, trace
        self.edge = behaviour.first[trace].astype(np.int32)  # (N,) the next
        self.cycle_s = np.zeros(len(trace))  # (N,) when the trace began that it belongs to

    def begin(self, draw: np.random.Generator) -> tuple[Flags, Doubles]:
        kept = self.behaviour
        empty = kept.first[self.trace] == kept.first[self.trace + 1]
        # A trace without a session has no edge of its own; whatever the index finds is not looked at.
        edges = np.append(kept.edges_s, np.inf)
        on = (edges[self.edge] == 0.0) & ~empty
        self.edge[on] += 1
        return on, np.where(empty, np.inf, edges[self.edge])

    def until(self, ids: Ids, on: Flags, at_s: Doubles, draw: np.random.Generator) -> Doubles:
        kept, trace = self.behaviour, self.trace[ids]
        edge = self.edge[ids] + 1
        again = edge == kept.first[trace + 1]
        edge[again] = kept.first[trace[again]]
        self.cycle_s[ids[again]] += kept.finish_s[trace[again]]
        self.edge[ids] = edge
        until: Doubles = self.cycle_s[ids] + kept.edges_s[edge]
        return until

    def state(self) -> Arrays:
        return {"edge": self.edge.copy(), "cycle_s": self.cycle_s.copy()}

    def load(self, state: Arrays) -> None:
        self.edge = np.array(state["edge"], np.int32)
        self.cycle_s = np.array(state["cycle_s"], np.float64)
