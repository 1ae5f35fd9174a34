"""HetLoRA: unlike ranks by zero-padding, and a device counts as much as its update is large.

Cho et al., "HetLoRA", EMNLP 2024, arXiv:2401.06432.

    A <- sum_k w_k pad(A_k),   B <- sum_k w_k pad(B_k),      w_k ∝ ||B_k A_k||_F

and device k is sent the first r_k components. The norm makes up for what the zeros of a small rank would
take away from the components that it has not. Here it is the sum of the norms over all linears: one
weight a device, and the numbers of examples do not enter it. Where every product is zero (no step has
moved B yet), examples weigh.

Not exact: factors are averaged apart, as in FedIT, and truncation loses what lies past a rank.
Departures: no self-pruning, so ranks are constant; what is not LoRA is averaged by examples; components
that no device of a cohort has stay as they were, for zeros in both factors would never train again.
Bytes: r_k (d + l) a linear, up and down.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector, WeightedMean
from strategies.fedavg_lora import FedAvgLora


class HetLora(FedAvgLora):
    """FedAvg whose LoRA part is weighted by the size of the products."""

    lora = True
    linear = False  # a device's weight is the norm of its own products
    unlike_ranks = True

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(vector, devices, layout)
        self._by_norm, self._largest = WeightedMean(), 0

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        super().fold(device, vector, weight)
        self._largest = max(self._largest, self.rank(device))
        self._by_norm.add(vector, update_norm(vector, self.layout))

    def step(self) -> None:
        former = self.vector
        super().step()
        if self._by_norm.weight:
            lora = self.layout.part("a+b")
            self.vector[lora] = self._by_norm.value()[lora]
        self.vector = np.where(self.layout.within(self._largest), self.vector, former)
        self._by_norm, self._largest = WeightedMean(), 0


def update_norm(vector: Vector, layout: Layout) -> float:
    """Return the sum over the pairs of ||B A||_F, from r x r matrices: ||BA||^2 = <B^T B, A A^T>."""
    total = 0.0
    for a, b in layout.factors(vector.astype(np.float64)):
        squared = float(np.sum((b.T @ b) * (a @ a.T)))
        total += max(squared, 0.0) ** 0.5  # rounding may leave -1e-17
    return total
