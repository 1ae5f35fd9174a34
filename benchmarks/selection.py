"""What a choice costs, and whether it is the right one: each selection policy at 1k, 10k and 100k devices.

CPU time of one thread (``time.thread_time``, median) of ``select`` with all devices in reach, K = 100 of them
wanted, half of them heard before, with Rayleigh fading of its own each round. For policies that poll,
everybody was polled: the 100,000 are what ``select`` works on. Each policy plays some rounds first, and
learns from them, so that what it remembers is what it has in the middle of a run. TiFL's profile, each 50th
round, is a figure of its own. "Equal to the reference": 200 small random cases of three rounds each against
plain loops in double precision (``tests/selection_reference.py``).
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import numpy as np

from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.config import parse
from strategies.selection import POLICIES
from strategies.selection.base import RoundState
from tests.selection_reference import REFERENCES, agree, outcome

SEED, WANTED, CASES = 2025, 100, 200
SIZES = (1_000, 10_000, 100_000)
WARM, TIMED = 5, 25  # rounds
BAND_HZ, EFFICIENCY, MOST = 20e6, 0.75, 5.55  # of the link; the last in b/s/Hz
BITS = 1.6e6 * 8
BOUNDS_MS = {"oort": 4.0, "fedcs": 8.0}  # of 100k devices; all others are score policies
SCORE_MS = 1.5


def crowd(count: int) -> RoundState:
    """Return ``count`` devices in reach, of gains over four decades, and computers of a lognormal law."""
    draw = rng(SEED, "crowd", count)
    heard = draw.random(count) < 0.5
    last = np.where(heard, draw.integers(1, 100, count), 0)
    return RoundState(
        number=100,
        now_s=0.0,
        devices=count,
        wanted=WANTED,
        band_hz=BAND_HZ,
        ids=np.arange(count),
        gain_hz=(10.0 ** draw.uniform(5.0, 9.0, count)).astype(np.float32),
        fixed_s=draw.lognormal(3.0, 1.0, count).astype(np.float32),
        upload_s=np.ones(count, np.float32),
        bits=np.full(count, BITS, np.float32),
        energy_j=draw.lognormal(0.0, 1.0, count).astype(np.float32),
        examples=draw.lognormal(5.0, 1.0, count).astype(np.float32),
        loss=np.where(heard, draw.exponential(1.0, count), np.inf).astype(np.float32),
        norm=np.where(heard, draw.exponential(1.0, count), np.inf).astype(np.float32),
        last=last.astype(np.int32),
        count=heard.astype(np.int32),
    )


def rounds(state: RoundState, number: int) -> RoundState:
    """Return round ``number`` of these devices, with fading of its own."""
    gain = state.gain_hz * rng(SEED, "fading", number).exponential(1.0, len(state))
    band = BAND_HZ / WANTED
    rate = band * np.minimum(EFFICIENCY * np.log2(1.0 + gain / band), MOST)
    return replace(
        state,
        number=100 + number,
        gain_hz=gain.astype(np.float32),
        upload_s=(state.bits / rate).astype(np.float32),
    )


def spent_ms(name: str, states: list[RoundState]) -> tuple[float, float]:
    """Return the median CPU time [ms] of a choice, and that of the first."""
    policy = POLICIES[name](parse({}).selection, len(states[0]), SEED)
    times = []
    for state in states:
        draw = rng(SEED, "select", state.number)
        before = time.thread_time()
        choice = policy.select(state, draw)
        times.append(1e3 * (time.thread_time() - before))
        policy.feedback(outcome(state, choice.places, draw))
    return statistics.median(times[WARM:]), times[0]


def main() -> int:
    """Measure, write ``results/selection.json``; 0 where every bound holds."""
    figures = []

    def figure(name: str, value: float, unit: str = "", bound: str = "") -> None:
        figures.append(Figure("wireless", name, value, unit, bound))
        print(f"{name}: {value:.4g} {unit} {bound}", flush=True)

    for count in SIZES:
        base = crowd(count)
        states = [rounds(base, number) for number in range(1, WARM + TIMED + 1)]
        for name in REFERENCES:
            median, first = spent_ms(name, states)
            bound = f"<= {BOUNDS_MS.get(name, SCORE_MS)}" if count == SIZES[-1] else ""
            figure(f"{name}, {count:,} devices", median, "ms", bound)
            if name == "tifl":
                figure(f"{name}, {count:,} devices, with a profile", first, "ms")
    config = parse({"selection.candidates": 1.5, "selection.deadline-s": 40.0, "selection.reprofile": 2})
    for name in REFERENCES:
        equal = all(agree(name, config.selection, SEED + seed) for seed in range(CASES))
        figure(f"{name}, equal to the reference on {CASES} cases", float(equal), "", "== 1")
    write_result("selection", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
