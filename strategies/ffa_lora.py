"""FFA-LoRA: A stays as the seed drew it, so that averaging is exact.

"FFA-LoRA", ICLR 2024, arXiv:2403.12313.

    A fixed,  B <- sum_k p_k B_k,  p_k = n_k / sum n      so that  B A = sum_k p_k B_k A

Every device has the same A, and the mean of the products is the product of the means. The price is
capacity: the update can only ever live in the row space of A.

Departure: device modules that are not LoRA are trained and averaged too.
Bytes: the factor A never travels up: r d a linear instead of r (d + l), about half; down the whole vector.
"""

from __future__ import annotations

from strategies.algorithm import Plan
from strategies.fedavg_lora import FedAvgLora


class FfaLora(FedAvgLora):
    """FedAvg of B and of what is not LoRA; A comes back as it was sent, so its mean is itself."""

    lora = True

    def plan(self, number: int) -> Plan:
        return Plan(trains="b+other", returns="b+other")
