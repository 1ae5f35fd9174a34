"""Text models, cut in three: word embeddings (device) | transformer + LoRA (edge server) | head (device).

The embedding module is the backbone's own word table, frozen; positions are added on the server, so that a
word is the same vector wherever it stands. A language model's head is that table again (tied), frozen too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedlam_app.base.keys import rng
from fedlam_app.models.split import Tokens


class Texts(NamedTuple):
    """A batch of B texts, one after the other."""

    ids: Tensor  # (N,) int64 token ids
    lengths: Tensor  # (B,) int64
    rows: Tensor | None  # (R,) outputs that the head needs; None: each text's mean

    def to(self, device: torch.device) -> Texts:
        """Return the same texts on a device."""
        rows = None if self.rows is None else self.rows.to(device)
        return Texts(self.ids.to(device), self.lengths.to(device), rows)


class WordEmbedding(nn.Module):
    """Device side: token ids to their vectors."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, texts: Texts) -> tuple[Tokens, None]:
        """Map N ids to tokens (N, D); nothing stays behind for the head."""
        return Tokens(self.table(texts.ids), texts.lengths, texts.rows), None


class Classifier(nn.Module):
    """Device side: representations (R, D) to the logits of C classes.

    It starts as a simplex: C directions of length one, as far from each other as can be. A frozen head of
    this kind is a fixed target that LoRA learns to meet (Pernici et al., 2021, arXiv:2103.15632).
    """

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        directions, _ = torch.linalg.qr(
            torch.from_numpy(rng(seed, "head").standard_normal((width, classes)))
        )  # (D, C) orthonormal
        simplex = directions - directions.mean(1, keepdim=True)
        self.linear = nn.utils.skip_init(nn.Linear, width, classes)  # a layer that Opacus knows
        with torch.no_grad():
            self.linear.weight.copy_((simplex / simplex.norm(dim=0)).T)  # (C, D)
            self.linear.bias.zero_()

    def forward(self, representations: Tensor, side: None) -> Tensor:
        """Map (R, D) to logits (R, C)."""
        return self.linear(representations)


class LanguageHead(nn.Module):
    """Device side: representations (R, D) to the logits of the next token, by the frozen word table."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, representations: Tensor, side: None) -> Tensor:
        """Map (R, D) to logits (R, V)."""
        return representations @ self.table.weight.T
