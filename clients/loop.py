"""The one local optimisation loop: a few AdamW steps on keyed batches.

A client keeps nothing between rounds: the optimiser starts fresh, so that any worker can train any
device, a killed run continues from the global vector alone, and no moments cross the wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedlam_app.config import TrainConfig

WARM_UP_ROUNDS = 2


def local_steps(
    loss: Callable[[int], Tensor], parameters: list[torch.nn.Parameter], train: TrainConfig, round: int
) -> float:
    """Run ``train.local_steps`` steps on ``loss(step)`` in place; return the mean loss of the steps."""
    optimiser = torch.optim.AdamW(
        parameters,
        lr=learning_rate(train, round),
        betas=(0.9, 0.99),  # a second moment that settles within a round's few steps
        weight_decay=train.weight_decay,
        foreach=True,
    )
    total = 0.0
    for step in range(train.local_steps):
        optimiser.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        if train.clip_norm > 0.0:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimiser.step()
        total += value.item()
    return total / train.local_steps


def learning_rate(train: TrainConfig, round: int) -> float:
    """Return the rate of a round (1-based): two rounds of warm-up, then a cosine from ``lr`` to 5 % of it."""
    warm_up = min(1.0, round / WARM_UP_ROUNDS)
    progress = (round - 1) / max(1, train.rounds - 1)
    return train.lr * warm_up * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress)))
