"""FedProx: FedAvg whose devices are tied to where they started, against drift on unlike data.

"FedProx", arXiv:1812.06127.

    v_k = argmin_v  F_k(v) + mu/2 ||v - v_t||^2  (by train.local-steps steps),   v_{t+1} = sum_k p_k v_k

mu is ``train.proximal-mu``; mu = 0 is FedAvg. With one local step the term has no gradient at all, since
the device stands where it started: the rule differs from FedAvg only from the second step on.

Departure: the term is on the LoRA factors, not on their products; the paper has no adapters.
Bytes: as FedAvg, 4 p up and 4 p down.
"""

from __future__ import annotations

from strategies.algorithm import Plan
from strategies.fedavg_lora import FedAvgLora


class FedProx(FedAvgLora):
    """FedAvg with a proximal term in what the devices minimise."""

    def plan(self, number: int) -> Plan:
        return Plan(proximal=self.config.train.proximal_mu)
