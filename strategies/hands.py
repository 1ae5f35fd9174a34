"""What a federation works with beside its rule: who takes part, from which models, how results add up.

Without a fleet these are null objects (the rule's own cohort, the newest model, every result as it is),
except for a rule that waits for no one. With one (``fleet_hands.py``) they follow from the configuration, so
that any rule runs under any policy and mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm
from strategies.analog import Wired
from strategies.buffered import Buffered
from strategies.clock import Paced
from strategies.device_dp import DeviceDp
from strategies.loads import WholeLoad
from strategies.participation import Drawn, Heard, Loads, Participation, Poll, Turn
from strategies.reception import Straight
from strategies.split_meter import Unmetered
from strategies.versions import Newest, Versions


@dataclass
class Hands:
    """One experiment's."""

    participation: Participation
    versions: Newest
    reception: Straight
    meter: Unmetered
    whole: WholeLoad | None = None  # in adapter space, where there is a fleet
    receiver: Wired = field(default_factory=Wired)
    lost: list[int] = field(default_factory=list)  # whose results of this turn do not come through
    resting: bool = False  # nobody is left to work

    def __post_init__(self) -> None:
        self.participation.leave(self.reception.gone)

    @property
    def apart(self) -> bool:
        """Whether each result is needed on its own, and not only a sum."""
        return self.versions.apart or self.reception.apart or self.receiver.apart or bool(self.lost)

    def samples(self, device: int) -> float:
        """Return how much a local step of a device is, where that is known."""
        return 1.0 if self.whole is None else float(self.whole.samples[device])

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        """Return who works in step ``number``; nobody where nobody is left."""
        self.resting = self.participation.deserted
        if self.resting:
            return Turn(ids=[], steps=[], factors=[])
        return self.reception.admitted(self.participation.turn(number, load, poll), number)

    def begin(self, turn: Turn) -> Heard:
        """Open a turn; returns what is to be filled in with what comes of it."""
        self.lost = turn.lost
        self.receiver.begin(turn)
        self.reception.begin(turn)
        self.meter.begin()
        return Heard(bytes_up=self.meter.up, bytes_down=self.meter.down)

    def fold(self, turn: Turn, device: int, vector: Vector, weight: float, counted: bool = False) -> None:
        """Give the rule what a device of a turn made of its work; ``counted``: with its factor already."""
        if device in self.lost:
            return
        place = turn.ids.index(device)
        vector = self.receiver.vector(device, vector)
        weight *= 1.0 if counted else turn.factors[place]
        self.reception.fold(device, *self.versions.aged(turn, place, vector, weight))

    def settle(self, heard: Heard) -> None:
        """End a turn, after the rule's step."""
        if self.reception.private:
            heard.norm = dict.fromkeys(heard.norm, float("inf"))  # it came, and is as good as unknown
        if not self.resting:
            self.participation.settle(heard)
            self.versions.stepped(self.participation.at_work())
        self.participation.leave(self.reception.gone)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        own = {**self.participation.state(), **self.versions.state(), **self.meter.state()}
        return own | self.reception.state()

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`, and take what was its out of ``state``."""
        self.participation.load(state)
        self.versions.load(state)
        self.meter.restore(state)
        self.reception.load(state)
        self.participation.leave(self.reception.gone)


def without_radio(algorithm: Algorithm) -> Hands:
    """Return what there is without a fleet."""
    if not algorithm.waits:
        return Hands(Buffered(algorithm), Versions(algorithm), Straight(algorithm), Unmetered())
    own = Paced(algorithm) if algorithm.space == "gradient" else Drawn(algorithm)
    protects = algorithm.config.privacy.mechanism == "client"
    reception = DeviceDp(algorithm) if protects else Straight(algorithm)
    return Hands(own, Newest(algorithm), reception, Unmetered())
