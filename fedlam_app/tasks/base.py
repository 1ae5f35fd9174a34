"""The contract of a task: what is learned, from which data, and how it is scored.

A task supplies the three modules of a ``SplitModel``, its data, its loss and its metrics. A strategy
decides where each module runs and what is averaged; so any task runs under any strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlam_app.models.split import SplitModel

Selection = Literal["all", "mean", "first", "last", "tail"]
"""Which outputs of the backbone a head needs: every row; a sample's mean, first or last; its last few."""


@dataclass(frozen=True)
class Cost:
    """What one sample costs at the cuts, for the wireless model and for planning."""

    flops_device: float  # embedding and head, forward
    flops_server: float  # backbone, forward
    elements_embedding: int  # elements that cross the first cut
    elements_representation: int  # ... and the second


class Task(Protocol):
    """One learning problem over devices; everything random in it is keyed by the run's seed."""

    selection: Selection

    def prepare(self) -> None:
        """Make what takes long and is cached (channels, weights), once, before any worker asks for it."""

    def build_model(self) -> SplitModel:
        """Return the initial model: the same on every call, in every process."""

    def batch(self, device: int, round: int, step: int) -> Any:
        """Return the training batch of a device at a local step (0-based) of a round (1-based)."""

    def ids(self, device: int, round: int, step: int) -> NDArray[np.int64] | None:
        """Return which of its samples that batch holds, or ``None`` where no batch is ever seen twice."""

    def of(self, device: int, ids: NDArray[np.int64]) -> Any:
        """Return samples of a device by their ids as a batch; only tasks whose batches have ids have it."""

    def inputs(self, model: SplitModel, batch: Any) -> Any:
        """Return what the embedding takes, where the model lives."""

    def criterion(self, output: Tensor, batch: Any) -> Tensor:
        """Return the scalar training loss of a batch from the head's output."""

    def weight(self, batch: Any) -> float:
        """Return the batch's weight: the pooled batch's loss is the weighted mean of its parts' losses."""

    def loss(self, model: SplitModel, batch: Any) -> Tensor:
        """Return the scalar training loss of a batch."""

    def losses(self, model: SplitModel, batch: Any) -> Tensor:
        """Return the loss of each of a batch's samples (B,), none of which depends on another; as ``of``."""

    def sizes(self, device: int) -> NDArray[np.int64]:
        """Return how much of a batch each of a device's samples takes (n,): its tokens, or 1; as ``of``."""

    def examples(self, device: int) -> int:
        """Return how many training examples a device has: its weight in the mean."""

    def chunks(self, split: str) -> list[int]:
        """Return the ids of the evaluation chunks of 'train' (the union of all shards) or 'test'."""

    def evaluate(self, model: SplitModel, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Return the sums that metrics are made of, a row a user or text: (users, columns)."""

    def metrics(self, split: str, table: NDArray[np.float64]) -> dict[str, Any]:
        """Return the metrics of a split from the rows of all its chunks, in order."""

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the metrics of a predictor that is not federated, on the same users and noise."""

    def cost(self) -> Cost:
        """Return the cost of one sample."""
