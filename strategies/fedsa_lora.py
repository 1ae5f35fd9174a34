"""FedSA-LoRA: A is shared and B is personal.

"FedSA-LoRA", ICLR 2025, arXiv:2410.01463.

    A <- sum_k p_k A_k,      device k's update is  s B_k A  with its own B_k

There is no global update to be exact about. A device that joins late starts from the seed's B, zero.

Departures: device modules that are not LoRA are averaged like A; the global model that ``models()``
returns has the B that every device started from, so it must be judged on the devices, with theirs.
Bytes: r l a linear up instead of r (d + l), about half; B never travels up.
"""

from __future__ import annotations

from strategies.algorithm import Plan
from strategies.fedavg_lora import FedAvgLora


class FedSaLora(FedAvgLora):
    """FedAvg of A and of what is not LoRA; B stays where it was trained."""

    lora = True

    def plan(self, number: int) -> Plan:
        return Plan(returns="a+other", keeps="b")
