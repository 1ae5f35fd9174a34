"""The mechanisms as they run, each behind the one face that an audit knows: who is there, and what is read.

| mechanism | code that runs | worlds | a gap of 1 |
|---|---|---|---|
| dp-sgd | a worker's round (``clients/private.py``), q = 1 | coordinates | C |
| jacobian | an exchange of the split (``clients/split_private.py``) | samples | 2 C, two labels |
| logit | the same | samples | min(2 C, sqrt 2), two labels |
| randomised-response | the labels that a device trains on (the same file) | samples | two labels |
| release-once | the release of a shard (``clients/released.py``) | samples | C |
| client | a step of the server (``strategies/device_dp.py``) | coordinates | C |

The noise that is claimed is not the one that was asked for: it is read from the ledger, of what the code has
charged for what it released. So a charge for a wrong sensitivity is found as well. Each call is one release
with others there by their own coins. No amplification is claimed, and none is tested. ``server-dp-sgd`` is
not here: each of its canaries would have to pass a whole backbone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.adapter import Worker
from clients.ledgers import Ledgers
from clients.released import Releases
from clients.split import SplitDevice
from clients.split_private import Event, PrivateCut
from fedlam_app.base.layout import Layout
from fedlam_app.base.records import SplitOrder, join
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.split_payload import Downlink, Uplink, from_bytes, to_bytes
from fedlam_app.base.wire import FORMATS
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.experiments.canaries import Coins, Dirac, Empty, OneWord
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.privacy.audit import Mechanism
from fedlam_app.tasks.base import Task
from strategies.device_dp import DeviceDp
from strategies.fedavg_lora import FedAvgLora
from strategies.participation import Turn

SIZES = (1.0, 10.0)  # lengths of canaries, over C: as long as allowed, and longer
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """One mechanism under audit."""

    name: str
    worlds: int  # in one call
    run: Mechanism
    ledger: Callable[[], Ledger]  # as the code that ran has left it

    @property
    def charged(self) -> float:
        """The noise multiplier of one release, over the largest gap, as the book says."""
        return self.ledger().events[-1][1]


Built = tuple[Mechanism, Callable[[], Ledger]]
Build = Callable[[RunConfig, float, float, Path, int], Built]


def subject(name: str, config: RunConfig, mu: float, size: float, folder: Path) -> Subject:
    """Return a mechanism with the noise of mu-GDP, and canaries of length ``size`` C; it works in ``folder``.

    ``randomised-response`` takes ``mu`` as its pure epsilon.
    """
    worlds, build = SUBJECTS[name]
    run, ledger = build(config, mu, size, folder, worlds)
    return Subject(name, worlds, run, ledger)


def worker_in(folder: Path, config: RunConfig, task: Task) -> Worker:
    """Return a worker that keeps its memory and its books in ``folder``, and nowhere else."""
    worker = Worker(config, task)
    worker.memory.folder = folder / "device"
    worker.ledgers = Ledgers(config, worker.memory.folder)
    return worker


def exchange(device: SplitDevice, step: int, shown: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return the Jacobians (R, D) that device 0 answers with when it is shown representations (R, D)."""
    config = device.worker.config
    data = FORMATS[config.wire.representation].encode(shown)
    payload, sizes = join([to_bytes(Downlink(representations=data))], np.uint8)
    lists: dict[str, Any] = {"noise": [], "free": [], "graded": [0], "wanted": [0], "known": [0]}
    order = SplitOrder(cell="{}", devices=[0], shown=[step], payload=payload, sizes=sizes, **lists)
    answer = device.answer(order, 0)
    assert answer is not None
    return FORMATS[config.wire.jacobian].decode(from_bytes(answer.payload, Uplink).jacobians, *shown.shape)


