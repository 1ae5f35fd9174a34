"""A large model in three modules: embedding (device) | backbone + LoRA (edge server) | head (device).

    tokens, side = embedding(x)        x: task input         tokens: (B, S, D) crosses the first cut
    output = head(backbone(tokens), side)                    (B, S, D) crosses the second cut

Samples of unlike lengths cross as :class:`Tokens`, packed, and only the rows that the head needs return.
``side`` is whatever the device keeps for its own head (skip features, scales, an anchor forecast): it never
crosses a cut, and depends on nothing that trains. Source: the cut of "Edge Large AI Models",
arXiv:2505.00321, section III.
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


def pad(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed tokens (N, D) as (B, S, D) with zeros behind, and the mask (B, S) of what is real."""
    mask = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]  # (B, S)
    padded = values.new_zeros(*mask.shape, values.shape[-1])
    padded[mask] = values
    return padded, mask


def select(outputs: Tensor, tokens: Tokens) -> Tensor:
    """Return what the head needs of packed outputs (N, D): the rows asked for (R, D), or means (B, D)."""
    if tokens.rows is not None:
        return outputs[tokens.rows]
    sample = torch.repeat_interleave(tokens.lengths)  # (N,)
    total = outputs.new_zeros(len(tokens.lengths), outputs.shape[-1]).index_add(0, sample, outputs)
    return total / tokens.lengths[:, None]


def flat(tokens: Tensor | Tokens) -> Tokens:
    """Return tokens as they cross: samples of one length (B, S, D) packed, with every row of use."""
    if isinstance(tokens, Tokens):
        return tokens
    samples, length, width = tokens.shape
    lengths = torch.full((samples,), length, dtype=torch.int64, device=tokens.device)
    rows = torch.arange(samples * length, device=tokens.device)
    return Tokens(tokens.reshape(-1, width), lengths, rows)


def rows_of(tokens: Tokens) -> Tensor:
    """Return how many rows of the backbone's output each sample's head needs, (B,)."""
    if tokens.rows is None:
        return torch.ones_like(tokens.lengths)
    sample = torch.searchsorted(tokens.lengths.cumsum(0), tokens.rows, right=True)
    return torch.bincount(sample, minlength=len(tokens.lengths))


def tail_rows(lengths: Tensor, tails: Tensor) -> Tensor:
    """Return the last ``tails[i]`` rows of each of B packed samples, (sum of tails,)."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - tails, tails)  # (R,)
    first = torch.repeat_interleave(tails.cumsum(0) - tails, tails)
    return starts + torch.arange(int(tails.sum()), device=lengths.device) - first


class SplitModel(nn.Module):
    """``forward = head(backbone(embedding(x)))``; what has ``requires_grad`` trains and travels."""

    def __init__(self, embedding: nn.Module, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.backbone = backbone
        self.head = head

    def forward(self, x: Any) -> Tensor:
        """Map a task input to the task output; shapes are the task's."""
        tokens, side = self.embedding(x)  # (B, S, D), or Tokens
        return self.head(self.backbone(tokens), side)

    @property
    def crossing(self) -> int:
        """Numbers that cross the first cut for one token: the backbone's width, or fewer if projected."""
        return int(getattr(self.embedding, "dimensions", self.backbone.width))  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the model lives: inputs go there."""
        return next(self.parameters()).device

    def device_side(self) -> dict[str, nn.Parameter]:
        """Return what trains on the device, embedding and head, in the order of :meth:`trainable`."""
        return {name: p for name, p in self.trainable().items() if not name.startswith("backbone.")}

    def server_side(self) -> dict[str, nn.Parameter]:
        """Return what trains on the edge server, by name, in the order of :meth:`trainable`."""
        return {name: p for name, p in self.trainable().items() if name.startswith("backbone.")}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name: exactly what travels, in the order it is packed."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trainable_share(self) -> float:
        """Return trainable / all parameters. Backbones here carry no unused token embeddings."""
        return sum(p.numel() for p in self.trainable().values()) / sum(p.numel() for p in self.parameters())
