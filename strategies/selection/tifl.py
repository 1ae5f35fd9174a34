"""TiFL: devices of one latency tier at a time, so that nobody waits for somebody much slower.

Z. Chai et al., "TiFL: A Tier-based Federated Learning System", arXiv:2001.09249.

    profile   m = ``selection.tiers`` tiers of equal size, by latency [s]; anew every ``reprofile`` rounds
    latency   <- (1 - 1/tau) latency + time / tau,   tau = ``selection.memory``, whenever a device takes part
    draw      a tier with chance p_m, of those that have credits left; a credit is spent; K at random in it
    adapt     every 20 rounds, where the loss of the tier drawn last has not fallen since the 20 before:
              p_m = 2 rank_m / (m (m + 1)),   rank 1: the least loss ... m: the greatest

Departures: nobody reports an accuracy, so a tier's mean reported loss stands for it (a tier never heard is
the worst), and ranks start at one, for with zero the best tier would not be drawn. The paper leaves the
credits to its user: here a tier gets 20 (latency of the fastest tier) / (its own) of them, rounded, at least
one (tiers are given equal time), and all get theirs again when no tier in reach has any. A device's first
latency is what the edge foresees; a later profile mixes that in as ``reprofile`` rounds of the average would.
A tier with fewer than K in reach is filled up from the faster tiers, then from the slower.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.tables.wireless import SelectionConfig
from strategies.selection.base import Choice, Floats, Outcome, Policy, RoundState
from strategies.selection.picks import evenly

_BOUNDS_S = (1e-6, 1e9)  # latencies stay finite, and differ from 'never reached'


class Tifl(Policy):
    """Remembers latency and tier of every device (6 bytes), and what each tier has left and has achieved."""

    interval: ClassVar[int] = 20  # rounds between two looks at the losses; credits of the fastest tier

    def __init__(self, config: SelectionConfig, devices: int, seed: int) -> None:
        super().__init__(config, devices, seed)
        tiers = min(config.tiers, devices)
        self.latency_s: Floats = np.zeros(devices, np.float32)  # 0: never reached
        self.tier = np.full(devices, -1, np.int16)
        self.edges_s: Floats = np.zeros(tiers - 1, np.float32)  # greatest latency of each tier but the last
        self.credits = np.zeros(tiers, np.int64)
        self.chances = np.full(tiers, 1.0 / tiers)
        self.losses = np.full(tiers, np.inf)  # last mean loss
        self.before = np.full(tiers, np.inf)  # as it was at the last look
        self.profiled = 0  # round of the last profile; 0: none yet
        self.drawn = 0  # the tier drawn last
        self.turns = 0

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        if len(state) == 0:
            return Choice(np.arange(0))
        self.profile(state)
        if len(state) <= state.wanted:
            return Choice(np.arange(len(state)))
        tiers = self.tier[state.ids]
        sizes = np.bincount(tiers, minlength=len(self.credits))
        if not self.credits[sizes > 0].any():
            self.credits[:] = self.allowance()
        chances = self.chances * (sizes > 0) * (self.credits > 0)
        ends = np.cumsum(chances)
        self.drawn = int(np.searchsorted(ends, draw.random() * ends[-1], side="right"))
        self.credits[self.drawn] -= 1
        chosen, missing = [], state.wanted
        for tier in (*range(self.drawn, -1, -1), *range(self.drawn + 1, len(sizes))):
            if missing and sizes[tier]:
                places = np.flatnonzero(tiers == tier)
                chosen.append(places[evenly(len(places), missing, draw)])
                missing -= len(chosen[-1])
        return Choice(np.sort(np.concatenate(chosen)))

    def profile(self, state: RoundState) -> None:
        """Give a tier to whoever has none, and at times to everybody anew."""
        time_s, known = np.clip(state.time_s, *_BOUNDS_S), self.latency_s[state.ids].astype(np.float64)
        new = known == 0.0
        every = self.config.reprofile
        if self.profiled == 0 or 0 < every <= state.number - self.profiled:
            share = 1.0 - (1.0 - 1.0 / self.config.memory) ** every
            self.latency_s[state.ids] = np.where(new, time_s, known + share * (time_s - known))
            self.profiled = state.number
            everybody = np.flatnonzero(self.latency_s > 0.0)
            latencies = self.latency_s[everybody]
            count = len(self.credits)
            last = [max(len(everybody) * tier // count, 1) - 1 for tier in range(1, count)]
            self.edges_s = np.partition(latencies, last)[last] if last else self.edges_s
            self.tier[everybody] = self.tiers(latencies)
        elif new.any():
            ids = state.ids[new]
            self.latency_s[ids] = time_s[new]
            self.tier[ids] = self.tiers(time_s[new])

    def tiers(self, latency_s: Floats) -> NDArray[np.int16]:
        """Return the tier (n,) of each of these latencies."""
        return np.searchsorted(self.edges_s, latency_s, side="left").astype(np.int16)

    def allowance(self) -> NDArray[np.int64]:
        """Return the credits (m,) of every tier, by the mean latency of its devices."""
        known = self.tier >= 0
        places = self.tier[known]
        sizes = np.bincount(places, minlength=len(self.credits))
        sums = np.bincount(places, self.latency_s[known], minlength=len(self.credits))
        means = np.divide(sums, sizes, out=np.full(len(sizes), np.inf), where=sizes > 0)
        return np.maximum(np.rint(self.interval * means.min() / means), 1.0).astype(np.int64)

    def feedback(self, outcome: Outcome) -> None:
        done = np.isfinite(outcome.time_s)  # who got no band, or was silent, has shown nothing
        ids, time_s = outcome.ids[done], np.clip(outcome.time_s[done], *_BOUNDS_S)
        self.latency_s[ids] += (time_s - self.latency_s[ids]) / self.config.memory
        came = outcome.ids[outcome.arrived]
        if len(came):
            tiers, count = self.tier[came], len(self.credits)
            sizes = np.bincount(tiers, minlength=count)
            sums = np.bincount(tiers, outcome.loss[outcome.arrived], minlength=count)
            np.divide(sums, sizes, out=self.losses, where=sizes > 0)
        self.turns += 1
        if self.turns % self.interval == 0:
            if self.losses[self.drawn] >= self.before[self.drawn]:
                ranks = np.argsort(np.argsort(self.losses, kind="stable"), kind="stable") + 1
                self.chances = ranks / ranks.sum()
            self.before = self.losses.copy()

    def state(self) -> dict[str, NDArray[np.generic]]:
        arrays = ("latency_s", "tier", "edges_s", "credits", "chances", "losses", "before")
        counts = np.array([self.profiled, self.drawn, self.turns], np.int64)
        return {name: getattr(self, name).copy() for name in arrays} | {"counts": counts}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        for name in ("latency_s", "tier", "edges_s", "credits", "chances", "losses", "before"):
            setattr(self, name, state[name].astype(getattr(self, name).dtype))
        self.profiled, self.drawn, self.turns = state["counts"].tolist()
