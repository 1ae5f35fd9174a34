"""A perceptron of two layers as a ``SplitModel`` without a backbone: for tasks that are about many devices.

    embedding  h = max(0, W1 x + b1)        backbone  h        head  W2 h + b2

Nothing stands on the edge server, and everything trains: d H + H + H C + C parameters. W and b start uniform
within +- 1 / sqrt(inputs), torch's own start of a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedlam_app.base.keys import seed_of
from fedlam_app.models.split import SplitModel


class Hidden(nn.Module):
    """Features (B, d) to hidden units (B, H)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Map (B, d) to (B, H); nothing stays behind for the head."""
        return torch.relu(self.linear(x)), None


class Logits(nn.Module):
    """Hidden units (B, H) to the logits of C classes (B, C)."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, side: None) -> Tensor:
        """Map (B, H) to (B, C)."""
        return self.linear(h)


def mlp(features: int, hidden: int, classes: int, seed: int) -> SplitModel:
    """Return the perceptron (B, d) -> (B, C): the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        return SplitModel(Hidden(features, hidden), nn.Identity(), Logits(hidden, classes))


def flops(features: int, hidden: int, classes: int) -> float:
    """Return the FLOPs of one example forward: two a weight, the bias being one of a row's d additions."""
    return 2.0 * hidden * (features + classes)
