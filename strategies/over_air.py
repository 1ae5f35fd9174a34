"""Over the air: the devices send at once, and the server hears their sum, with noise.

The arithmetic and its sources are those of ``wireless/air.py``. What a device sends is its update, the vector
less where it began (its gradient, in gradient space), so that silence and noise move a model around where it
is: of that, the parts that the rule has returned, so that a factor that stays is not touched. Only rules that
average can do with a sum (``Algorithm.linear``). The simulator keeps the updates of a turn, (K, p), because
their means and deviations go over the side channel.

Where devices were drawn with unlike chances, what is heard is not divided by its own weights but by those of
everybody (``reception.Summed``), the chance of silence included. In gradient space the sum is that of the
LoRA gradients; that the edge server makes them from Jacobians, which no sum can stand for, is left out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.vectors import Vector
from fedlam_app.config import WirelessConfig
from fedlam_app.wireless.air import Air, common_std, inversion, least_error, received, truncated_inversion
from strategies.algorithm import Algorithm
from strategies.participation import Turn
from strategies.reception import Doubles, Straight

Snr = NDArray[np.float64]


def heard(wireless: WirelessConfig, snr: Snr, mean_snr: Snr) -> NDArray[np.bool_]:
    """Return who sends at all (k,): in a deep fade, truncated inversion is silent."""
    if wireless.air == "truncated":
        return snr >= wireless.air_threshold * mean_snr
    return snr > 0.0


def on_air(wireless: WirelessConfig, snr: Snr, mean_snr: Snr, weights: Doubles) -> Air:
    """Return what the air does to devices of these SNRs a symbol (k,), faded and mean, by the power rule."""
    if wireless.air == "truncated":
        return truncated_inversion(snr, weights, 1.0, 1.0, wireless.air_threshold, mean_snr)
    return (least_error if wireless.air == "least-error" else inversion)(snr, weights, 1.0, 1.0)


class OverAir(Straight):
    """The rule gets one result: what was received."""

    apart: ClassVar[bool] = True

    def __init__(self, algorithm: Algorithm, wireless: WirelessConfig, seed: int) -> None:
        super().__init__(algorithm)
        self.wireless, self.seed = wireless, seed

    def begin(self, turn: Turn) -> None:
        self.places = {k: place for place, k in enumerate(turn.ids)}
        self.turn, self.sent = turn, list[tuple[int, NDArray[Any], float]]()
        adapter = self.algorithm.space == "adapter"
        self.start = self.algorithm.models()[0].astype(np.float64) if adapter else 0.0

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self.sent.append((device, vector - self.start, weight))

    def end(self, number: int) -> None:
        if not self.sent:
            return
        devices, rows, shares = zip(*self.sent, strict=True)
        updates, weights = np.stack(rows).astype(np.float64), np.array(shares)  # (k, p), (k,)
        travels = self._travels(number)
        updates = updates[:, travels]
        own = [self.places[k] for k in devices]
        snr, mean_snr = np.array(self.turn.snr)[own], np.array(self.turn.mean_snr)[own]
        air = on_air(self.wireless, snr, mean_snr, weights)
        total = (air.theta * air.weights) @ updates
        std = common_std(updates.std(axis=1), weights)
        draw = rng(self.seed, "receiver", number)
        update = np.zeros(len(travels))
        base = self.turn.base or float(weights.sum())
        update[travels] = received(total, air, updates.mean(axis=1), std, draw) * (weights.sum() / base)
        vector = (self.start + update).astype(self.algorithm.models().dtype)
        self.algorithm.fold(devices[0], vector, base)

    def _travels(self, number: int) -> NDArray[np.bool_]:
        """Return the mask (p,) of what devices send in a round."""
        algorithm = self.algorithm
        if algorithm.space == "gradient":
            return np.ones(algorithm.layout.size, bool)
        return algorithm.layout.part(algorithm.plan(number).returns)
