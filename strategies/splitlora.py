"""SplitLoRA's server, sequential: one server step after every device, in the order of the devices.

Z. Lin et al., "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models", 2024,
arXiv:2407.00952. This is the loop of its released code, as a baseline: each device's batch is a mini-batch of
its own to the server's optimiser, so there is no averaging, no batch across devices, and the result depends
on their order.

    for k in cohort:  w <- Optimiser(w, g_k(w))

Departures: batch sizes play no part, as there; the rate is that of the step for all of its devices. The cut
and the device's modules are the same as for every other rule (see ``split``).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedlam_app.base.vectors import Vector
from strategies.fedsgd_lora import FedSgdLora


class SplitLora(FedSgdLora):
    """Every fold is a server step: gradients must be taken one device at a time, at the newest model."""

    linear: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self.descend(vector.astype(np.float64))
