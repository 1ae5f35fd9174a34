"""RoLoRA: the factors take turns, so that every round's average is exact and both are learned.

"RoLoRA", NeurIPS 2025.

    odd rounds:   A fixed,  B <- sum_k p_k B_k        even rounds:  B fixed,  A <- sum_k p_k A_k

One factor is common to all devices in any round, hence B A = sum_k p_k B_k A_k at its end. B goes
first: it starts at zero, where A has no gradient.

Departure: device modules that are not LoRA are trained and averaged in every round.
Bytes: one factor up: r d or r l a linear instead of r (d + l), about half; down the whole vector.
"""

from __future__ import annotations

from strategies.algorithm import Plan
from strategies.fedavg_lora import FedAvgLora


class RoLora(FedAvgLora):
    """FedAvg of one factor at a time; the other comes back as it was sent."""

    lora = True

    def plan(self, number: int) -> Plan:
        parts = "b+other" if number % 2 else "a+other"
        return Plan(trains=parts, returns=parts)
