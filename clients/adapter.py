"""Device work on whole models: train from an adapter vector, or score one.

The model is resident: one per process and experiment, built once, its trainable parameters
overwritten by the vector that arrives. Frozen weights never travel.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from clients.loop import local_steps
from fedlam_app.base.keys import seed_of
from fedlam_app.base.vectors import Vector, pack, unpack
from fedlam_app.config import RunConfig
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks.base import Task


class Worker:
    """One experiment's task and resident model, serving any of its devices."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self.config = config
        self.task = task
        self.model: SplitModel = task.build_model().to(torch_device(config.device))
        self.parameters = list(self.model.trainable().values())

    def train(self, vector: Vector, device: int, round: int) -> tuple[Vector, float]:
        """Return the device's vector (p,) after its local steps, and their mean loss."""
        unpack(vector, self.parameters)
        self.model.train()
        # Dropout is the one draw that torch makes by itself: key it too.
        torch.manual_seed(seed_of(self.config.seed, "dropout", device, round))
        mean_loss = local_steps(
            lambda step: self.task.loss(self.model, self.task.batch(device, round, step)),
            self.parameters,
            self.config.train,
            round,
        )
        return pack(self.parameters), mean_loss

    def evaluate(self, vector: Vector, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Return the task's sums a user of one evaluation chunk, (users, columns)."""
        unpack(vector, self.parameters)
        self.model.eval()
        return self.task.evaluate(self.model, chunk, antennas)


def torch_device(name: str) -> torch.device:
    """Return the device that 'auto', 'cpu' or 'cuda' means here; 'cuda' without one is a ``ValueError``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds no CUDA device here; use 'auto' or 'cpu'")
    wanted = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wanted else "cpu")
