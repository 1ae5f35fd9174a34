"""What the split costs on the air: Rotten Tomatoes, all 6,920 training texts, three epochs, the default wire.

Eight devices, each a SuperNode of its own with batches of 16 texts; real messages, and bytes as they are
serialised. Payloads do not depend on the depth of the backbone, which a short run with all six blocks proves,
so the long run has one. Beside it:

* SplitLoRA (arXiv:2407.00952), padded: its tensors, fp32, 64 tokens a text, activations up at every step.
* SplitLoRA, unpadded: the same without padding; bytes a token as our messages carried them in five steps, a
  harsher yardstick.
* FedAvg of the whole model, and FedIT's (r = 8): one real vector, times 8 devices and 20 rounds. FedIT may
  well send less than we do; but there every device holds and trains the large model.

The arithmetic of ``fedlam_app/base/split_bytes.py`` is compared with what was sent: from the texts' token
counts for every format and for channels, and, as a plan must, from the mean sample of ``task.cost()`` alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto

from benchmarks.record import Figure, write_result
from fedlam_app.base.records import SplitReport, cut, decode, kind_of
from fedlam_app.base.split_bytes import downlink_bytes, uplink_bytes
from fedlam_app.base.split_payload import Uplink, from_bytes, from_integers
from fedlam_app.client_app import app
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.tasks import TASKS

SEED, DEVICES, BATCH, EPOCHS = 2025, 8, 16, 3
FL_ROUNDS = 20  # of full-model FedAvg and of FedIT
PADDED, WIDTH, FP32 = 64, 384, 4  # SplitLoRA's tensors of MiniLM
LINKS = ("wire.embedding", "wire.representation", "wire.jacobian")
BASE: dict[str, Scalar] = {
    "job": "train",
    "seed": SEED,
    "task": "text-classification",
    "strategy": "fedsgd-lora",
    "model.blocks": 1,
    "train.devices": DEVICES,
    "train.batch-rows": BATCH,
    "train.local-steps": 1,
    "train.rounds": 5,
    "federation.supernodes": DEVICES,
    "federation.server-threads": 1,
}
SHORT = {**BASE, "text.train": 4 * DEVICES * BATCH}  # five steps: an epoch, and one of the next
CASES: dict[str, dict[str, Scalar]] = {
    **{name: {**SHORT, **dict.fromkeys(LINKS, name)} for name in ("fp32", "fp16", "int8", "int4")},
    "token-ids": {**SHORT, "wire.embedding": "token-ids"},
    "top-k": {**SHORT, "wire.jacobian": "top-k"},
    "channel-prediction": {**BASE, "task": "channel-prediction", "train.rounds": 2, "train.local-steps": 2},
}


@dataclass(frozen=True)
class Sent:
    """What one run sent, round by round [bytes]."""

    config: RunConfig
    task: Any
    up: list[int]
    down: list[int]
    delivered: list[Message]


def run(overrides: Mapping[str, Scalar]) -> Sent:
    """Train in process, without evaluations."""
    config = parse(dict(overrides))
    task = TASKS[config.task](config)
    federation = federate(config, "{}", task, task.build_model())
    grid = InProcessGrid(app, config.federation.supernodes, overrides)
    costs = [federation.train_round(grid, number) for number in range(1, config.train.rounds + 1)]
    failures = [failure for cost in costs for failure in cost.failures]
    if failures:
        raise RuntimeError(failures[0])
    return Sent(
        config, task, [cost.bytes_up for cost in costs], [cost.bytes_down for cost in costs], grid.delivered
    )


def activations_a_token(sent: Sent) -> float:
    """Return the bytes of embeddings that came up for each token."""
    replies = [m.content for m in sent.delivered if kind_of(m.content) == SplitReport.__name__]
    reports = [decode(content, SplitReport) for content in replies]
    parts = [from_bytes(part, Uplink) for r in reports for part in cut(r.payload, r.sizes)]
    tokens = sum(int(from_integers(part.lengths).sum()) for part in parts)
    return sum(len(part.embeddings) for part in parts) / tokens


def planned(sent: Sent, tokens: float, rows: float) -> tuple[int, int]:
    """Return (up, down) by arithmetic, from the mean sample's tokens and rows."""
    config, task = sent.config, sent.task
    train, width = config.train, int(task.build_model().backbone.width)
    steps = train.rounds * train.local_steps
    if config.task == "channel-prediction":
        # The embedding trains: each step embeds, then shows; gradients come with the next, or end a round.
        shown = embedded = graded = steps * train.devices * train.batch_rows
        missing, exchanges = 0, train.devices * (2 * steps + train.rounds)
    else:
        # Embeddings go up once: the first batch on its own, every other with the Jacobians before it.
        embedded = missing = sum(map(len, task.shards))
        shown, graded, exchanges = embedded * steps // task.steps_an_epoch, 0, train.devices * (steps + 1)
    seen = round(shown * rows)
    up = uplink_bytes(
        config.wire,
        width,
        rows=seen,
        tokens=round(embedded * tokens),
        samples=embedded,
        payloads=exchanges,
        messages=exchanges,
    )
    down = downlink_bytes(
        config.wire,
        width,
        rows=seen,
        graded=round(graded * tokens),
        missing=missing,
        payloads=exchanges,
        messages=exchanges,
    )
    return up, down


def deviation(sent: Sent, plan: tuple[int, int]) -> float:
    """Return the larger deviation of a plan, up or down, from what was sent [%]."""
    return 100 * max(abs(plan[0] / sum(sent.up) - 1), abs(plan[1] / sum(sent.down) - 1))


