"""The one local optimisation loop: a few steps of AdamW, or of plain gradient descent, on keyed batches.

A client keeps nothing between rounds: the optimiser starts fresh, so that any worker can train any
device, a killed run continues from the global vector alone, and no moments cross the wire.

With mu > 0 every step also pulls back to where the round began, w_t: FedProx (Li et al., MLSys 2020,
arXiv:1812.06127), loss + mu/2 ||w - w_t||^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlam_app.base.schedule import learning_rate
from fedlam_app.config import TrainConfig


def local_steps(
    loss: Callable[[int], Tensor | None],
    parameters: list[torch.nn.Parameter],
    train: TrainConfig,
    round: int,
    steps: int,
    *,
    proximal: float = 0.0,
    before_step: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Run ``steps`` steps on ``loss(step)`` in place; return the mean loss of the steps.

    A loss of ``None`` is an empty batch: no step. ``before_step`` and ``after_step`` stand around the
    optimiser's, for parameters that are not the model's own.
    """
    optimiser = optimiser_of(parameters, train, learning_rate(train.lr, train.rounds, round))
    start = [p.detach().clone() for p in parameters] if proximal else []
    losses = []
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        value = loss(step)
        if value is None:
            continue
        value.backward()
        before_step()
        for p, origin in zip(parameters, start, strict=False):
            if p.grad is not None:
                p.grad.add_(p.detach() - origin, alpha=proximal)
        if train.clip_norm > 0.0:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimiser.step()
        after_step()
        losses.append(value.item())
    return sum(losses) / max(1, len(losses))


def optimiser_of(
    parameters: list[torch.nn.Parameter], train: TrainConfig, rate: float
) -> torch.optim.Optimizer:
    """Return the optimiser that ``train.optimiser`` names; in both the weights decay by rate x decay."""
    decay = train.weight_decay
    if train.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, foreach=True)
    # A second moment that settles within a round's few steps.
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, foreach=True)
