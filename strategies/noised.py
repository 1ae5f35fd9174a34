"""A participation whose turns say what noise devices add: by the schedule, and less what the channel does.

Of each turn, by device: what its own noise multiplier z_k is multiplied by (``Turn.noise``), and on uncoded
links the noise of the receiver (``Turn.receiver``), and what of it counts at worst (``Turn.free``). Both the
noise that devices add themselves and what is there in the end go into the run's records, counted or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from fedlam_app.config import RunConfig
from fedlam_app.rules_wireless import has_fleet
from strategies.analog import Amplitudes
from strategies.noise_plan import Doubles, Even, plan_of
from strategies.participation import Arrays, Heard, Loads, Participation, Poll, Turn

Said = Callable[[], dict[str, float]]
SAID = ("noise_factor", "z_asked", "z_artificial", "z_effective")
HEAD = "fleet.noise."


class Noised(Participation):
    """What it says is added to the turns of the participation inside."""

    def __init__(self, inner: Participation, even: Even, entries: int, also: Said) -> None:
        """``entries`` are those of what one sample sends; they matter to uncoded Jacobians alone.

        ``also`` is what the receiver of a sum has to say for the log.
        """
        self.also = also
        self.inner, self.even, config = inner, even, even.config
        self.foresees = inner.foresees  # type: ignore[misc]
        self.plan = plan_of(config, even)
        bounded = config.privacy.mechanism == "jacobian" and config.wireless.transport == "analog"
        self.amplitudes = Amplitudes(config, entries) if bounded else None
        self.said = np.zeros(5)  # releases, and sums over them: factor, z asked, artificial, effective
        self._z: dict[int, float] = {}
        self._new: dict[int, Doubles] = {}  # by turn, until it is settled

    def __getattr__(self, name: str) -> Any:
        """Whatever else the participation inside knows."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        turn = self.inner.turn(number, load, poll)
        noise = self.plan.factors(number, turn)
        if not turn.ids:
            return turn
        factors = np.array(noise or [1.0] * len(turn.ids))
        told = np.zeros(5)
        told[:2] = len(factors), factors.sum()
        turn = replace(turn, noise=noise)
        if self.amplitudes is not None:
            z = np.array([self._asked(k) for k in turn.ids]) * factors
            free, own, heard = self.amplitudes.of(np.array(turn.snr), np.array(turn.mean_snr), z)
            counted = self.even.config.privacy.count_channel_noise
            turn = replace(turn, receiver=heard.tolist(), free=free.tolist() if counted else [])
            told[2:] = z.sum(), own.sum(), np.hypot(own, heard).sum()
        self._new[number] = told
        return turn

    def settle(self, heard: Heard) -> None:
        self.plan.settle()
        first = min(self._new, default=0)  # the next turn may have been asked for already
        self.said = self.said + self._new.pop(first, 0.0)
        self.inner.settle(heard)

    def at_work(self) -> set[int]:
        return self.inner.at_work()

    @property
    def deserted(self) -> bool:
        return self.inner.deserted

    def leave(self, devices: Collection[int]) -> None:
        self.inner.leave(devices)

    def seconds(self) -> float:
        return self.inner.seconds()

    def summary(self) -> dict[str, float]:
        """Return the means over what devices were asked for: z over C, and what of it they add themselves.

        ``z_effective`` has the receiver's noise in it as the simulated receiver has it, counted or not.
        """
        count, *sums = self.said.tolist()
        means = [total / max(count, 1.0) for total in sums]
        known = SAID if self.amplitudes is not None else SAID[:1]
        return self.inner.summary() | dict(zip(known, means, strict=False)) | self.also()

    def state(self) -> Arrays:
        own = {"said": self.said, **self.plan.state()}
        return {**self.inner.state(), **{f"{HEAD}{name}": array for name, array in own.items()}}

    def load(self, state: Arrays) -> None:
        own = {key[len(HEAD) :]: state.pop(key) for key in [key for key in state if key.startswith(HEAD)]}
        self.said = np.array(own.pop("said"), np.float64)
        self.plan.load(own)
        self.inner.load(state)

    def _asked(self, device: int) -> float:
        if device not in self._z:
            self._z[device] = self.even.z(device)
        return self._z[device]


def says(config: RunConfig) -> bool:
    """Whether turns say anything of noise."""
    uncoded = has_fleet(config) and config.wireless.transport != "ofdma"
    return config.privacy.on and (config.privacy.schedule != "uniform" or uncoded)


def noised(
    inner: Participation, config: RunConfig, space: str, examples: Doubles, entries: int, also: Said
) -> Noised:
    """Return a participation of a rule of that ``space``, with what its turns say of noise."""
    return Noised(inner, Even(config, examples, config.train.steps(space)), entries, also)
