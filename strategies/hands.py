"""What a federation works with beside its rule: who takes part, from which models, how results add up.

Without a fleet these are null objects (the rule's own cohort, the newest model, every result as it is),
except for a rule that waits for no one. With one (``fleet_hands.py``) they follow from the configuration, so
that any rule runs under any policy and mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm
from strategies.buffered import Buffered
from strategies.clock import Paced
from strategies.loads import WholeLoad
from strategies.participation import Drawn, Heard, Participation, Turn
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

    @property
    def apart(self) -> bool:
        """Whether each result is needed on its own, and not only a sum."""
        return self.versions.apart or self.reception.apart

    def samples(self, device: int) -> float:
        """Return how much a local step of a device is, where that is known."""
        return 1.0 if self.whole is None else float(self.whole.samples[device])

    def begin(self, turn: Turn) -> Heard:
        """Open a turn; returns what is to be filled in with what comes of it."""
        self.reception.begin(turn)
        self.meter.begin()
        return Heard(bytes_up=self.meter.up, bytes_down=self.meter.down)

    def fold(self, turn: Turn, device: int, vector: Vector, weight: float, counted: bool = False) -> None:
        """Give the rule what a device of a turn made of its work; ``counted``: with its factor already."""
        place = turn.ids.index(device)
        weight *= 1.0 if counted else turn.factors[place]
        self.reception.fold(device, *self.versions.aged(turn, place, vector, weight))

    def settle(self, heard: Heard) -> None:
        """End a turn, after the rule's step."""
        self.participation.settle(heard)
        self.versions.stepped(self.participation.at_work())

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        return {**self.participation.state(), **self.versions.state(), **self.meter.state()}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`, and take what was its out of ``state``."""
        self.participation.load(state)
        self.versions.load(state)
        self.meter.restore(state)


def without_radio(algorithm: Algorithm) -> Hands:
    """Return what there is without a fleet."""
    if not algorithm.waits:
        return Hands(Buffered(algorithm), Versions(algorithm), Straight(algorithm), Unmetered())
    own = Paced(algorithm) if algorithm.space == "gradient" else Drawn(algorithm)
    return Hands(own, Newest(algorithm), Straight(algorithm), Unmetered())
