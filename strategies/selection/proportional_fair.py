"""Proportional fair: the K devices whose channel is best for what it is on average.

H. H. Yang et al., "Scheduling Policies for Federated Learning in Wireless Networks", arXiv:1908.06287.

    r = bits / upload time [bit/s]        now, at an equal share of the band
    score = r / r_mean                    r_mean <- (1 - 1/tau) r_mean + r / tau,  tau = ``selection.memory``

Departures: r_mean moves in the rounds in which a device can be reached, and starts at the first rate (a score
of one). Scores within 1e-4 (0.0004 dB) of the K-th are drawn by lot: where channels stand still all scores
are one but for rounding, and the same devices would win every round.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.tables.wireless import SelectionConfig
from strategies.selection.base import Choice, Floats, Places, Policy, RoundState
from strategies.selection.picks import evenly, nth

BLOCK = 8192  # devices at a time: what is between stays in the cache


class ProportionalFair(Policy):
    """Remembers the mean rate of every device; 4 bytes each."""

    level: ClassVar[float] = 1e-4

    def __init__(self, config: SelectionConfig, devices: int, seed: int) -> None:
        super().__init__(config, devices, seed)
        self.mean_bps: Floats = np.zeros(devices, np.float32)  # 0: never reached

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        score: Floats = np.empty(len(state), np.float32)
        for start in range(0, len(state), BLOCK):
            here = slice(start, start + BLOCK)
            ids = state.ids[here]
            rate = state.bits[here] / state.upload_s[here]
            mean = self.mean_bps[ids]
            np.copyto(mean, rate, where=mean == 0.0)
            np.divide(rate, np.maximum(mean, np.float32(1e-30)), out=score[here])
            rate -= mean
            rate *= np.float32(1.0 / self.config.memory)
            mean += rate
            self.mean_bps[ids] = mean
        return Choice(self.drawn(score, state.wanted, draw))

    def drawn(self, score: Floats, wanted: int, draw: np.random.Generator) -> Places:
        """Return the places (k,) of the largest scores (M,); who is level with the last is drawn by lot."""
        if not 0 < wanted < len(score):
            return np.arange(min(wanted, len(score)))
        last = nth(score, len(score) - wanted)
        high, low = np.float32(last * (1.0 + self.level)), np.float32(last * (1.0 - self.level))
        sure = np.flatnonzero(score > high)
        level = np.flatnonzero((score >= low) & (score <= high))
        return np.sort(np.concatenate([sure, level[evenly(len(level), wanted - len(sure), draw)]]))

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {"mean_bps": self.mean_bps.copy()}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        self.mean_bps = state["mean_bps"].astype(np.float32)
