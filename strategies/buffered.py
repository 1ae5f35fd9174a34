"""Nobody waits, without a fleet: the first few to finish on the virtual clock make a step.

J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639.
``train.cohort`` devices (0: all) are at work at any time, each on the version of the model that it started
from; the first ``fedbuff.buffer`` to finish, by the durations of ``clock.py``, ties by device, make a step.

Departures: a device that has finished rests until the step that its gradient enters, and then it starts on
the new version, or another idle device, by keyed draw; in the paper a device starts whenever one finishes. A
buffer larger than the number at work could never fill and is cut to it. A device that does not answer is
drawn again like one that did.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedlam_app.base.keys import rng
from strategies.algorithm import Algorithm
from strategies.clock import Paced
from strategies.participation import Arrays, Heard, Loads, Poll, Turn


class Buffered(Paced):
    """Who is at work, since when, and on which version of the model."""

    foresees: ClassVar[bool] = False

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        self.work: dict[int, tuple[float, int]] = {}  # device: (when it finishes, steps taken when it began)
        wanted, there = algorithm.config.train.cohort, len(algorithm.devices)
        self._send(wanted if 0 < wanted < there else there)

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        ids = self._first()
        versions = [self.work[device][1] for device in ids]
        return Turn(ids=ids, steps=[self.steps] * len(ids), factors=[1.0] * len(ids), versions=versions)

    def settle(self, heard: Heard) -> None:
        finished = self._first()
        super().settle(heard)
        for device in finished:
            del self.work[device]
        self._send(len(finished))

    def at_work(self) -> set[int]:
        return {version for _, version in self.work.values()}

    def end(self) -> float:
        return max(self.work[device][0] for device in self._first())

    def state(self) -> Arrays:
        return {
            **super().state(),
            "fleet.working": np.array(list(self.work)),  # (c,) device ids
            "fleet.finishes": np.array([finish for finish, _ in self.work.values()]),  # (c,)
            "fleet.began": np.array([version for _, version in self.work.values()]),  # (c,)
        }

    def load(self, state: Arrays) -> None:
        super().load(state)
        columns = [state.pop(f"fleet.{name}").tolist() for name in ("working", "finishes", "began")]
        self.work = {device: (finish, began) for device, finish, began in zip(*columns, strict=True)}

    # --- helpers ------------------------------------------------------------------------------------

    def _first(self) -> list[int]:
        """Return the next to finish, in ascending order."""
        order = sorted(self.work, key=lambda device: (self.work[device][0], device))
        return sorted(order[: self.algorithm.config.fedbuff.buffer])

    def _send(self, count: int) -> None:
        """Let ``count`` idle devices, by keyed draw, start now on the newest version."""
        idle = [device for device in self.algorithm.devices if device not in self.work]
        draw = rng(self.algorithm.config.seed, "fedbuff", self.taken)
        for device in draw.choice(idle, count, replace=False).tolist():
            self.work[device] = (self.now + self.times[device], self.taken)
