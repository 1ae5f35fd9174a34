"""A head alone: nothing else trains, and what the frozen model said once it need not say again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from clients.adapter import Worker
from fedlam_app.config import parse
from fedlam_app.models.remembering import Remembering
from fedlam_app.tasks import TASKS
from tests.tiny import tiny_text_run


def test_a_head_trains_alone_and_the_backbone_is_asked_once_a_text(tmp_path: Path) -> None:
    flat = {**tiny_text_run(tmp_path), "model.tuning": "none", "train.local-steps": 12}
    config = parse(flat)
    worker = Worker(config, TASKS[config.task](config))
    assert set(worker.named) == {"head.linear.weight", "head.linear.bias"}
    backbone = worker.model.backbone
    assert isinstance(backbone, Remembering)
    asked: list[int] = []
    inner = backbone.inner.forward
    backbone.inner.forward = lambda tokens: (asked.append(1), inner(tokens))[1]  # type: ignore[method-assign]
    moved, _ = worker.train(worker.initial, 0, 1)
    assert len(asked) == worker.task.examples(0) < 12 * 3  # four epochs, and each text once
    again, _ = worker.train(worker.initial, 0, 1)
    np.testing.assert_array_equal(moved, again)
    assert len(asked) == worker.task.examples(0)


def test_answers_are_the_backbones_own(tmp_path: Path) -> None:
    config = parse({**tiny_text_run(tmp_path), "model.tuning": "none"})
    task = TASKS[config.task](config)
    plain = task.build_model()
    kept = Remembering(plain.backbone).train()
    tokens, _ = plain.embedding(task.inputs(plain, task.batch(0, 1, 0)))
    with torch.no_grad():
        expected = plain.backbone(tokens)
    torch.testing.assert_close(kept(tokens), expected)
    some = tokens._replace(rows=torch.cumsum(tokens.lengths, 0) - 1)
    with torch.no_grad():
        torch.testing.assert_close(kept(some), plain.backbone(some))
    assert kept(some).shape == expected.shape
