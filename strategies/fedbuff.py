"""FedBuff: the server steps as soon as a few gradients are there, however old the model they were taken at.

J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639.

    g = sum_{k in buffer} n_k s(j_k) g_k(w_{t - j_k}) / sum_{k in buffer} n_k,   s(j) = 1 / sqrt(1 + j)

``train.cohort`` devices (0: all) are at work at any time, each on the version of the model that it started
from; the first ``fedbuff.buffer`` to finish on the virtual clock (see ``clock.py``) make a step, ties by
device. The sum is divided by the batch sizes alone: as in the paper, a stale buffer makes a shorter step.

Departures: a device that has finished rests until the step that its gradient enters, and then starts on the
new version, or another idle device, by keyed draw; in the paper a device starts whenever one finishes. A
buffer larger than the number at work could never fill and is cut to it. A device that does not answer is
drawn again like one that did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector
from strategies.algorithm import Vectors
from strategies.fedsgd_lora import FedSgdLora


class FedBuff(FedSgdLora):
    """``models()`` are the versions still at work, oldest first; the last is the newest, and the result."""

    linear: ClassVar[bool] = False
    foresees: ClassVar[bool] = False

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(vector, devices, layout)
        self.versions = {0: self.vector}  # by the number of steps that made them
        self.work: dict[int, tuple[float, int]] = {}  # device: (when it finishes, version it started from)
        wanted = self.config.train.cohort
        self.start(wanted if 0 < wanted < len(self.devices) else len(self.devices))

    def cohort(self, number: int) -> list[int]:
        """Return the next to finish, in ascending order."""
        first = sorted(self.work, key=lambda device: (self.work[device][0], device))
        return sorted(first[: self.config.fedbuff.buffer])

    def rows(self, cohort: Sequence[int]) -> list[int]:
        places = {version: row for row, version in enumerate(self.versions)}
        return [places[self.work[device][1]] for device in cohort]

    def staleness(self, device: int) -> int:
        """Return how many steps the model has taken since this device started."""
        return self.steps - self.work[device][1]

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        damp = 1.0 / math.sqrt(1.0 + self.staleness(device))
        super().fold(device, np.multiply(vector, damp, dtype=np.float64), weight)

    def step(self) -> None:
        super().step()
        finished = self.cohort(self.steps)
        for device in finished:
            del self.work[device]
        self.versions[self.steps] = self.vector
        self.start(len(finished))
        used = {version for _, version in self.work.values()}
        self.versions = {version: w for version, w in self.versions.items() if version in used}

    def end(self) -> float:
        return max(self.work[device][0] for device in self.cohort(self.steps))

    def start(self, count: int) -> None:
        """Let ``count`` idle devices, by keyed draw, start now on the newest version."""
        idle = [device for device in self.devices if device not in self.work]
        draw = rng(self.config.seed, "fedbuff", self.steps)
        for device in draw.choice(idle, count, replace=False).tolist():
            self.work[device] = (self.now + self.times[device], self.steps)

    def models(self) -> Vectors:
        return np.stack(list(self.versions.values()))  # (m, p)

    def scored(self) -> Vectors:
        return self.vector[None]

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {
            **super().state(),
            "versions": np.array(list(self.versions)),  # (m,)
            "working": np.array(list(self.work)),  # (c,) device ids
            "finishes": np.array([finish for finish, _ in self.work.values()]),  # (c,)
            "started": np.array([version for _, version in self.work.values()]),  # (c,)
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        super().load(state)
        models = state["models"].astype(self.vector.dtype)
        self.versions = dict(zip(state["versions"].tolist(), models, strict=True))
        self.vector = models[-1]
        jobs = zip(state["finishes"].tolist(), state["started"].tolist(), strict=True)
        self.work = dict(zip(state["working"].tolist(), jobs, strict=True))
