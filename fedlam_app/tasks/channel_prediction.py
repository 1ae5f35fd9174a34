"""Channel prediction, the paper's case study: 16 noisy slots of CSI in, the next 4 out.

One row is one user and one antenna, (T, K) complex. Everything that needs all antennas of a user (its
scale, its AR forecast) happens before rows are cut, on the device, so that a row's output never
depends on its batch mates. After LLM4CP (arXiv:2406.14440) training histories and labels are noisy,
SNR ~ U(min, max) a user, drawn anew for every batch; tests use one fixed SNR, and clean targets stand
beside the noisy labels.

    loss = sum |H_hat - H|^2 / sum |H|^2 over the batch          (NMSE against noisy labels)

The global training loss is the same quantity of the current model over the union of all shards, with
one fixed draw of the training noise: the loss on a client's own shard rewards memorising it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlam_app.base import metrics
from fedlam_app.base.keys import rng
from fedlam_app.base.registry import pick
from fedlam_app.config import DataConfig, RunConfig
from fedlam_app.data.channel_set import ChannelSet
from fedlam_app.data.partition import partition
from fedlam_app.data.sources import load_splits
from fedlam_app.models import classical, predictors, ridge
from fedlam_app.models.rows import Rows
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks.base import Cost, Selection
from fedlam_app.tasks.observed import Complex, Index, Observed, Snr, observe

USERS_PER_CHUNK = 20  # fixed, so that sums and BLAS shapes do not depend on how chunks are spread
ARRAY = 16  # antennas of one 4x4 array and one polarisation, for the spectral efficiency
NO_SAMPLES = "channel prediction has no samples that come again, and so none to protect one by one"


class ChannelPrediction:
    """Federated LLM4CP and its competitors on 3GPP channels."""

    selection: Selection = "all"

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.seed = config.seed

    def prepare(self) -> None:
        """Make or find the data, with a progress bar, before any worker asks for it."""
        load_splits(self.config.data, self.seed, progress=True)

    # --- model --------------------------------------------------------------------------------------

    def build_model(self) -> SplitModel:
        return predictors.build(self.config.model, self.seed, self.shape)

    @property
    def shape(self) -> predictors.Shape:
        """Axes of a row, as the data has them."""
        _, _, history, subcarriers = self.train.history.shape
        return predictors.Shape(history, self.train.future.shape[2], subcarriers)

    def inputs(self, model: SplitModel, batch: tuple[Rows, Tensor]) -> Rows:
        return batch[0].to(model.device)

    def criterion(self, output: Tensor, batch: tuple[Rows, Tensor]) -> Tensor:
        label = batch[1].to(output.device)
        return (output - label).square().sum() / label.square().sum()

    def weight(self, batch: tuple[Rows, Tensor]) -> float:
        """Return the labels' energy: an NMSE of pooled rows is the mean of its parts' NMSEs, so weighted."""
        return float(batch[1].double().square().sum())

    def loss(self, model: SplitModel, batch: tuple[Rows, Tensor]) -> Tensor:
        return self.criterion(model(self.inputs(model, batch)), batch)

    # --- data ---------------------------------------------------------------------------------------

    @cached_property
    def train(self) -> ChannelSet:
        return _splits(self.config.data, self.seed)[0]

    @cached_property
    def test(self) -> ChannelSet:
        return _splits(self.config.data, self.seed)[1]

    @cached_property
    def shards(self) -> list[Index]:
        """Users of every shard, one shard an edge server."""
        data = self.config.data
        return partition(data.partition, self.train, data.shards, data.share, self.seed)

    def users(self, device: int) -> Index:
        """Training users of a device: its shard; of the pooled bound, the shards of all devices."""
        if self.config.strategy == "central":
            return np.concatenate(self.shards[: self.config.train.devices])
        return self.shards[device]

    def examples(self, device: int) -> int:
        return len(self.users(device)) * self.train.history.shape[1]

    def ids(self, device: int, round: int, step: int) -> None:
        """No batch is seen twice: noise is drawn anew."""

    def of(self, device: int, ids: NDArray[np.int64]) -> tuple[Rows, Tensor]:
        raise ValueError("channel prediction draws its noise anew: no batch of it can be asked for by ids")

    def losses(self, model: SplitModel, batch: tuple[Rows, Tensor]) -> Tensor:
        raise ValueError(NO_SAMPLES)

    def sizes(self, device: int) -> NDArray[np.int64]:
        raise ValueError(NO_SAMPLES)

    def batch(self, device: int, round: int, step: int) -> tuple[Rows, Tensor]:
        """Draw users, antennas, SNR and noise of one local step, all keyed by (seed, device, round, step)."""
        draw = rng(self.seed, "batch", device, round, step)
        rows = self.config.train.batch_rows
        if self.config.strategy == "central":
            rows *= self.config.train.devices  # the same number of samples a step as the federation
        own = self.users(device)
        users = draw.choice(own, min(len(own), rows), replace=False)
        channels = self.train.take(users)
        seen = observe(
            channels, _training_snr(self.config.data, draw, len(users)), draw, self.config.model.anchor
        )
        pairs = np.arange(rows) % len(users), draw.integers(channels.history.shape[1], size=rows)
        return seen.rows(*pairs)

    # --- evaluation ---------------------------------------------------------------------------------

    @cached_property
    def _chunks(self) -> list[tuple[str, Index]]:
        """Every evaluation chunk: the union of all shards, then the test users."""
        union = np.sort(np.concatenate(self.shards))
        cut = [("train", part) for part in _blocks(union)]
        return cut + [("test", part) for part in _blocks(np.arange(len(self.test)))]

    def chunks(self, split: str) -> list[int]:
        return [i for i, (kind, _) in enumerate(self._chunks) if kind == split]

    def observed(self, chunk: int) -> Observed:
        """Return a chunk's users with the one noise that every evaluation of this seed sees."""
        split, users = self._chunks[chunk]
        return _fixed(self.config.data, self.seed, self.config.model.anchor, split, tuple(users.tolist()))

    def evaluate(self, model: SplitModel, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Score ``antennas`` evenly spaced antennas a user (0: all): sums a user, (users, 4 F + 1)."""
        seen = self.observed(chunk)
        users, available = seen.history.shape[:2]
        chosen = np.arange(available) if antennas == 0 else _spread(available, antennas)
        rows, _ = seen.rows(np.repeat(np.arange(users), len(chosen)), np.tile(chosen, users))
        with torch.no_grad():
            output = model(rows.to(model.device)).cpu()
        forecast = torch.view_as_complex(output.contiguous())  # (users a, F, K)
        return score(forecast.unflatten(0, (users, -1)).numpy(), seen, chosen)

    def metrics(self, split: str, table: NDArray[np.float64]) -> dict[str, Any]:
        """Turn sums a user into the metrics of a split; training gives the global loss alone."""
        slots = (table.shape[1] - 1) // 4
        clean_error, clean_power, error, power = (table[:, i * slots : (i + 1) * slots] for i in range(4))
        if split == "train":
            return {"train_loss_db": metrics.nmse_db(error, power)}
        speed = self.test.speed_kmh.astype(np.float64)
        by_speed = metrics.nmse_per_speed(clean_error.sum(1), clean_power.sum(1), speed)
        return {
            "nmse_clean_db": metrics.nmse_db(clean_error, clean_power),
            "nmse_noisy_db": metrics.nmse_db(error, power),
            "nmse_per_user_db": metrics.nmse_per_user_db(clean_error.sum(1), clean_power.sum(1)),
            "nmse_by_speed_db": {f"{v:g}": metrics.to_db(x) for v, x in by_speed.items()},
            "nmse_by_horizon_db": [
                metrics.to_db(e / p) for e, p in zip(clean_error.sum(0), clean_power.sum(0), strict=True)
            ],
            "spectral_efficiency_bps_hz": float(np.mean(table[:, -1])),
        }

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the metrics of a classical predictor; 'ridge' is fitted on the union of all shards."""
        train, test = ([self.observed(i) for i in self.chunks(split)] for split in ("train", "test"))
        predict = _ridge(train) if name == "ridge" else pick(classical.CLASSICAL, name, "classical predictor")
        result: dict[str, Any] = {}
        for split, chunks in (("train", train), ("test", test)):
            every = np.arange(chunks[0].history.shape[1])
            tables = [score(predict(seen.history, seen.clean.shape[2]), seen, every) for seen in chunks]
            result |= self.metrics(split, np.concatenate(tables))
        return result

    def cost(self) -> Cost:
        """Count one row: 2 FLOPs a parameter, for every token in the backbone, every slot on the device."""
        model = self.build_model()
        with torch.no_grad():
            empty = torch.zeros(1, self.shape.history, self.shape.subcarriers, 2)
            anchor = None if self.config.model.anchor == "none" else empty[:, : self.shape.future]
            tokens = model.embedding(Rows(empty, anchor))[0]  # (1, S, D)
        elements = tokens[0].numel()
        device = sum(p.numel() for m in (model.embedding, model.head) for p in m.parameters())
        server = sum(p.numel() for p in model.backbone.parameters())
        return Cost(2.0 * device * self.shape.history, 2.0 * server * tokens.shape[1], elements, elements)


def score(forecast: Complex, seen: Observed, antennas: Index) -> NDArray[np.float64]:
    """Return sums a user (U, 4 F + 1): clean error and power, noisy error and power a slot; and the SE."""
    clean, label = seen.clean[:, antennas], seen.label[:, antennas]  # (U, a, F, K)
    # In the site's scale every history has unit power, so strong and weak users weigh alike in the sums.
    columns = [
        _slot_power(forecast - clean),
        _slot_power(clean),
        _slot_power(forecast - label),
        _slot_power(label),
    ]
    whole = len(antennas) % ARRAY == 0
    efficiency = [
        metrics.spectral_efficiency(forecast[u : u + 1], clean[u : u + 1], antennas=ARRAY)
        if whole
        else np.nan
        for u in range(len(forecast))
    ]
    return np.concatenate([*columns, np.array(efficiency)[:, None]], 1)


def _training_snr(data: DataConfig, draw: np.random.Generator, users: int) -> Snr:
    low, high = data.snr_train_min_db, data.snr_train_max_db
    return draw.uniform(low, high, users), draw.uniform(low, high, users)


def _ridge(train: list[Observed]) -> Callable[[Complex, int], Complex]:
    """Fit the global linear map on the noisy labels of all shards: moments are sums, so one pass suffices."""
    moments = [ridge.ridge_moments(seen.history, seen.label) for seen in train]
    gram, cross = (np.sum(parts, axis=0) for parts in zip(*moments, strict=True))
    weights = ridge.ridge_solve(gram, cross)
    return lambda history, future: ridge.ridge_predict(weights, history)


@lru_cache(maxsize=2)
def _splits(data: DataConfig, seed: int) -> tuple[ChannelSet, ChannelSet]:
    return load_splits(data, seed)


@lru_cache(maxsize=128)
def _fixed(data: DataConfig, seed: int, anchor: str, split: str, users: tuple[int, ...]) -> Observed:
    """Draw the fixed noise of one evaluation chunk, keyed by its first user, so that chunks stand alone."""
    draw = rng(seed, "evaluate", split, users[0])
    train, test = _splits(data, seed)
    if split == "train":
        return observe(train.take(users), _training_snr(data, draw, len(users)), draw, anchor)
    snr_db = np.full(len(users), data.snr_test_db)
    return observe(test.take(users), (snr_db, snr_db), draw, anchor)


def _slot_power(channels: Complex) -> NDArray[np.float64]:
    """Sum |H|^2 over antennas and subcarriers: (U, A, F, K) -> (U, F)."""
    return np.square(np.abs(channels), dtype=np.float64).sum((1, 3))


def _spread(available: int, wanted: int) -> Index:
    return np.linspace(0, available - 1, min(wanted, available)).round().astype(np.intp)


def _blocks(users: Index) -> list[Index]:
    return [users[i : i + USERS_PER_CHUNK] for i in range(0, len(users), USERS_PER_CHUNK)]
