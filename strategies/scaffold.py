"""SCAFFOLD's control variates, at the server: what a device said last time corrects for who is missing.

S. P. Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv:1910.06378.

    g   = sum_{k in S} n_k (g_k - c_k) / sum_{k in S} n_k + c
    c_k <- g_k for k in S,   c <- c + (1 / N) sum_{k in S} (g_k - c_k_old)

At one local step there is no drift to correct, and SCAFFOLD is variance reduction of the SAG and SAGA type
over devices (A. Defazio, F. Bach, S. Lacoste-Julien, arXiv:1407.0202): it helps when ``train.cohort`` leaves
devices out; with all of them, and batch sizes that stay, it is FedSGD. The gradients arise on the server, so
the variates live there too: N vectors of memory, and nothing crosses the air.

Departure: c is the mean of the c_k with the weights n_k, times the share of devices seen so far, which is the
paper's c where all weights are equal. With its plain mean, unequal devices would bias the direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector
from strategies.fedsgd_lora import FedSgdLora
from strategies.server_optimiser import Doubles


class Scaffold(FedSgdLora):
    """FedSGD on corrected gradients; the variates are float32, their weighted sum float64."""

    linear: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ("variates", "variate_weights", "variate_sum")

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        self.variates = np.zeros((len(devices), len(vector)), np.float32)  # c_k (N, p)
        self.variate_weights = np.zeros(len(devices))  # n_k when last heard, (N,)
        self.variate_sum: Doubles = np.zeros(len(vector))  # sum_k n_k c_k (p,)
        self.places = {device: place for place, device in enumerate(devices)}
        super().init(vector, devices, layout)

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        variate = self.variates[self.places[device]]
        super().fold(device, np.subtract(vector, variate, dtype=np.float64), weight)
        self.heard[device] = (vector.astype(np.float32), weight)

    def direction(self) -> Doubles:
        weight = float(self.variate_weights.sum())
        if weight == 0.0:
            return super().direction()
        seen = np.count_nonzero(self.variate_weights) / len(self.devices)
        return super().direction() + (seen / weight) * self.variate_sum

    def step(self) -> None:
        heard = self.heard
        super().step()
        for device, (gradient, weight) in heard.items():
            place = self.places[device]
            # The stored float32 enters and leaves the sum, so that nothing is left behind.
            self.variate_sum += weight * gradient.astype(np.float64)
            self.variate_sum -= self.variate_weights[place] * self.variates[place].astype(np.float64)
            self.variates[place], self.variate_weights[place] = gradient, weight

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self.copied(super().state())

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        super().load(self.copied(state))

    def copied(self, state: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Return ``state`` with copies of the variates, which change in place."""
        return {**state, **{name: state[name].copy() for name in self.state_names}}

    def clear(self) -> None:
        super().clear()
        self.heard: dict[int, tuple[Vector, float]] = {}
