"""Who takes part in a step, with how much work, at what weight, and what it costs in virtual time.

A federation asks its participation for a :class:`Turn`, has the devices of the turn do their work, and says
what came of it (:class:`Heard`). :class:`Drawn` is the world without radio and without time: the rule's own
cohort, everybody with all the work; ``clock.py`` adds a clock, ``buffered.py`` is that in which nobody waits
for anybody. ``wireless.py`` is the fleet, ``concurrent.py`` the fleet in which nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.wireless.fleet import Load
from strategies.algorithm import Algorithm

Arrays = dict[str, NDArray[np.generic]]
Loads = Callable[[], Load]  # counted where it is needed: it takes a pass over all devices
Poll = Callable[[Sequence[int]], Mapping[int, float]]  # asks devices for their loss at the current model


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The devices whose work is worth running: those whose results will be in.

    And those that work for nothing where that has a price: what has left a device has cost it privacy, though
    the packet is lost.
    """

    ids: list[int]  # ascending
    steps: list[int]  # local steps of each
    factors: list[float]  # what each one's weight is multiplied by
    base: float = 0.0  # what the sum of weights would be, were everyone there; 0: divide by the sum itself
    versions: list[int] = field(default_factory=list)  # the step whose model each began with; empty: this one
    snr: list[float] = field(default_factory=list)  # a symbol, faded; of uncoded links alone
    mean_snr: list[float] = field(default_factory=list)
    number: int = 0  # of the turn; 0: not said
    error: list[float] = field(default_factory=list)  # chance that its packet is lost; in a fleet alone
    lost: list[int] = field(default_factory=list)  # those of ``ids`` whose results will not be in
    receiver: list[float] = field(default_factory=list)  # std of the receiver's noise, over the clip
    noise: list[float] = field(default_factory=list)  # what each one's noise multiplier is multiplied by
    free: list[float] = field(default_factory=list)  # what of it the channel adds by itself, at worst

    def only(self, places: Sequence[int]) -> Turn:
        """Return the turn of the devices at these places alone."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "lost"}
        lists = {name: value for name, value in own.items() if isinstance(value, list) and value}
        kept: Any = {name: [value[p] for p in places] for name, value in lists.items()}
        return replace(self, **kept, lost=[k for k in self.lost if k in kept["ids"]])

    def privacy(self, devices: Sequence[int]) -> tuple[list[float], list[float]]:
        """Return ``noise`` and ``free`` of some devices, of this turn or not; empty where nothing is said."""
        at = {k: place for place, k in enumerate(self.ids)}
        noise = [self.noise[at[k]] if k in at else 1.0 for k in devices] if self.noise else []
        free = [self.free[at[k]] if k in at else 0.0 for k in devices] if self.free else []
        return noise, free


@dataclass(kw_only=True)
class Heard:
    """What came of a turn, by device."""

    loss: dict[int, float] = field(default_factory=dict)  # of those whose results were folded
    norm: dict[int, float] = field(default_factory=dict)  # of their updates
    bytes_up: dict[int, int] = field(
        default_factory=dict
    )  # as serialised, where that was not planned exactly
    bytes_down: dict[int, int] = field(default_factory=dict)

    def of(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return loss and norm (k,) of these devices, NaN where nothing was heard."""
        names = ids.tolist()
        loss = np.array([self.loss.get(k, np.nan) for k in names])
        return loss, np.array([self.norm.get(k, np.nan) for k in names])

    def bits(
        self, ids: NDArray[np.int64], up: NDArray[np.float64], down: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the bits (k,) that really travelled, up and down; as planned where nothing else was said."""
        real_up, real_down = up.copy(), down.copy()
        for place, k in enumerate(ids.tolist()):
            real_up[place] = 8.0 * self.bytes_up[k] if k in self.bytes_up else up[place]
            real_down[place] = 8.0 * self.bytes_down[k] if k in self.bytes_down else down[place]
        return real_up, real_down


class Participation:
    """The contract."""

    foresees: ClassVar[bool] = False  # the next turn does not depend on how this one went

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        """Return who works in step ``number`` (1-based); the same answer until :meth:`settle`."""
        raise NotImplementedError

    def settle(self, heard: Heard) -> None:
        """End the turn: the clock moves on, and whoever chooses learns."""

    def at_work(self) -> set[int]:
        """Return the versions of the model that devices are at work on, beside the newest."""
        return set()

    @property
    def deserted(self) -> bool:
        """Whether nobody is left who could take part."""
        return False

    def leave(self, devices: Collection[int]) -> None:
        """Choose these no more, and whoever else there is."""
        raise NotImplementedError

    def seconds(self) -> float:
        """Return the virtual time so far."""
        raise NotImplementedError

    def summary(self) -> dict[str, float]:
        """Return what the run's log says of it."""
        return {}

    def state(self) -> Arrays:
        """Return the arrays that a resumed run continues from; every name begins with ``fleet.``."""
        return {}

    def load(self, state: Arrays) -> None:
        """Continue from :meth:`state`."""


class Drawn(Participation):
    """No radio: the rule's cohort does all the work."""

    foresees: ClassVar[bool] = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm, self.steps = algorithm, algorithm.config.train.local_steps

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        ids = self.algorithm.cohort(number)
        return Turn(ids=ids, steps=[self.steps] * len(ids), factors=[1.0] * len(ids))

    @property
    def deserted(self) -> bool:
        return len(self.algorithm.absent) == len(self.algorithm.devices)

    def leave(self, devices: Collection[int]) -> None:
        self.algorithm.absent = frozenset(devices)

    def seconds(self) -> float:
        return 0.0
