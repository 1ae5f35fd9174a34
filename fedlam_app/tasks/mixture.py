"""Classification of Gaussians by a perceptron of two layers: a task for fleets, where training is cheap.

A device's local steps take milliseconds and its data no memory, so what a run of a hundred thousand devices
shows is who was chosen and what the radio cost. Data: ``data/mixture.py``; model: ``models/mlp.py``.

    loss = - mean_i log softmax(W2 max(0, W1 x_i + b1) + b2)[y_i]

Batches have ``train.batch-rows`` examples each: in a round a device walks through its shard in a keyed order,
and through it again in another where it is too small. With 'central' one device owns every shard and a
batch is that of all devices together. The global training loss is over a keyed sample of the union of shards.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlam_app.base.keys import rng
from fedlam_app.config import MixtureConfig, RunConfig
from fedlam_app.data import mixture as data
from fedlam_app.models.mlp import flops, mlp
from fedlam_app.models.probe import linear_probe
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks import classes
from fedlam_app.tasks.base import Cost, Selection

ROWS_PER_CHUNK = 1000  # fixed, so that sums do not depend on how chunks are spread
TRAIN_SAMPLE = 1000  # training examples on which the global training loss is taken
PROBE_SAMPLE = 10_000  # ... and on which the baselines are fitted: thirty a weight of the default probe

Index = NDArray[np.int64]


class Batch(NamedTuple):
    """B examples."""

    features: Tensor  # (B, d) float32
    targets: Tensor  # (B,) int64


class Mixture:
    """Points to classes."""

    selection: Selection = "all"

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.seed = config.seed
        self.mixture = config.mixture

    def prepare(self) -> None:
        """Do nothing: data are made when they are asked for."""

    # --- model --------------------------------------------------------------------------------------

    def build_model(self) -> SplitModel:
        return mlp(self.mixture.features, self.mixture.hidden, self.mixture.classes, self.seed)

    def inputs(self, model: SplitModel, batch: Batch) -> Tensor:
        return batch.features.to(model.device)

    def criterion(self, output: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(output, batch.targets.to(output.device))

    def weight(self, batch: Batch) -> float:
        return float(len(batch.targets))

    def loss(self, model: SplitModel, batch: Batch) -> Tensor:
        return self.criterion(model(self.inputs(model, batch)), batch)

    def losses(self, model: SplitModel, batch: Batch) -> Tensor:
        output = model(self.inputs(model, batch))
        return torch.nn.functional.cross_entropy(output, batch.targets.to(output.device), reduction="none")

    # --- data ---------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> Index:
        return data.examples_of_all(self.mixture, self.config.train.devices, self.seed)

    def examples_of_all(self) -> Index:
        """Return how many training examples each device has, (devices,)."""
        return self._sizes

    def examples(self, device: int) -> int:
        return int(self._sizes.sum() if self.config.strategy == "central" else self._sizes[device])

    def ids(self, device: int, round: int, step: int) -> Index:
        """Return the places in the device's own shard of one batch, keyed by (seed, device, round)."""
        rows, size = self.config.train.batch_rows, int(self._sizes[device])
        walk, place = np.divmod(np.arange(step * rows, (step + 1) * rows), size)
        orders = [
            _order(self.seed, device, round, number, size) for number in range(walk[0], walk[-1] + 1)
        ]  # one walk, or a few where the shard ends within the batch
        return orders[0][place] if len(orders) == 1 else np.stack(orders)[walk - walk[0], place]

    def batch(self, device: int, round: int, step: int) -> Batch:
        if self.config.strategy != "central":
            return self.of(device, self.ids(device, round, step))
        parts = [self.of(k, self.ids(k, round, step)) for k in range(self.config.train.devices)]
        features, targets = zip(*parts, strict=True)
        return Batch(torch.cat(features), torch.cat(targets))

    def sizes(self, device: int) -> Index:
        """Return 1 for each of a device's examples (n,)."""
        return np.ones(self._sizes[device], np.int64)

    def of(self, device: int, ids: Index) -> Batch:
        """Return some of a device's own examples as a batch."""
        features, labels = _shard(self.mixture, self.seed, device, int(self._sizes[device]))
        return Batch(torch.from_numpy(features[ids]), torch.from_numpy(labels[ids]))

    # --- evaluation ---------------------------------------------------------------------------------

    @cached_property
    def _chunks(self) -> list[tuple[str, Batch]]:
        """Every evaluation chunk: a sample of the union of all shards, then the held-out examples."""
        devices = self.config.train.devices
        splits = {
            "train": data.pooled(self.mixture, self.seed, devices, TRAIN_SAMPLE),
            "test": data.held_out(self.mixture, self.seed),
        }
        return [
            (split, Batch(features, targets))
            for split, pair in splits.items()
            for features, targets in zip(
                *(torch.split(torch.from_numpy(array), ROWS_PER_CHUNK) for array in pair), strict=True
            )
        ]

    def chunks(self, split: str) -> list[int]:
        return [i for i, (kind, _) in enumerate(self._chunks) if kind == split]

    def evaluate(self, model: SplitModel, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Return (examples, 2): negative log-likelihood [nat] and whether the label was found."""
        batch = self._chunks[chunk][1]
        with torch.no_grad():
            return classes.sums(model(self.inputs(model, batch)), batch.targets)

    def metrics(self, split: str, table: NDArray[np.float64]) -> dict[str, Any]:
        return classes.metrics(split, table)

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the metrics of 'majority', or of 'linear-probe', logistic regression on the features."""
        features, labels = data.pooled(self.mixture, self.seed, self.config.train.devices, PROBE_SAMPLE)
        test, test_labels = data.held_out(self.mixture, self.seed)
        if name == "majority":
            counts = np.bincount(labels, minlength=self.mixture.classes) / len(labels)
            logs, most = np.log(np.maximum(counts, 1e-12)), counts.argmax()
            own, table = (np.stack([-logs[y], y == most], 1).astype(float) for y in (labels, test_labels))
        elif name == "linear-probe":
            own, table = linear_probe(
                features.astype(float), labels, test.astype(float), test_labels, self.seed
            )
        else:
            raise ValueError(f"unknown baseline '{name}'; allowed are majority, linear-probe")
        return self.metrics("train", own) | self.metrics("test", table)

    def cost(self) -> Cost:
        """Count the multiplications and additions of one example; nothing stands on the server."""
        mixture = self.mixture
        work = flops(mixture.features, mixture.hidden, mixture.classes)
        return Cost(work, 0.0, mixture.hidden, mixture.hidden)


@lru_cache(maxsize=1024)
def _shard(mixture: MixtureConfig, seed: int, device: int, size: int) -> tuple[data.Features, data.Labels]:
    return data.shard(mixture, seed, device, size)


@lru_cache(maxsize=1024)
def _order(seed: int, device: int, round: int, walk: int, size: int) -> Index:
    return rng(seed, "mixture", "order", device, round, walk).permutation(size)
