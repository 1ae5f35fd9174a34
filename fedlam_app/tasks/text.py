"""What the text tasks share: shards, batches without padding, evaluation chunks, the model around a backbone.

A device goes through its shard once an epoch, in a keyed order, cut into as many batches as everyone: T =
ceil(texts / (devices x batch-rows)). So a batch is as large as its shard is, every text comes once an epoch,
and the devices' batches of a step together are one batch of the pooled data. A shard of fewer than T texts
has steps with an empty batch, in which its device rests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlam_app.base.keys import rng
from fedlam_app.base.registry import pick
from fedlam_app.config import RunConfig, TextConfig, sampling_rate
from fedlam_app.data.label_partition import PARTITIONS
from fedlam_app.data.text import TextSet, load_texts
from fedlam_app.models import backbones, lora
from fedlam_app.models.cut import on_device
from fedlam_app.models.split import SplitModel, Tokens, rows_of
from fedlam_app.models.text import Texts
from fedlam_app.tasks.base import Cost, Selection

TEXTS_PER_CHUNK = 64  # fixed, so that sums do not depend on how chunks are spread
TRAIN_SAMPLE = 512  # training texts on which the global training loss is taken

Ids = NDArray[np.int32]
Index = NDArray[np.int64]


class TextBatch(NamedTuple):
    """Texts, and what their head's outputs (R rows) should be."""

    texts: Texts
    targets: Tensor  # (R,) int64


