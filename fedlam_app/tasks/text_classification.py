"""Text classification: Rotten Tomatoes, BBC News, or texts of the user's own.

The head sees one vector a text, pooled on the server (mean, first or last token), so that only B vectors come
down and B Jacobians go up, however long the texts are.

    loss = - mean_i log softmax(W r_i + b)[y_i]

Under ``privacy.mechanism = "release-once"`` the device's side ends in one projected vector a text
(``models/pooled.py``), and the server's blocks work on that one token, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlam_app.config import RunConfig
from fedlam_app.data.text import TextSet
from fedlam_app.models.backbones import locate
from fedlam_app.models.cut import FrontEmbedding
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.models.probe import linear_probe
from fedlam_app.models.split import SplitModel
from fedlam_app.models.text import Classifier, Texts, WordEmbedding
from fedlam_app.models.tokens import embeddings, tokenizer
from fedlam_app.privacy.projection import public_projection
from fedlam_app.tasks import classes
from fedlam_app.tasks.base import Selection
from fedlam_app.tasks.text import Ids, TextBatch, TextTask, pack

Sample = tuple[Ids, int]  # token ids, label


class TextClassification(TextTask):
    """Texts to classes."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.selection: Selection = config.text.pool

    def build_model(self) -> SplitModel:
        model = self.config.model
        backbone = self.backbone()
        table = embeddings(model.backbone, model.weights, self.seed)
        table.requires_grad_(model.tuning == "full")
        head = Classifier(backbone.width, len(self.texts[0].names), self.seed)
        return self.finished(SplitModel(WordEmbedding(table), backbone, head))

    def finished(self, model: SplitModel) -> SplitModel:
        """Apply what the configuration says of a text model, and end the device's side in one vector."""
        model = super().finished(model)
        privacy, config = self.config.privacy, self.config
        if privacy.mechanism != "release-once":
            return model
        device = model.embedding
        if isinstance(device, FrontEmbedding):
            pooled = PooledEmbedding(device.embedding, device.front)
        else:
            pooled = PooledEmbedding(device, nn.Identity())
        name, weights = config.model.backbone, config.model.weights
        drawn = () if locate(name, weights) else (self.seed, config.model.blocks)  # by the seed, weights too
        front = (name, weights, *drawn, config.split.device_blocks, config.model.precision)
        projection = public_projection(
            config.text,
            privacy.public_texts,
            privacy.dimensions,
            front,
            config.data.cache,
            lambda texts: self._pooled(pooled, self.encode(texts)),
        )
        return SplitModel(pooled.aim(projection, privacy.clip), model.backbone, model.head)

    def encode(self, texts: TextSet) -> list[Sample]:
        model = self.config.model
        ids = _encoded(model.backbone, model.weights, texts.texts, self.config.text.max_tokens)
        return list(zip(ids, texts.labels.tolist(), strict=True))

    def collate(self, samples: Sequence[Sample]) -> TextBatch:
        ids, lengths = pack([ids for ids, _ in samples])
        ends = lengths.cumsum(0)
        rows = {"mean": None, "first": ends - lengths, "last": ends - 1}[self.config.text.pool]
        targets = torch.tensor([label for _, label in samples], dtype=torch.int64)
        return TextBatch(Texts(ids, lengths, rows), targets)

    def evaluate(self, model: SplitModel, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Return (texts, 2): negative log-likelihood [nat] and whether the label was found."""
        batch = self.chunk(chunk)
        with torch.no_grad():
            return classes.sums(model(self.inputs(model, batch)), batch.targets)

    def metrics(self, split: str, table: NDArray[np.float64]) -> dict[str, Any]:
        return classes.metrics(split, table)

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the metrics of 'majority', or of 'linear-probe' on the frozen backbone's features."""
        train, test = self.texts
        if name == "majority":
            counts = np.bincount(train.labels, minlength=len(train.names)) / len(train.labels)
            logs = np.log(np.maximum(counts, 1e-12))
            table = np.stack([-logs[test.labels], test.labels == counts.argmax()], 1).astype(float)
            own = np.stack([-logs[train.labels], train.labels == counts.argmax()], 1).astype(float)
        elif name == "linear-probe":
            model = self.build_model().eval()
            own, table = linear_probe(
                self._features(model, "train"),
                train.labels,
                self._features(model, "test"),
                test.labels,
                self.seed,
            )
        else:
            raise ValueError(f"unknown baseline '{name}'; allowed are majority, linear-probe")
        return self.metrics("train", own) | self.metrics("test", table)

    def _pooled(self, front: PooledEmbedding, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return the pooled states (n, D) of texts, of like lengths together."""
        order = np.argsort([len(ids) for ids, _ in samples], kind="stable")
        parts = [order[start : start + 64] for start in range(0, len(order), 64)]
        with torch.no_grad():
            found = [front.pooled(self.collate([samples[i] for i in part]).texts) for part in parts]
        pooled = np.zeros((len(order), found[0].shape[1]))
        pooled[order] = torch.cat(found).double().numpy()
        return pooled

    def _features(self, model: SplitModel, split: str) -> NDArray[np.float64]:
        """Return what the head of the untrained model would see of every text, (texts, D)."""
        samples = self.encoded[split]
        order = np.argsort([len(ids) for ids, _ in samples], kind="stable")
        features = np.zeros((len(samples), int(model.backbone.width)))  # type: ignore[arg-type]
        with torch.no_grad():
            for start in range(0, len(order), 64):
                chosen = order[start : start + 64]
                batch = self.collate([samples[i] for i in chosen])
                tokens, _ = model.embedding(self.inputs(model, batch))
                features[chosen] = model.backbone(tokens).double().cpu().numpy()
        return features


@lru_cache(maxsize=8)
def _encoded(backbone: str, weights: str, texts: tuple[str, ...], max_tokens: int) -> list[Ids]:
    return tokenizer(backbone, weights)(texts, max_tokens)
