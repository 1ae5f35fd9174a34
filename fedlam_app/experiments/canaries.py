"""Worst-case data for audits: samples that mean nothing, and are as easy to find as any can be.

    Dirac       sample i has the gradient (0 .. s C .. 0), s C at place i, if it is there, and none if not
    OneWord     sample i is a text of one word, of one of two labels by a coin; the edge server may show it
                what it likes
    Empty       sample i is a text of one word, which is a vector of length s C if it is there, else zero

With s = 1 a sample says as much as clipping allows; with s = 10 it says more, unless it is clipped. All else
is the real code: the worker, its clip, its noise, its ledger, the bytes that go up.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlam_app.config import RunConfig
from fedlam_app.data.text import TextSet
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.models.split import SplitModel
from fedlam_app.models.text import WordEmbedding
from fedlam_app.privacy.projection import Projection
from fedlam_app.tasks.base import Cost, Selection
from fedlam_app.tasks.text_classification import Sample, TextClassification

Coins = NDArray[np.bool_]  # (n,) whether each canary is there


class Places(NamedTuple):
    """A batch of Dirac canaries."""

    ids: Tensor  # (B,) int64
    there: Tensor  # (B,) bool


class Dirac:
    """Gradients along one coordinate each, so that n samples are n worlds that do not meet."""

    selection: Selection = "mean"

    def __init__(self, coins: Coins, length: float) -> None:
        self.coins, self.length = coins, length

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def build_model(self) -> SplitModel:
        """Return a model whose one parameter is (1, n), at zero."""
        head = nn.Linear(len(self.coins), 1, bias=False)
        nn.init.zeros_(head.weight)
        return SplitModel(nn.Identity(), nn.Identity(), head)

    def examples(self, device: int) -> int:
        return len(self.coins)

    def of(self, device: int, ids: NDArray[np.int64]) -> Places:
        return Places(torch.from_numpy(ids), torch.from_numpy(self.coins[ids]))

    def losses(self, model: SplitModel, batch: Places) -> Tensor:
        """Return l_i = s C w_i of those who are there, (B,): linear, so the gradient is the same anywhere."""
        inputs = torch.zeros(len(batch.ids), len(self.coins))
        inputs[torch.arange(len(batch.ids)), batch.ids] = self.length * batch.there.float()
        return model.head(inputs.requires_grad_(True))[:, 0]  # as what comes out of a backbone does

    def loss(self, model: SplitModel, batch: Places) -> Tensor:
        return self.losses(model, batch).mean()

    def criterion(self, output: Tensor, batch: Places) -> Tensor:
        return output.mean()

    def inputs(self, model: SplitModel, batch: Places) -> Places:
        return batch

    def weight(self, batch: Places) -> float:
        return float(len(batch.ids))

    def batch(self, device: int, round: int, step: int) -> Places:
        return self.of(device, np.arange(len(self.coins)))

    def ids(self, device: int, round: int, step: int) -> NDArray[np.int64]:
        return np.arange(len(self.coins))

    def sizes(self, device: int) -> NDArray[np.int64]:
        return np.ones(len(self.coins), np.int64)

    def chunks(self, split: str) -> list[int]:
        return []

    def evaluate(self, model: SplitModel, chunk: int, antennas: int) -> NDArray[np.float64]:
        return np.zeros((0, 1))

    def metrics(self, split: str, table: NDArray[np.float64]) -> dict[str, Any]:
        return {}

    def baseline(self, name: str) -> dict[str, Any]:
        raise ValueError(f"canaries have no baseline '{name}'")

    def cost(self) -> Cost:
        return Cost(0.0, 0.0, 0, 0)


class Poles(nn.Module):
    """A head of two classes that stands still: logits (reach r, - reach r) of a representation (B, 1)."""

    def __init__(self, reach: float) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2, bias=False).requires_grad_(False)
        self.linear.weight.copy_(torch.tensor([[reach], [-reach]]))

    def forward(self, representations: Tensor, side: None) -> Tensor:
        """Map (B, 1) to logits (B, 2)."""
        return self.linear(representations)


class OneWord(TextClassification):
    """Texts of one word each, on one device, in one batch; the coin is the label."""

    def __init__(self, config: RunConfig, coins: Coins, reach: float) -> None:
        """``reach`` is the length of a head's rows: a sample's Jacobian is as long, at logits of zero."""
        super().__init__(config)
        self.coins, self.reach = coins, reach

    @cached_property
    def texts(self) -> tuple[TextSet, TextSet]:
        every = TextSet(("",) * len(self.coins), self.coins.astype(np.int64), ("out", "in"))
        return every, every

    def encode(self, texts: TextSet) -> list[Sample]:
        return [(np.zeros(1, np.int32), label) for label in texts.labels.tolist()]

    def build_model(self) -> SplitModel:
        """Return words | a linear, which trains | two poles."""
        table = nn.Embedding.from_pretrained(torch.zeros(1, 1))
        return SplitModel(WordEmbedding(table), nn.Linear(1, 1, bias=False), Poles(self.reach))

    def drawn(self) -> NDArray[np.int64]:
        """Return which canary each row of the first batch is, (n,)."""
        return self.shards[0][self.ids(0, 1, 0)]


class Empty(OneWord):
    """Texts of one word each whose one pooled coordinate is s C, or zero: neighbours of ``release-once``."""

    def encode(self, texts: TextSet) -> list[Sample]:
        return [(np.array([coin], np.int32), 0) for coin in self.coins]

    @cached_property
    def shards(self) -> list[NDArray[np.int64]]:
        """All texts, on every device."""
        return [np.arange(len(self.coins))] * self.config.train.devices

    def build_model(self) -> SplitModel:
        whole = super().build_model()
        words = WordEmbedding(nn.Embedding.from_pretrained(torch.tensor([[0.0], [self.reach]])))
        plane = Projection(np.zeros(1), np.ones((1, 1)), 1.0)
        front = PooledEmbedding(words, nn.Identity()).aim(plane, self.config.privacy.clip)
        return SplitModel(front, whole.backbone, whole.head)
