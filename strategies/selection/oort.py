"""Oort: devices whose examples still teach something, and who are fast enough.

F. Lai et al., "Oort: Efficient Federated Learning via Guided Participation Selection", arXiv:2010.06081;
constants as in FedScale's code.

    U_i = n_i loss_i                                               of an explored device
    s_i = (min(U_i, P95) - min U) / (P95 - min U) + sqrt(0.1 ln R / L_i)         R: round, L_i: its last
    s_i <- s_i min(1, T / t_i)^alpha                            t: duration [s], alpha = ``selection.penalty``
    explore = min(round(eps K), unexplored),   eps: 0.9, times 0.98 each round, at least 0.3
    exploit = K - explore of those with s >= 0.95 s_(exploit), drawn in proportion to s
    explore of the 5 explore largest n_i min(1, T / t_i)^alpha, drawn in proportion to it
    pacer   T is a percentile of t, 30th at first; every 20 rounds, by the utility of these and the 20 before:
            5 points more where they differ by at most 10 %, 5 fewer where by fivefold

Departures: loss_i, a mean over a device's examples, stands for the root of their mean square. Before a device
was first chosen, t is what the edge foresees. T is over the devices that can be reached now. Where all U are
equal the first term is zero. No device is barred for having been used often (off in FedScale too).
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.tables.wireless import SelectionConfig
from strategies.selection.base import Choice, Floats, Outcome, Places, Policy, RoundState
from strategies.selection.picks import nth, race, top


class Oort(Policy):
    """Remembers how long devices took (4 bytes each), the utility of forty rounds, eps and the percentile."""

    window: ClassVar[int] = 20  # rounds between two moves of the pacer

    def __init__(self, config: SelectionConfig, devices: int, seed: int) -> None:
        super().__init__(config, devices, seed)
        self.duration_s: Floats = np.zeros(devices, np.float32)  # 0: never chosen
        self.gained = np.zeros(2 * self.window)  # utility of the last rounds, oldest first
        self.rounds = 0
        self.eps, self.percentile = 0.9, 30.0

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        self.eps = max(0.98 * self.eps, 0.3)
        if len(state) <= state.wanted:
            return Choice(np.arange(len(state)))
        damp = self.damping(state)
        heard = state.loss < np.inf
        known, unknown = np.flatnonzero(heard), np.flatnonzero(~heard)
        explore = min(round(self.eps * state.wanted), len(unknown))
        exploit = min(state.wanted - explore, len(known))
        explore = state.wanted - exploit  # M > K: there are as many
        chosen = [self.exploited(state, known, damp, exploit, draw)]
        size = state.examples[unknown] * damp[unknown]
        largest = top(size, 5 * explore)
        chosen.append(unknown[largest[race(size[largest], explore, draw)]])
        return Choice(np.sort(np.concatenate(chosen)))

    def damping(self, state: RoundState) -> Floats:
        """Return min(1, T / t)^alpha (M,)."""
        took = self.duration_s[state.ids]
        np.copyto(took, state.time_s, where=took == 0.0)
        place = min(int(len(took) * self.percentile / 100.0), len(took) - 1)
        limit = min(nth(took, place), float(np.finfo(np.float32).max))
        ratio = np.minimum(np.float32(limit) / np.maximum(took, np.float32(1e-12)), np.float32(1.0))
        return np.asarray(ratio**self.config.penalty, np.float32)

    def exploited(
        self, state: RoundState, known: Places, damp: Floats, count: int, draw: np.random.Generator
    ) -> Places:
        """Return ``count`` of the ``known`` places, by utility."""
        if count == 0:
            return known[:0]
        utility: Floats = state.examples[known] * state.loss[known]
        high = np.float32(nth(utility, max(math.ceil(0.95 * len(known)) - 1, 0)))
        low = utility.min()
        score = np.minimum(utility, high)
        score -= low
        if high > low:
            score /= high - low
        last = np.maximum(state.last[known], 1).astype(np.float32)
        score += np.sqrt(np.float32(0.1 * math.log(state.number)) / last)
        score *= damp[known]
        pool = np.flatnonzero(score >= np.float32(0.95) * np.float32(nth(score, len(score) - count)))
        return known[pool[race(score[pool], count, draw)]]

    def feedback(self, outcome: Outcome) -> None:
        done = np.isfinite(outcome.time_s)  # who got no band, or was silent, has shown nothing
        self.duration_s[outcome.ids[done]] = outcome.time_s[done]
        came = outcome.arrived
        self.gained = np.roll(self.gained, -1)
        self.gained[-1] = float(outcome.examples[came] @ outcome.loss[came])
        self.rounds += 1
        if self.rounds >= 2 * self.window and self.rounds % self.window == 0:
            before, now = float(self.gained[: self.window].sum()), float(self.gained[self.window :].sum())
            if abs(now - before) <= 0.1 * before:
                self.percentile = min(self.percentile + 5.0, 100.0)
            elif abs(now - before) >= 5.0 * before:
                self.percentile = max(self.percentile - 5.0, 5.0)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "duration_s": self.duration_s.copy(),
            "gained": self.gained.copy(),
            "pace": np.array([self.rounds, self.eps, self.percentile], np.float64),
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        self.duration_s = state["duration_s"].astype(np.float32)
        self.gained = state["gained"].astype(np.float64)
        rounds, self.eps, self.percentile = state["pace"].tolist()
        self.rounds = int(rounds)
