"""Secure aggregation of 30 devices and 100,000 values: whether the sum is exact, and what it costs.

Every stage crosses as real Flower messages. A third of the devices vanish at each stage in turn. With few
neighbours a third of a device's neighbours may be more than the threshold allows, though a third of all
devices is not; how often such a round opens is counted on the graph alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from scipy import stats

import clients.secure
import strategies.secure_round
from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.base.records import SecureReport, cut, decode, join, kind_of, payload_bytes, reply
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy import masking
from fedlam_app.privacy.masking import Secrets, Words
from fedlam_app.privacy.neighbours import connected, graph, threshold
from fedlam_app.privacy.noise import Stream
from fedlam_app.tasks.mixture import Mixture
from strategies.secure_session import Session

SEED = 5
DEVICES, THIRD = 30, 10
HIDDEN = 2325  # 43 values a hidden unit, and 10: 99,985
STAGES = ("keys", "shares", "masks", "open")
BASE: dict[str, Scalar] = {
    "job": "train", "task": "mixture", "seed": SEED, "mixture.hidden": HIDDEN, "mixture.test": 10,
    "train.devices": DEVICES, "train.rounds": 1, "train.local-steps": 1, "train.optimiser": "sgd",
    "train.lr": 0.1, "federation.supernodes": 2, "privacy.mechanism": "client",
    "privacy.target-epsilon": float("inf"),
}  # fmt: skip


@dataclass
class Round:
    """One round: what was masked, what was opened, and what it cost."""

    words: list[Words] = field(default_factory=list)
    updates: list[NDArray[np.float64]] = field(default_factory=list)
    opened: list[Words] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    devices_s: float = 0.0  # CPU of all devices
    server_s: float = 0.0  # CPU of taking the masks off

    def difference(self, trained: list[int], gone: Collection[int]) -> float:
        """Return by how much the opened sum is wrong, in units of fixed point; NaN where it stayed closed."""
        if not self.opened:
            return float("nan")
        mine = [own for k, own in zip(trained, self.words, strict=True) if k not in gone]
        plain = np.sum(mine, axis=0, dtype=np.uint32)
        return float(np.abs((self.opened[0] - plain).view(np.int32).astype(np.int64)).max())


def losing(stage: str, gone: Collection[int]) -> ClientApp:
    """Return the real client, but some devices' answers are lost, from a stage on."""
    wrapped = ClientApp()

    @wrapped.train()
    def train(message: Message, context: Context) -> Message:
        answer = app(message, context)
        config = message.content.config_records["config"]
        here = str(config.get("stage", "masks"))
        if kind_of(answer.content) != "SecureReport" or STAGES.index(here) < STAGES.index(stage):
            return answer
        report = decode(answer.content, SecureReport)
        parts = zip(report.devices, cut(report.payload, report.sizes), strict=True)
        kept = {k: part for k, part in parts if k not in gone}
        payload, sizes = join(kept.values(), np.uint8)
        return reply(replace(report, devices=list(kept), payload=payload, sizes=sizes), message)

    return wrapped


@contextmanager
def watched(found: Round) -> Iterator[None]:
    """Note what is masked, what is opened, and the server's CPU time."""
    encode, opened, add = masking.encode, masking.decode, Session.sum

    def encoded(update: NDArray[np.float64], clip: float, scale: float) -> Words:
        found.updates.append(update)
        found.words.append(encode(update, clip, scale))
        return found.words[-1]

    def decoded(total: Words, scale: float) -> tuple[NDArray[np.float64], int]:
        found.opened.append(total.copy())
        return opened(total, scale)

    def timed(own: Session, words: Mapping[int, Words], shares: Mapping[int, bytes]) -> Words:
        began = time.thread_time()
        total = add(own, words, shares)
        found.server_s += time.thread_time() - began
        return total

    with (
        patch.object(clients.secure, "encode", encoded),
        patch.object(strategies.secure_round, "decode", decoded),
        patch.object(Session, "sum", timed),
    ):
        yield


def one_round(keys: Mapping[str, Scalar], stage: str = "open", gone: Collection[int] = ()) -> Round:
    """Run a round of 30 devices, of whom some vanish at a stage."""
    flat = {**BASE, **keys}
    config = parse(flat)
    task = Mixture(config)
    federation = federate(config, "{}", task, task.build_model())
    found = Round()
    with watched(found):
        cost = federation.train_round(InProcessGrid(losing(stage, gone), 2, flat), 1)
    found.bytes_up, found.bytes_down, found.devices_s = cost.bytes_up, cost.bytes_down, cost.cpu_s
    return found