def from_counts(sent: Sent) -> tuple[int, int]:
    """Return (up, down) from the token counts of the texts; a channel's are always the same."""
    if sent.config.task == "channel-prediction":
        return from_cost(sent)
    return planned(sent, float(np.mean([len(ids) for ids, _ in sent.task.encoded["train"]])), 1.0)


def from_cost(sent: Sent) -> tuple[int, int]:
    """Return (up, down) from ``task.cost()``, which counts a sample of the texts."""
    cost, width = sent.task.cost(), int(sent.task.build_model().backbone.width)
    return planned(sent, cost.elements_embedding / width, cost.elements_representation / width)


def channels_in(folder: Path) -> dict[str, Scalar]:
    """Write noise in the layout of channels and return the keys that read it: bytes know no physics."""
    path = folder / "channels.npz"
    users = 4 * DEVICES
    channels = np.random.default_rng(SEED).standard_normal((users, 20, 48, 16, 2)).astype(np.float16)
    ones = np.ones(users, np.float32)
    np.savez(path, H=channels, speed_kmh=30 * ones, gain_db=0 * ones)
    return {
        "data.source": str(path),
        "data.users": 3 * DEVICES,
        "data.test-users": DEVICES,
        "data.shards": DEVICES,
        "data.share": 1 / DEVICES,
    }


def vector_bytes(overrides: Mapping[str, Scalar]) -> int:
    """Return what one device hands in after a round in which it trained the whole model: real, serialised."""
    one = {**SHORT, "model.blocks": 6, "train.devices": 1, "federation.supernodes": 1, "train.rounds": 1}
    return run({**one, "text.train": 16, **overrides}).up[0]


def main() -> int:
    """Measure, write ``results/split_bytes.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        figures, extra = measure(Path(folder))
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    write_result("split_bytes", figures, seed=SEED, extra=extra)
    return 0 if all(figure.holds for figure in figures) else 1


def measure(folder: Path) -> tuple[list[Figure], dict[str, object]]:
    """Return all figures, and bytes round by round."""
    steps = TASKS["text-classification"](parse(dict(BASE))).steps_an_epoch  # type: ignore[attr-defined]
    ours = run({**BASE, "train.rounds": EPOCHS, "train.local-steps": steps})  # a round is an epoch
    theirs = run({**BASE, "strategy": "splitlora", "split.cache": False, **dict.fromkeys(LINKS, "fp32")})
    shallow, deep = run(SHORT), run({**SHORT, "model.blocks": 6})

    texts, up = len(ours.task.texts[0]), sum(ours.up)
    tokens = sum(len(ids) for ids, _ in ours.task.encoded["train"])
    padded = texts * EPOCHS * PADDED * WIDTH * FP32
    activations = EPOCHS * tokens * activations_a_token(theirs)
    fleet = DEVICES * FL_ROUNDS
    full = fleet * vector_bytes({"strategy": "fedavg-full", "model.tuning": "full"})
    fedit_all = fleet * vector_bytes({"strategy": "fedit", "model.lora-on": "all"})
    fedit_attention = fleet * vector_bytes({"strategy": "fedit", "model.lora-on": "attention"})
    later = ours.up[1:]

    replies = [m.content for m in ours.delivered[1::2]]
    serialised = sum(len(c.array_records["arrays"]["payload"].data) for c in replies)
    whole = sum(recorddict_to_proto(content).ByteSize() for content in replies)

    noise = channels_in(folder)
    cases = {name: run({**keys, **noise}) for name, keys in CASES.items()}
    errors = {name: deviation(sent, from_counts(sent)) for name, sent in cases.items()}
    errors[f"{texts} texts"] = deviation(ours, from_counts(ours))
    figures = [
        Figure("split", f"uplink, {texts} texts, {EPOCHS} epochs, {DEVICES} devices", up / 1e6, "MB"),
        Figure("split", "downlink of the same run", sum(ours.down) / 1e6, "MB"),
        Figure("split", "uplink of SplitLoRA's tensors (fp32, 64 tokens)", 100 * up / padded, "%", "<= 5"),
        Figure("split", "uplink of SplitLoRA, unpadded, measured", 100 * up / activations, "%"),
        Figure("split", "uplink of full-model FedAvg (20 rounds)", 100 * up / full, "%", "<= 1"),
        Figure("split", "uplink a text in later epochs", max(later) / texts / 1e3, "kB", "<= 1"),
        Figure("split", "SplitLoRA's tensors, uplink", padded / 1e6, "MB"),
        Figure("split", "SplitLoRA, unpadded, uplink", activations / 1e6, "MB"),
        Figure("split", "full-model FedAvg, uplink", full / 1e6, "MB"),
        Figure("split", "FedIT r = 8 on all linears, uplink (20 rounds)", fedit_all / 1e6, "MB"),
        Figure("split", "FedIT r = 8 on queries and values, uplink", fedit_attention / 1e6, "MB"),
        Figure(
            "split",
            "reported uplink against serialised payloads",
            100 * abs(up / serialised - 1),
            "%",
            "<= 1",
        ),
        Figure(
            "split", "Flower's whole messages above their payloads, up", 100 * (whole / serialised - 1), "%"
        ),
        Figure(
            "split",
            "six blocks send what one block sends, step by step",
            float((shallow.up, shallow.down) == (deep.up, deep.down)),
            "yes = 1",
            "== 1",
        ),
        Figure("split", "arithmetic, largest deviation of all cases", max(errors.values()), "%", "<= 3"),
        *(Figure("split", f"arithmetic, {name}", value, "%") for name, value in errors.items()),
        Figure("split", "arithmetic from task.cost() alone", deviation(ours, from_cost(ours)), "%", "<= 3"),
    ]
    return figures, {"up": ours.up, "down": ours.down, "tokens a text": tokens / texts}


if __name__ == "__main__":
    sys.exit(main())
