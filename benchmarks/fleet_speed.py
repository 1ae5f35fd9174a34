"""How long one turn of the fleet takes: the world moves on, a choice, the band, batteries and queues.

One thread's CPU time (``time.thread_time``), the median of repeated turns 20 virtual seconds apart, at the
defaults of ``pyproject.toml`` (UMa, 40 % of the devices move, 30 % can be reached) with mixed profiles:

    advance + look      ``fedlam_app/wireless/fleet.py``
    state + select      what an edge server knows of each device, and the K best of V t - Q - eta Z
    share               min-max bandwidth among them, ``fedlam_app/wireless/allocate.py``
    spend + queues      batteries, and energy and participation queues of all devices

K is 100, 1,000 and 1,000, with 1 MHz for each. The score is drift plus penalty
by plain arrays, so that this is the fleet's time and not that of one policy's bookkeeping.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

# One thread: a linear algebra library would else start its own, and their time would not be counted.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.record import Figure, write_result
from fedlam_app.config import parse
from fedlam_app.wireless.allocate import min_max
from fedlam_app.wireless.fleet import Fleet, Load, View
from fedlam_app.wireless.power import radio_energy_j

T = TypeVar("T")

SEED = 2025
STEP_S = 20.0
SIZES = ((10_000, 100, 60, "<= 4"), (100_000, 1000, 30, "<= 25"), (1_000_000, 1000, 11, "<= 200"))
BITS = 1.6e6 * 8  # each way
LOAD = Load(flops=128 * 0.9e9, bits_up=BITS, bits_down=BITS)
V, ETA, BUDGET_J = 1.0, 5.0, 1.0
PARTS = ("advance", "look", "select", "share", "queues")


class Turns:
    """A fleet, its queues, and the CPU time of each part of its turns."""

    def __init__(self, devices: int, wanted: int) -> None:
        run = parse({"fleet.profiles": "mixed", "wireless.band-mhz": float(wanted)})
        self.fleet = Fleet(run.fleet, run.wireless, devices, SEED, np.full(devices, 128.0))
        self.wanted, self.band_hz = wanted, wanted * 1e6
        self.energy = np.zeros(devices, np.float32)
        self.absence = np.zeros(devices, np.float32)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def turn(self, number: int) -> None:
        """Take one turn, timing its parts."""
        self.timed("advance", lambda: self.fleet.advance(number * STEP_S))
        view = self.timed("look", lambda: self.fleet.look(number, self.wanted, LOAD))
        places, spent = self.timed("select", lambda: self.select(view))
        chosen = view.at(places)
        self.timed("share", lambda: self.share(chosen))
        self.timed("queues", lambda: self.queues(chosen, spent))

    def timed(self, part: str, action: Callable[[], T]) -> T:
        """Return what ``action`` returns, its CPU time noted."""
        began = time.thread_time()
        result = action()
        self.seconds[part].append(time.thread_time() - began)
        return result

    def select(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Return the K places of least score, and the energy of each."""
        share = np.float32(self.band_hz / self.wanted)
        factor, cap = np.float32(self.fleet.link.snr_factor), np.float32(self.fleet.link.cap)
        efficiency = np.float32(self.fleet.link.efficiency) * np.log2(1.0 + factor * view.gain_hz / share)
        upload_s = np.float32(BITS) / (share * np.minimum(efficiency, cap))
        energy = view.compute_j + radio_energy_j(view.power_w, upload_s)
        time_s = view.down_s + view.compute_s + upload_s
        score = (
            np.float32(V) * time_s + self.energy[view.ids] * energy - np.float32(ETA) * self.absence[view.ids]
        )
        places = np.sort(np.argpartition(score, self.wanted)[: self.wanted])
        return places, energy[places]

    def share(self, chosen: View) -> None:
        """Give the chosen their bands."""
        link = self.fleet.link
        min_max(
            np.full(len(chosen.ids), BITS / link.efficiency),
            chosen.gain_hz * link.snr_factor,
            chosen.down_s + chosen.compute_s,
            self.band_hz,
            link.cap / link.efficiency,
        )

    def queues(self, chosen: View, spent: np.ndarray) -> None:
        """Draw from batteries, and bring up the queues of everybody."""
        self.fleet.spend(chosen.ids, spent)
        self.energy -= np.float32(BUDGET_J)
        self.energy[chosen.ids] += spent
        np.maximum(self.energy, 0.0, out=self.energy)
        self.absence += np.float32(0.5 * self.wanted / len(self.absence))
        self.absence[chosen.ids] -= 1.0
        np.maximum(self.absence, 0.0, out=self.absence)


def main() -> int:
    """Measure, write ``results/fleet_speed.json``; 0 where every bound holds."""
    figures: list[Figure] = []
    parts: dict[str, dict[str, float]] = {}
    for devices, wanted, turns, bound in SIZES:
        world = Turns(devices, wanted)
        for number in range(1, turns + 1):
            world.turn(number)
        each = np.array([world.seconds[part] for part in PARTS])[:, 1:]  # the first turn warms caches up
        whole = float(np.median(each.sum(0)))
        parts[f"{devices}"] = dict(zip(PARTS, (np.median(each, axis=1) * 1e3).round(3).tolist(), strict=True))
        name = f"{devices:,} devices"
        figures += [
            Figure("wireless", f"full round, {name}, one thread's CPU time", whole * 1e3, "ms", bound),
            Figure("wireless", f"full round, {name}, devices a second", devices / whole, "1/s"),
            Figure("wireless", f"fleet of {name}", world.fleet.nbytes / devices, "B a device", "<= 200"),
        ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    print(parts)
    write_result("fleet_speed", figures, seed=SEED, extra={"ms of each part": parts})
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
