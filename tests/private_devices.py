"""One device of a split run by itself, shown what a test likes, by the order and bytes of a real exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.adapter import Worker
from clients.split import SplitDevice
from fedlam_app.base.records import SplitOrder, join
from fedlam_app.base.split_payload import Downlink, Uplink, from_bytes, position, to_bytes
from fedlam_app.base.wire import FORMATS
from fedlam_app.config import parse
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.tasks import TASKS
from tests.split_runs import EXACT, Flat, with_keys
from tests.tiny import tiny_text_run

Rows = NDArray[Any]  # (R, D)


def private_run(folder: Path, mechanism: str, **keys: Any) -> Flat:
    """Return a run on 48 texts of two classes: 4 devices, two rounds of two steps, three steps an epoch."""
    base: Flat = {
        "strategy": "fedsgd-lora",
        "model.backbone": "tiny-bert",
        "model.rank": 2,
        "model.alpha": 4,
        "split.heads": "frozen" if mechanism == "jacobian" else "personal",
        "privacy.mechanism": mechanism,
        "results": str(folder / "results"),
        **EXACT,
    }
    return with_keys(tiny_text_run(folder) | base, **keys)


class Alone:
    """The device side of a run, whose server is the test."""

    def __init__(self, flat: Flat) -> None:
        self.config = parse(flat)
        self.task: Any = TASKS[self.config.task](self.config)
        self.device = SplitDevice(Worker(self.config, self.task))
        self.worker = self.device.worker
        self.width = int(self.device.model.backbone.width)  # type: ignore[arg-type]

    def order(self, device: int, step: int, shown: Rows, known: int, **also: Any) -> SplitOrder:
        """Return the order that shows a device representations."""
        data = FORMATS[self.config.wire.representation].encode(shown)
        payload, sizes = join([to_bytes(Downlink(representations=data))], np.uint8)
        said: dict[str, Any] = {"noise": [], "free": [], **also}
        return SplitOrder(
            cell="{}",
            devices=[device],
            shown=[step],
            graded=[0],
            wanted=[0],
            known=[known],
            payload=payload,
            sizes=sizes,
            **said,
        )

    def answer(self, device: int, step: int, shown: Rows, known: int = 0, **also: Any) -> tuple[Rows, float]:
        """Return what goes up, times the batch: a row a sample, and the loss that is told."""
        answer = self.device.answer(self.order(device, step, shown, known, **also), 0)
        assert answer is not None
        up = from_bytes(answer.payload, Uplink)
        form = FORMATS[self.config.wire.jacobian]
        return form.decode(up.jacobians, *shown.shape) * len(shown), answer.loss

    def targets(self, device: int, step: int) -> NDArray[np.int64]:
        """Return the true labels of a step's batch."""
        batch = self.task.batch(device, *position(step, self.config.train.local_steps))
        return np.asarray(batch.targets.numpy())

    def rows(self, device: int, step: int, draw: np.random.Generator, scale: float = 1.0) -> Rows:
        """Return representations (B, D) for a step's batch."""
        return scale * draw.standard_normal((len(self.targets(device, step)), self.width))

    def head(self) -> tuple[Rows, Rows]:
        """Return weight (K, D) and bias (K,) with which the head last worked."""
        weight, bias = (p.detach().numpy().copy() for p in self.device.model.head.parameters())
        return weight, bias

    def gradients(self, shown: Rows, targets: NDArray[np.int64], p: float = 1.0) -> Rows:
        """Return dl_i/dr_i (B, D), sample by sample, of labels that are the true ones by chance ``p``."""
        found = []
        weight, bias = (p.detach().clone() for p in self.device.model.head.parameters())
        for row, target in zip(shown, targets, strict=True):
            leaf = torch.from_numpy(row[None]).requires_grad_(True)
            logits = torch.nn.functional.linear(leaf, weight, bias)
            chance = torch.softmax(logits, 1)[0, target]
            q = (1.0 - p) / (logits.shape[1] - 1)
            (-torch.log(q + (p - q) * chance)).backward()
            assert leaf.grad is not None
            found.append(leaf.grad[0].numpy())
        return np.stack(found)

    def ledger(self, device: int) -> Ledger:
        """Return a device's book as it is on the disk."""
        return self.worker.ledgers.of(device)


def clipped(rows: Rows, clip: float) -> Rows:
    """Return each row scaled to a norm of at most ``clip``, in a loop."""
    return np.stack([row * min(1.0, clip / max(float(np.linalg.norm(row)), 1e-300)) for row in rows])


def guessed(noised: Rows, zero: Rows, one: Rows) -> NDArray[np.int64]:
    """Return the likelier of two labels (B,), of whose gradients (k, B, D) k releases are noised ones."""
    way = one - zero
    return np.asarray(((noised - (one + zero) / 2.0) * way).sum((0, 2)) > 0.0, np.int64)