class TextTask(ABC):
    """Texts in shards; a subclass says what is supervised and by which head."""

    selection: Selection

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.seed = config.seed

    def prepare(self) -> None:
        """Read the texts and find tokeniser and weights, so that what is missing is told at once."""
        self.shards  # noqa: B018
        backbones.locate(self.config.model.backbone, self.config.model.weights)

    # --- model --------------------------------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> SplitModel: ...

    def backbone(self) -> backbones.Backbone | backbones.NoBackbone:
        """Return the frozen backbone with what trains in it."""
        model = self.config.model
        frozen = backbones.load(
            model.backbone,
            blocks=model.blocks,
            weights=model.weights,
            seed=self.seed,
            positions=self.config.text.max_tokens,
        )
        return lora.tune(
            frozen, model.tuning, rank=model.rank, alpha=model.alpha, seed=self.seed, on=model.lora_on
        )

    def finished(self, model: SplitModel) -> SplitModel:
        """Apply what the configuration says of any text model: cut, precision, a head that stands still."""
        blocks = self.config.split.device_blocks
        if blocks and self.config.wire.embedding == "token-ids":
            raise ValueError(
                f"'wire.embedding' = 'token-ids' is not allowed with 'split.device-blocks' = {blocks}, whose"
                " states must cross; it must be another format, or 'split.device-blocks' must be 0"
            )
        model = on_device(model, blocks)
        if self.config.split.heads == "frozen":
            model.head.requires_grad_(False)
        return model.to(torch.float64) if self.config.model.precision == "float64" else model

    def inputs(self, model: SplitModel, batch: TextBatch) -> Texts:
        return batch.texts.to(model.device)

    def criterion(self, output: Tensor, batch: TextBatch) -> Tensor:
        return torch.nn.functional.cross_entropy(output, batch.targets.to(output.device))

    def weight(self, batch: TextBatch) -> float:
        return float(len(batch.targets))

    def loss(self, model: SplitModel, batch: TextBatch) -> Tensor:
        return self.criterion(model(self.inputs(model, batch)), batch)

    def losses(self, model: SplitModel, batch: TextBatch) -> Tensor:
        """Return each text's mean over its own supervised rows (B,).

        A mean over all rows of the batch would let the length of one text weigh the gradients of the others.
        """
        output = model(self.inputs(model, batch))  # (R, ...)
        rows = torch.nn.functional.cross_entropy(
            output, batch.targets.to(output.device), reduction="none"
        )  # (R,)
        texts = batch.texts
        counts = rows_of(Tokens(texts.ids, texts.lengths, texts.rows)).to(rows.device)  # (B,)
        sample = torch.repeat_interleave(counts)  # (R,)
        return rows.new_zeros(len(counts)).index_add(0, sample, rows) / counts

    # --- data ---------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, texts: TextSet) -> list[Any]:
        """Return each text as the task's sample; done once a process."""

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> TextBatch:
        """Return samples of :meth:`encode` as a batch."""

    @cached_property
    def texts(self) -> tuple[TextSet, TextSet]:
        """Training and held-out texts."""
        return _texts(self.config.text, self.seed)

    @cached_property
    def encoded(self) -> dict[str, list[Any]]:
        """The samples of both splits."""
        return {split: self.encode(texts) for split, texts in zip(("train", "test"), self.texts, strict=True)}

    @cached_property
    def shards(self) -> list[Index]:
        """Training texts of every device."""
        labels, text = self.texts[0].labels, self.config.text
        share = pick(PARTITIONS, text.partition, "text.partition")
        return [
            np.asarray(part) for part in share(labels, self.config.train.devices, text.dirichlet, self.seed)
        ]

    @property
    def steps_an_epoch(self) -> int:
        """Batches into which every shard is cut."""
        train = self.config.train
        return max(1, -(-len(self.texts[0]) // (train.devices * train.batch_rows)))

    def examples(self, device: int) -> int:
        return len(self.texts[0]) if self.config.strategy == "central" else len(self.shards[device])

    def ids(self, device: int, round: int, step: int) -> Index:
        """Return the places in the device's own shard of one batch, keyed by (seed, device, epoch).

        Under ``server-dp-sgd`` each sample has a coin of its own at every step, of chance :meth:`rate`. The
        key is the run's seed, since the server and the device must throw the same coin.
        """
        if self.config.privacy.mechanism == "server-dp-sgd":
            number = (round - 1) * self.config.train.local_steps + step
            coins = rng(self.seed, "poisson", device, number).random(len(self.shards[device]))
            return np.flatnonzero(coins < self.rate(device)).astype(np.int64)
        epoch, part = divmod((round - 1) * self.config.train.local_steps + step, self.steps_an_epoch)
        order = rng(self.seed, "epoch", device, epoch).permutation(len(self.shards[device]))
        return np.array_split(order, self.steps_an_epoch)[part].astype(np.int64)

    def rate(self, device: int) -> float:
        """Return the chance q that a Poisson batch has any one sample of a device."""
        return sampling_rate(self.config, len(self.shards[device]))

    def batch(self, device: int, round: int, step: int) -> TextBatch:
        owners = range(self.config.train.devices) if self.config.strategy == "central" else [device]
        chosen = np.concatenate([self.shards[k][self.ids(k, round, step)] for k in owners])
        return self.collate([self.encoded["train"][i] for i in chosen])

    def of(self, device: int, ids: Index) -> TextBatch:
        """Return some of a device's own samples as a batch."""
        return self.collate([self.encoded["train"][i] for i in self.shards[device][ids]])

    def sizes(self, device: int) -> Index:
        """Return the tokens of each of a device's texts (n,)."""
        return np.array([len(self.encoded["train"][i][0]) for i in self.shards[device]], np.int64)

    # --- evaluation ---------------------------------------------------------------------------------

    @cached_property
    def _chunks(self) -> list[tuple[str, Index]]:
        """Every evaluation chunk, texts of like lengths together: a sample of training, then the test."""
        train = rng(self.seed, "train loss").permutation(len(self.texts[0]))[:TRAIN_SAMPLE]
        cut = []
        for split, chosen in (("train", train), ("test", np.arange(len(self.texts[1])))):
            lengths = [len(self.texts[split == "test"].texts[i]) for i in chosen]
            ordered = chosen[np.argsort(lengths, kind="stable")]
            cut += [
                (split, ordered[i : i + TEXTS_PER_CHUNK]) for i in range(0, len(ordered), TEXTS_PER_CHUNK)
            ]
        return cut

    def chunks(self, split: str) -> list[int]:
        return [i for i, (kind, _) in enumerate(self._chunks) if kind == split]

    def chunk(self, number: int) -> TextBatch:
        """Return an evaluation chunk as a batch."""
        split, chosen = self._chunks[number]
        return self.collate([self.encoded[split][i] for i in chosen])

    def cost(self) -> Cost:
        """Count one mean text: 2 FLOPs a parameter and token in blocks, a parameter and row in the head."""
        model = self.build_model()
        batch = self.collate(self.encoded["train"])
        texts = len(batch.texts.lengths)
        tokens, rows = len(batch.texts.ids) / texts, len(batch.targets) / texts
        width = model.backbone.width
        assert isinstance(width, int)
        server = sum(p.numel() for p in model.backbone.parameters())
        head = sum(p.numel() for p in model.head.parameters())
        front = sum(p.numel() for name, p in model.embedding.named_parameters() if name.startswith("front."))
        device = 2.0 * head * rows + 2.0 * front * tokens
        if model.crossing != width:  # one projected token a text is all that crosses
            return Cost(device, 2.0 * server, model.crossing, round(rows * width))
        return Cost(device, 2.0 * server * tokens, round(tokens * width), round(rows * width))


def pack(samples: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Return token ids of several texts as one (N,) and their lengths (B,), both int64."""
    lengths = torch.tensor([len(ids) for ids in samples], dtype=torch.int64)
    ids = np.concatenate(samples) if samples else np.zeros(0, np.int32)
    return torch.from_numpy(ids.astype(np.int64)), lengths


@lru_cache(maxsize=4)
def _texts(text: TextConfig, seed: int) -> tuple[TextSet, TextSet]:
    return load_texts(text, seed)