def audit_config(config: RunConfig, folder: Path, **keys: Scalar) -> RunConfig:
    """Return a run of one device, one step and clear links, with the seed and the privacy of ``config``.

    ``keys`` have ``__`` for a dot and ``_`` for a dash.
    """
    privacy = config.privacy
    flat: dict[str, Scalar] = {
        "job": "train",
        "task": "text-classification",
        "seed": config.seed,
        "results": str(folder),
        "data.cache": str(folder),
        "model.backbone": "random",
        "split.heads": "frozen",
        "train.devices": 1,
        "train.rounds": 1,
        "train.local-steps": 1,
        "train.optimiser": "sgd",
        "train.lr": 1.0,
        "train.weight-decay": 0.0,
        "wire.embedding": "fp32",
        "wire.representation": "fp32",
        "wire.jacobian": "fp32",
        "privacy.target-epsilon": math.inf,
        "privacy.delta": privacy.delta,
        "privacy.clip": privacy.clip,
        "privacy.randomness": privacy.randomness,
    }
    return parse(flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


def _dp_sgd(config: RunConfig, mu: float, size: float, folder: Path, worlds: int) -> Built:
    """One local step from the same vector, the whole shard in the batch."""
    own = audit_config(
        config,
        folder,
        privacy__mechanism="dp-sgd",
        privacy__noise_multiplier=1.0 / mu,
        privacy__sampling_rate=1.0,
        train__batch_rows=worlds,
    )
    clip, rate = own.privacy.clip, learning_rate(own.train.lr, own.train.rounds, 1)
    task = Dirac(np.zeros(worlds, bool), size * clip)
    worker = worker_in(folder, own, task)

    def run(present: Coins) -> Floats:
        task.coins = present
        after, _ = worker.train(np.zeros(worlds, np.float32), 0, 1)
        return -after.astype(np.float64) * worlds / (rate * clip)

    return run, lambda: worker.ledgers.of(0)


def dirac_run(
    config: RunConfig, noise: float, rate: float, steps: int, size: float, present: Coins, folder: Path
) -> tuple[Floats, Ledger]:
    """Train once on the canaries that are there: a round of ``steps`` local steps, Poisson batches.

    Returns how far each canary's coordinate went (m,), and the ledger.
    """
    own = audit_config(
        config,
        folder,
        privacy__mechanism="dp-sgd",
        privacy__noise_multiplier=noise,
        privacy__sampling_rate=rate,
        train__local_steps=steps,
        train__batch_rows=min(512, len(present)),
    )
    worker = worker_in(folder, own, Dirac(present, size * own.privacy.clip))
    after, _ = worker.train(np.zeros(len(present), np.float32), 0, 1)
    return -after.astype(np.float64), worker.ledgers.of(0)


def _at_the_cut(mechanism: str) -> Build:
    def build(config: RunConfig, mu: float, size: float, folder: Path, worlds: int) -> Built:
        """The device is shown zeros, at which both labels are equally likely, and answers with Jacobians."""
        clip, reach = config.privacy.clip, size * config.privacy.clip
        whole = 1.0  # the answer over what is noised
        if mechanism == "logit":  # a logit gradient (d, -d) has length sqrt(1/2) here, and J = 2 reach d
            clip, reach, whole = math.sqrt(0.5) / size, 1.0, math.sqrt(2.0)
        own = audit_config(
            config,
            folder,
            strategy="fedsgd-lora",
            privacy__mechanism=mechanism,
            privacy__noise_multiplier=2.0 / mu,
            privacy__clip=clip,
            train__batch_rows=worlds,
        )
        devices: list[SplitDevice] = []

        def run(present: Coins) -> Floats:
            task = OneWord(own, present, reach)
            devices[:] = [SplitDevice(worker_in(folder, own, task))]
            sent = exchange(devices[0], 1, np.zeros((len(present), 1), np.float32))
            read = np.zeros(len(present))
            read[task.drawn()] = sent[:, 0] * len(present) / whole
            return read / (2.0 * clip) + 0.5

        return run, lambda: devices[0].worker.ledgers.of(0)

    return build


def _responses(config: RunConfig, epsilon: float, size: float, folder: Path, worlds: int) -> Built:
    """The labels that the device trains on; each call is a device that has told none yet."""
    own = audit_config(
        config,
        folder,
        strategy="fedsgd-lora",
        privacy__mechanism="randomised-response",
        privacy__target_epsilon=epsilon,
        train__batch_rows=worlds,
    )
    workers: list[Worker] = []
    places = (folder / str(number) for number in itertools.count())

    def run(present: Coins) -> Floats:
        task = OneWord(own, present, 1.0)
        workers[:] = [worker_in(next(places), own, task)]
        told = PrivateCut(workers[0]).relabelled(task.batch(0, 1, 0), Event(0, 1)).targets
        read = np.zeros(len(present))
        read[task.drawn()] = told.numpy()
        return read

    return run, lambda: workers[0].ledgers.of(0)


def _release(config: RunConfig, mu: float, size: float, folder: Path, worlds: int) -> Built:
    """The vectors of a shard; each call is another device, for a sample that stays has the same noise."""
    own = audit_config(
        config,
        folder,
        strategy="fedsgd-lora",
        privacy__mechanism="release-once",
        privacy__noise_multiplier=1.0 / mu,
        train__devices=MOST_DEVICES,
    )
    workers: list[Worker] = []
    devices = itertools.count()

    def run(present: Coins) -> Floats:
        task = Empty(own, present, size * own.privacy.clip)
        workers[:] = [worker_in(folder, own, task)]
        return Releases(workers[0]).of(next(devices)).vectors[:, 0] / own.privacy.clip

    return run, lambda: workers[0].ledgers.of(0)


def _client(config: RunConfig, mu: float, size: float, folder: Path, worlds: int) -> Built:
    """One step of the server on updates along one coordinate each."""
    own = audit_config(
        config,
        folder,
        strategy="fedavg-lora",
        privacy__mechanism="client",
        privacy__noise_multiplier=1.0 / mu,
        train__devices=worlds,
    )
    clip, every = own.privacy.clip, list(range(worlds))
    updates = size * clip * np.eye(worlds, dtype=np.float32)
    servers: list[DeviceDp] = []

    def run(present: Coins) -> Floats:
        rule = FedAvgLora(own)
        rule.init(np.zeros(worlds, np.float32), every, Layout(worlds, ()))
        servers[:] = [DeviceDp(rule)]
        servers[0].begin(Turn(ids=every, steps=[1] * worlds, factors=[1.0] * worlds))
        for device in np.flatnonzero(present).tolist():
            servers[0].fold(device, updates[device], 1.0)
        servers[0].end(1)
        rule.step()
        return rule.models()[0].astype(np.float64) * worlds / clip

    return run, lambda: servers[0].books.of(min(servers[0].members))


MOST_DEVICES = 10_000
SUBJECTS: dict[str, tuple[int, Build]] = {
    "dp-sgd": (1000, _dp_sgd),
    "client": (500, _client),
    "jacobian": (20_000, _at_the_cut("jacobian")),
    "logit": (20_000, _at_the_cut("logit")),
    "randomised-response": (20_000, _responses),
    "release-once": (2000, _release),
}