def chance(neighbours: int, survivors: float, gone: int, draws: int = 2000) -> float:
    """Return how often a sum opens when ``gone`` of 30 masked vectors do not arrive, counted on graphs."""
    opens = 0
    for i in range(draws):
        draw = rng(SEED, "vanish", i)
        joined = graph(range(DEVICES), neighbours, draw)
        here = set(draw.permutation(DEVICES)[gone:].tolist())
        enough = all(
            len(here.intersection(joined[k])) + (k in here) >= threshold(len(joined[k]), survivors)
            for k in joined
        )
        opens += enough and connected(here, joined)
    return opens / draws


def uniformity(sessions: int = 400, values: int = 50) -> float:
    """Return the p-value that masked vectors of one fixed vector are uniform, over keys."""
    words = masking.encode(np.full(values, 0.1), 1.0, masking.scale_of(1.0, DEVICES))
    sent = []
    for i in range(sessions):
        own = [Secrets.drawn(Stream(b"benchmark", i, k).bytes) for k in range(3)]
        peers = {k: own[k].bundle() for k in (1, 2)}
        sent.append(masking.masked(words, own[0], 0, peers, f"session {i}"))
    return float(stats.kstest(np.concatenate(sent) / 2.0**32, "uniform").pvalue)


def main() -> int:
    """Measure, write ``results/privacy_secure.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    figures: list[Figure] = []

    def told(name: str, value: float, unit: str, bound: str = "") -> None:
        figures.append(Figure("privacy", name, value, unit, bound))
        print(f"{name}: {value:.4g} {unit} {bound}", flush=True)

    everybody, gone = list(range(DEVICES)), rng(SEED, "gone").permutation(DEVICES)[:THIRD].tolist()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        one_round({})  # imports and the model are paid before anything is timed
        plain, vector = one_round({}), float(payload_bytes(np.zeros(43 * HIDDEN + 10, np.float32)))
        for neighbours, name in ((0, "all 29 neighbours"), (10, "10 neighbours")):
            keys: dict[str, Scalar] = {"privacy.secure": True, "privacy.neighbours": neighbours}
            whole = one_round(keys)
            told(f"{name}: opened sum less the plain one", whole.difference(everybody, ()), "units", "== 0")
            more = (whole.bytes_up / DEVICES - vector, whole.bytes_down / DEVICES - vector)
            told(f"{name}: bytes up beside the vector, a device", more[0], "byte")
            told(f"{name}: bytes down beside the vector, a device", more[1], "byte")
            told(f"{name}: bytes up over those of the vector", 1 + more[0] / vector, "", "<= 1.1")
            spent = (whole.devices_s - plain.devices_s) / DEVICES
            told(f"{name}: CPU of masks and shares, a device and round", spent, "s")
            told(f"{name}: CPU of the server to open the sum", whole.server_s, "s")
        scale = masking.scale_of(1.0, DEVICES)
        exact = np.mean([u * min(1.0, 1.0 / float(np.linalg.norm(u))) for u in whole.updates], axis=0)
        error = np.abs(masking.decode(whole.opened[0], scale)[0] / DEVICES - exact).max()
        told("largest error of a mean's coordinate over C", float(error), "", f"<= {1.0 / scale:.3g}")
        for stage in STAGES:
            there = [k for k in everybody if k not in gone or stage in ("masks", "open")]
            lost = () if stage == "open" else gone
            found = one_round({"privacy.secure": True}, stage, gone)
            told(
                f"a third vanishes at '{stage}': sum less the plain one",
                found.difference(there, lost),
                "units",
                "== 0",
            )
            if stage == "masks":
                told("a third vanishes at 'masks': CPU of the server to open the sum", found.server_s, "s")
    told("masked values of a fixed vector are uniform: KS p", uniformity(), "", ">= 0.001")
    for neighbours, lost in ((0, THIRD), (10, 3), (10, THIRD), (20, THIRD)):
        share = 0.51 if neighbours else 0.67
        name = f"{neighbours or 29} neighbours, survivors {share}: rounds that open with {lost} of 30 gone"
        told(name, chance(neighbours, share, lost), "", "== 1" if not neighbours else "")
    write_result("privacy_secure", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
