"""How long one turn of the fleet takes: the world moves on, a choice, the band, batteries and queues.

What a run does around a round of training, ``Wireless.turn`` and ``Wireless.settle``
(``strategies/wireless.py``), at the defaults of ``pyproject.toml`` (UMa, 40 % of the devices move, 30 % can
be reached, drift plus penalty, min-max bandwidth) with mixed profiles. One thread's CPU time
(``time.thread_time``), the median of turns that follow each other on the fleet's own clock:

    advance     positions, path loss, sessions, batteries: ``fedlam_app/wireless/fleet.py``
    look        gains, times, energies of who can be reached, and what an edge server knows of them
    select      drift plus penalty: ``strategies/selection/lyapunov.py``
    share       bands, packets, who arrives: the rest of the turn
    settle      the clock, batteries, queues and history

K is 100, 1,000 and 1,000, with 1 MHz for each. Half of the devices have been heard of before the first turn.
Memory: all arrays over devices of the fleet, the history and the queues. What devices answer (their losses)
is made up outside of the time.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable

# One thread: a linear algebra library would else start its own, and their time would not be counted.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.config import parse
from fedlam_app.wireless.fleet import Load
from strategies.participation import Heard
from strategies.wireless import Wireless

SEED = 2025
SIZES = ((10_000, 100, 60, "<= 4"), (100_000, 1000, 30, "<= 25"), (1_000_000, 1000, 11, "<= 200"))
STEPS, EXAMPLES = 4, 128.0
FLOPS, BITS = 128 * 0.9e9, 1.6e6 * 8  # of a turn; each way
PARTS = ("advance", "look", "select", "share", "settle")

Seconds = defaultdict[str, list[float]]


class Turns:
    """A fleet that takes part, and the CPU time of each part of its turns."""

    def __init__(self, devices: int, wanted: int) -> None:
        config = parse(
            {
                "job": "train",
                "task": "mixture",
                "seed": SEED,
                "fleet.profiles": "mixed",
                "wireless.band-mhz": float(wanted),
                "train.devices": devices,
                "train.cohort": wanted,
            }
        )
        self.draw = rng(SEED, "fleet-speed", devices)
        self.world = Wireless(config, STEPS, np.full(devices, EXAMPLES, np.float32))
        heard = self.draw.random(devices) < 0.5
        self.world.history.loss[heard] = self.draw.uniform(0.1, 2.5, int(heard.sum()))
        bits, flops = np.full(devices, BITS, np.float32), np.full(devices, FLOPS, np.float32)
        self.load = Load(flops=flops, bits_up=bits, bits_down=bits, broadcast=True)
        self.seconds: Seconds = defaultdict(list)
        watch(self.world.fleet, "advance", self.seconds)
        watch(self.world, "offered", self.seconds)
        watch(self.world.policy, "select", self.seconds)
        watch(self.world, "turn", self.seconds)
        watch(self.world, "settle", self.seconds)

    def turn(self, number: int) -> None:
        """Take one turn."""
        ids = self.world.turn(number, lambda: self.load, None).ids
        losses = dict(zip(ids, self.draw.uniform(0.1, 2.5, len(ids)).tolist(), strict=True))
        self.world.settle(Heard(loss=losses, norm=losses))

    def parts(self) -> np.ndarray:
        """Return the seconds (turns, parts), without the first turn: it warms caches up."""
        known = {name: np.array(found)[1:] for name, found in self.seconds.items()}
        before = known["advance"] + known["offered"] + known["select"]
        rest = known["turn"] - before
        return np.stack([known["advance"], known["offered"], known["select"], rest, known["settle"]], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays over devices."""
        rooms = (self.world.history, self.world.policy)
        owned = [value for room in rooms for value in vars(room).values() if isinstance(value, np.ndarray)]
        return self.world.fleet.nbytes + sum(array.nbytes for array in owned)


def watch(owner: object, name: str, seconds: Seconds, clock: Callable[[], float] = time.thread_time) -> None:
    """Have every call of the method ``name`` of ``owner`` add how long it took to ``seconds[name]``."""
    action = getattr(owner, name)

    def timed(*arguments: object, **named: object) -> object:
        began = clock()
        try:
            return action(*arguments, **named)
        finally:
            seconds[name].append(clock() - began)

    setattr(owner, name, timed)


def main() -> int:
    """Measure, write ``results/fleet_speed.json``; 0 where every bound holds."""
    figures: list[Figure] = []
    parts: dict[str, dict[str, float]] = {}
    for devices, wanted, turns, bound in SIZES:
        world = Turns(devices, wanted)
        for number in range(1, turns + 1):
            world.turn(number)
        each = world.parts()
        whole = float(np.median(each.sum(1)))
        parts[f"{devices}"] = dict(zip(PARTS, (np.median(each, axis=0) * 1e3).round(3).tolist(), strict=True))
        parts[f"{devices}"]["virtual s a turn"] = round(world.world.now / turns, 2)
        name = f"{devices:,} devices"
        figures += [
            Figure("wireless", f"full round, {name}, one thread's CPU time", whole * 1e3, "ms", bound),
            Figure("wireless", f"full round, {name}, devices a second", devices / whole, "1/s"),
            Figure(
                "wireless",
                f"fleet of {name}, history, queues",
                world.nbytes / devices,
                "B a device",
                "<= 200",
            ),
        ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    print(parts)
    write_result("fleet_speed", figures, seed=SEED, extra={"ms of each part": parts})
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
