"""FedAvg on what trains: the weighted mean of the adapters.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas, "Communication-Efficient Learning
of Deep Networks from Decentralized Data", AISTATS 2017, arXiv:1602.05629, algorithm 1; on LoRA
adapters: J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT),
ICASSP 2024, arXiv:2305.05644.

    v_{t+1} = sum_k n_k v_{t+1}^k / sum_k n_k

Departure: mean(B) mean(A) differs from mean(BA); this rule averages the factors, as FedIT does.
Bytes: 4 p up and 4 p down for each device and round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector, WeightedMean
from strategies.algorithm import Algorithm


class FedAvgLora(Algorithm):
    """One global vector; a round is its weighted mean over the devices that replied."""

    linear: ClassVar[bool] = True

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(vector, devices, layout)
        self._mean = WeightedMean()

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self._mean.add(vector, weight)

    def fold_sum(self, total: NDArray[np.float64], weight: float) -> None:
        self._mean.add_sum(total, weight, self.vector.dtype)

    def step(self) -> None:
        self.vector, self._mean = self._mean.value(), WeightedMean()
