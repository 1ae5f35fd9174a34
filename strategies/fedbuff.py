"""FedBuff: the server steps as soon as a few gradients are there, however old the model they were taken at.

J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639.

    g = sum_{k in buffer} n_k s(j_k) g_k(w_{t - j_k}) / sum_{k in buffer} n_k,   s(j) = 1 / sqrt(1 + j)

The rule is FedSGD's. Who is at work and when is said by ``buffered.py``, on the wireless fleet by
``concurrent.py``; which model a device began with, and s(j), by ``versions.py``.
"""

from __future__ import annotations

from typing import ClassVar

from strategies.fedsgd_lora import FedSgdLora


class FedBuff(FedSgdLora):
    """FedSGD that waits for no one; each gradient ages on its own, so a sum over the air is too little."""

    linear: ClassVar[bool] = False
    waits: ClassVar[bool] = False
