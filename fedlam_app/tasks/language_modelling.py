"""Causal language modelling: predict the next token, of an answer after a text or of everything.

``answer``: a text, the question "Label:" and the name of its class; only the rows that predict the answer are
supervised, so only they come down and only they carry a Jacobian. Accuracy is that of the answer's tokens.
``all``: every next token of the text alone.

    loss = - mean over supervised rows t of log softmax(E r_t)[x_{t+1}],    E the tied word table
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlam_app.data.text import TextSet
from fedlam_app.models.split import SplitModel, tail_rows
from fedlam_app.models.text import LanguageHead, Texts, WordEmbedding
from fedlam_app.models.tokens import embeddings, tokenizer
from fedlam_app.tasks.base import Selection
from fedlam_app.tasks.text import Ids, TextBatch, TextTask, pack

QUESTION = "\nLabel: "

Sample = tuple[Ids, int]  # input and, last, the token after it; how many rows are supervised


class LanguageModelling(TextTask):
    """Texts to their next tokens."""

    selection: Selection = "tail"

    def build_model(self) -> SplitModel:
        model = self.config.model
        backbone = self.backbone()
        table = embeddings(model.backbone, model.weights, self.seed)
        table.requires_grad_(model.tuning == "full")
        return self.finished(SplitModel(WordEmbedding(table), backbone, LanguageHead(table)))

    def encode(self, texts: TextSet) -> list[Sample]:
        model, text = self.config.model, self.config.text
        answers = tuple(texts.names[label] for label in texts.labels) if text.supervise == "answer" else ()
        return _encoded(model.backbone, model.weights, texts.texts, answers, text.max_tokens)

    def collate(self, samples: Sequence[Sample]) -> TextBatch:
        ids, lengths = pack([ids[:-1] for ids, _ in samples])
        tails = torch.tensor([tail for _, tail in samples], dtype=torch.int64)
        targets = [ids[len(ids) - tail :] for ids, tail in samples]
        return TextBatch(
            Texts(ids, lengths, tail_rows(lengths, tails)),
            torch.from_numpy(np.concatenate([*targets, np.zeros(0, np.int32)]).astype(np.int64)),
        )

    def evaluate(self, model: SplitModel, chunk: int, antennas: int) -> NDArray[np.float64]:
        """Return (texts, 3): summed negative log-likelihood [nat], tokens found, tokens supervised."""
        split, chosen = self._chunks[chunk]
        tails = [self.encoded[split][i][1] for i in chosen]
        batch = self.chunk(chunk)
        with torch.no_grad():
            logits = model(self.inputs(model, batch)).cpu()  # (R, V)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none").double()
        right = (logits.argmax(1) == batch.targets).double()
        rows = torch.stack([loss, right, torch.ones_like(loss)], 1)  # (R, 3)
        return np.stack([part.sum(0).numpy() for part in rows.split(tails)])

    def metrics(self, split: str, table: NDArray[np.float64]) -> dict[str, Any]:
        loss, right, tokens = table.sum(0)
        if split == "train":
            return {"train_loss": float(loss / tokens)}
        mean = float(loss / tokens)
        return {"accuracy": float(right / tokens), "loss": mean, "perplexity": float(np.exp(mean))}

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the metrics of 'majority': every answer token by its frequency, wherever it stands."""
        if name != "majority":
            raise ValueError(f"unknown baseline '{name}' of language-modelling; allowed is majority")
        targets = {
            split: [ids[len(ids) - tail :] for ids, tail in samples]
            for split, samples in self.encoded.items()
        }
        counts = np.bincount(np.concatenate(targets["train"])) + 1.0
        logs = np.log(counts / counts.sum())
        result: dict[str, Any] = {}
        for split, answers in targets.items():
            rows = [[-_of(logs, ids).sum(), (ids == counts.argmax()).sum(), len(ids)] for ids in answers]
            result |= self.metrics(split, np.array(rows, float))
        return result


def _of(logs: NDArray[np.float64], ids: Ids) -> NDArray[np.float64]:
    """A token that training never asked for has the probability of one more look."""
    return np.where(ids < len(logs), logs[np.minimum(ids, len(logs) - 1)], logs.min())


@lru_cache(maxsize=8)
def _encoded(
    backbone: str, weights: str, texts: tuple[str, ...], answers: tuple[str, ...], max_tokens: int
) -> list[Sample]:
    words = tokenizer(backbone, weights)
    if not answers:
        whole = [
            np.resize(ids, max(2, len(ids))) for ids in words(texts, max_tokens)
        ]  # one word predicts itself
        return [(ids, len(ids) - 1) for ids in whole]
    names = tuple(dict.fromkeys(answers))
    ends = {name: words([QUESTION + name], max_tokens)[0] for name in names}
    question = len(words([QUESTION], max_tokens)[0])
    room = max_tokens - max(len(end) for end in ends.values())
    if room < 1:
        raise ValueError(f"text.max-tokens = {max_tokens} leaves no room for a text before its label")
    return [
        (np.concatenate([ids, ends[answer]]), max(1, len(ends[answer]) - question))
        for ids, answer in zip(words(texts, room), answers, strict=True)
    ]
