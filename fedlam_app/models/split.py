"""A large model in three modules: embedding (device) | backbone + LoRA (edge server) | head (device).

    tokens, side = embedding(x)        x: task input         tokens: (B, S, D) crosses the first cut
    output = head(backbone(tokens), side)                    (B, S, D) crosses the second cut

``side`` is whatever the device keeps for its own head (skip features, scales, an anchor forecast):
it never crosses a cut. Source: the cut of "Edge Large AI Models", arXiv:2505.00321, section III.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What crosses the first cut, without padding: the tokens of B samples, one sample after the other."""

    values: Tensor  # (N, D), N = sum of lengths
    lengths: Tensor  # (B,) int64, at least 1
    rows: Tensor | None = None  # (R,) int64: outputs that the head needs; None: each sample's mean


class SplitModel(nn.Module):
    """``forward = head(backbone(embedding(x)))``; what has ``requires_grad`` trains and travels."""

    def __init__(self, embedding: nn.Module, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.head = head

    def forward(self, x: Any) -> Tensor:
        """Map a task input to the task output; shapes are the task's."""
        tokens, side = self.embedding(x)  # (B, S, D)
        return self.head(self.backbone(tokens), side)

    @property
    def device(self) -> torch.device:
        """Where the model lives: inputs go there."""
        return next(self.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name: exactly what travels, in the order it is packed."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trainable_share(self) -> float:
        """Return trainable / all parameters. Backbones here carry no unused token embeddings."""
        return sum(p.numel() for p in self.trainable().values()) / sum(p.numel() for p in self.parameters())
