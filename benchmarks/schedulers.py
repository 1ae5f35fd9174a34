"""The two Lyapunov schedulers against brute force, their own budgets, and simpler ways to choose.

FedFT's scheduler, in a cell of 20 devices: 10 MHz, 23 dBm at 20 to 300 m, path loss 128.1 + 37.6 lg(d / km),
-174 dBm/Hz, Rayleigh fading of one draw a round; int8 embeddings of 16 sentences of 48 tokens at width 384 go
up, and their Jacobians; a round shall take 0.2 s in the long run. Devices compute for 10 to 100 ms. V is the
largest of a grid that keeps the target to 1 % in one cell, and is then used in others. The others choose 8
devices in each of 12 cells, and finish together or share the band equally.

Drift plus penalty, in a fleet of 500 of which 25 are wanted: 0.3 to 0.9 J over the fading (at least 0.05) a
round, a budget of 0.03 J, a floor of 2 % of the rounds, lognormal utilities, eta = 1; 4,000 rounds. Times are
of a fleet of 100,000 that can all be reached, of which 100 are wanted, with queues drawn, and after 60 rounds
of a fleet in which nothing changes, so that the fast have no weight left; CPU time of one thread, medians.
The rest is ours, and matters: without compute times the exact latency is about 0.82 of best gain's with equal
bandwidth, and with 0.1 to 0.4 J (longer queues) the worst device is at 1.18 of its budget.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import Figure, write_result
from benchmarks.timing import cpu_s
from fedlam_app.base.keys import rng
from fedlam_app.config import parse
from fedlam_app.wireless.allocate import equal, min_max
from strategies.selection.base import Outcome, Places, RoundState
from strategies.selection.fedft import FedFt, earliest, schedule
from strategies.selection.lyapunov import Lyapunov

SEED, DEVICES, BAND_HZ, TARGET_S, CHOSEN = 2025, 20, 10e6, 0.2, 8
BITS = 8.0 * (16 * 48 * 384 + 16 * 384)
ALL_BITS = np.full(DEVICES, BITS)
ROUNDS, CELLS = 1000, 12
GRID_V = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
FLEET, WANTED, BUDGET_J, FLOOR = 500, 25, 0.03, 0.02
LONG, RISING_V = 4000, (0.01, 0.1, 1.0, 10.0)
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Twenty devices around a base station: what they compute, and their gain without fading."""

    seed: int
    fixed_s: Doubles
    mean_hz: Doubles

    @classmethod
    def drawn(cls, seed: int) -> Cell:
        draw = rng(SEED, "cell", seed)
        loss_db = 128.1 + 37.6 * np.log10(draw.uniform(20, 300, DEVICES) / 1e3)
        return cls(seed, draw.uniform(0.01, 0.1, DEVICES), 10 ** ((23.0 + 174.0 - loss_db) / 10))

    def rounds(self, count: int) -> Iterator[Doubles]:
        """Yield the gains [Hz] of each round."""
        draw = rng(SEED, "fading", self.seed)
        for _ in range(count):
            yield self.mean_hz * draw.standard_exponential(DEVICES)


def in_round(number: int, wanted: int, band_hz: float, **known: NDArray[np.generic]) -> RoundState:
    """Return a round in which all devices can be reached; what is not given is one, or zero."""
    devices = len(known["fixed_s"])
    ones, zeros = np.ones(devices, np.float32), np.zeros(devices, np.int32)
    names = ("gain_hz", "fixed_s", "upload_s", "bits", "energy_j", "examples", "loss", "norm")
    return RoundState(
        number=number,
        now_s=0.0,
        devices=devices,
        wanted=wanted,
        band_hz=band_hz,
        ids=np.arange(devices),
        last=zeros,
        count=zeros,
        **{name: known.get(name, ones).astype(np.float32) for name in names},  # type: ignore[arg-type]
    )


def came(state: RoundState, places: Places, round_s: float) -> Outcome:
    """Return the outcome of a round in which everyone came in."""
    nothing = np.full(len(places), np.nan)
    return Outcome(
        number=state.number,
        ids=state.ids[places],
        arrived=np.ones(len(places), np.bool_),
        time_s=state.time_s[places].astype(np.float64),
        energy_j=state.energy_j[places].astype(np.float64),
        loss=nothing,
        norm=nothing,
        examples=state.examples[places].astype(np.float64),
        round_s=round_s,
    )


def against_brute_force() -> list[Figure]:
    """Return on how many of 100 unlike cells of at most 8 devices another set is better, or as good."""
    wrong, worst = 0, 0.0
    for case in range(100):
        draw = rng(SEED, "brute", case)
        count = int(draw.integers(2, 9))
        bits, gain = 10 ** draw.uniform(5.0, 7.5, count), 10 ** draw.uniform(5.0, 10.0, count)
        fixed, band_hz = draw.uniform(0.0, 1.0, count), 10 ** draw.uniform(5.0, 8.0)
        v, queue = 10 ** draw.uniform(-2.0, 1.0, 2)
        sets = [list(s) for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
        costs = [v / len(s) + queue * min_max(bits[s], gain[s], fixed[s], band_hz)[1] for s in sets]
        found, tau = schedule(bits, gain, fixed, band_hz, count, v, queue)
        wrong += found.tolist() != sets[int(np.argmin(costs))]
        worst = max(worst, abs((v / len(found) + queue * tau) / min(costs) - 1.0))
    return [
        Figure("wireless", "FedFT scheduler, sets unlike brute force's, of 100", wrong, "sets", "== 0"),
        Figure("wireless", "FedFT scheduler, objective off brute force's, relative", worst, "", "<= 1e-6"),
    ]


def long_run(cell: Cell, v: float) -> tuple[float, float, float]:
    """Return the mean delay [s], the mean number of devices, and the median CPU seconds of a choice."""
    config = parse({"selection.v": v, "selection.latency-budget-s": TARGET_S}).selection
    policy, unused = FedFt(config, DEVICES, cell.seed), rng(SEED, "unused")
    delays, numbers, seconds = [], [], []
    for number, gain in enumerate(cell.rounds(ROUNDS), 1):
        state = in_round(number, DEVICES, BAND_HZ, gain_hz=gain, fixed_s=cell.fixed_s, bits=ALL_BITS)
        began = time.thread_time()
        places = policy.select(state, unused).places
        seconds.append(time.thread_time() - began)
        _, delay = min_max(BITS, gain[places], cell.fixed_s[places], BAND_HZ)
        policy.feedback(came(state, places, delay))
        delays.append(delay)
        numbers.append(len(places))
    return float(np.mean(delays)), float(np.mean(numbers)), float(np.median(seconds))


def target() -> list[Figure]:
    """Return whether the long-run mean delay is the target's, and what it costs to keep."""
    tuned = Cell.drawn(0)
    v = next(v for v in GRID_V if abs(long_run(tuned, v)[0] / TARGET_S - 1.0) <= 0.01)
    results = np.array([long_run(Cell.drawn(seed), v) for seed in range(1, 6)])
    off = float(np.abs(results[:, 0] / TARGET_S - 1.0).max())
    greedy = np.mean([_within_target(Cell.drawn(seed)) for seed in range(1, 6)])
    return [
        Figure("wireless", "FedFT scheduler, V chosen on another cell", v, ""),
        Figure("wireless", "FedFT scheduler, mean delay off its target, worst of 5", off, "", "<= 0.05"),
        Figure("wireless", "FedFT scheduler, devices a round", results[:, 1].mean(), "devices"),
        Figure("wireless", "as many as make the target every round", float(greedy), "devices"),
        Figure("wireless", "FedFT scheduler at K = 20, CPU", 1e3 * results[:, 2].mean(), "ms", "<= 60"),
    ]


def _within_target(cell: Cell) -> float:
    """Return how many devices a round has where each must keep the target by itself: no queue."""
    numbers = np.arange(1, DEVICES + 1)
    taus = [earliest(ALL_BITS, gain, cell.fixed_s, BAND_HZ, numbers)[0] for gain in cell.rounds(ROUNDS // 10)]
    return float((np.array(taus) <= TARGET_S).sum(axis=1).mean())


Chooser = Callable[[int, Doubles, Doubles, np.random.Generator], Places]  # of round, gain, mean gain, draw


def everyone(number: int, gain: Doubles, mean: Doubles, draw: np.random.Generator) -> Places:
    return np.arange(len(gain))


def at_random(number: int, gain: Doubles, mean: Doubles, draw: np.random.Generator) -> Places:
    return draw.permutation(len(gain))[:CHOSEN]


def round_robin(number: int, gain: Doubles, mean: Doubles, draw: np.random.Generator) -> Places:
    return (number * CHOSEN + np.arange(CHOSEN)) % len(gain)


def best_gain(number: int, gain: Doubles, mean: Doubles, draw: np.random.Generator) -> Places:
    return np.argsort(-gain)[:CHOSEN]


def proportional_fair(number: int, gain: Doubles, mean: Doubles, draw: np.random.Generator) -> Places:
    """Return the best for their means, by rate over an equal share of the band."""
    share = BAND_HZ / CHOSEN
    return np.argsort(-np.log1p(gain / share) / np.log1p(mean / share))[:CHOSEN]


def latencies() -> list[Figure]:
    """Return median latencies of 8 devices, exact and by others, over rounds and cells."""
    choosers: tuple[Chooser, ...] = (everyone, at_random, round_robin, proportional_fair, best_gain)
    exact: list[float] = []
    others: dict[str, list[float]] = {}
    for cell in map(Cell.drawn, range(CELLS)):
        draw = rng(SEED, "choosers", cell.seed)
        for number, gain in enumerate(cell.rounds(60)):
            exact += earliest(ALL_BITS, gain, cell.fixed_s, BAND_HZ, np.array([CHOSEN]))[0].tolist()
            for chooser in choosers:
                name = chooser.__name__.replace("_", " ")
                places = chooser(number, gain, cell.mean_hz, draw)
                ours = (BITS, gain[places], cell.fixed_s[places], BAND_HZ)
                others.setdefault(f"{name}, equal bandwidth", []).append(equal(*ours)[1])
                others.setdefault(f"{name}, min-max bandwidth", []).append(min_max(*ours)[1])
    medians = {name: float(np.median(found)) for name, found in others.items()}
    best, ours_s = "best gain, equal bandwidth", float(np.median(exact))
    return [
        Figure("wireless", "8 of 20, median latency: exact", ours_s, "s"),
        *(Figure("wireless", f"8 of 20, median latency: {name}", s, "s") for name, s in medians.items()),
        Figure("wireless", f"8 of 20, exact over {best}", ours_s / medians[best], "x", "<= 0.80"),
    ]


def budgets(seed: int, v: float) -> tuple[float, float, float]:
    """Return the worst E / budget, the utility a round, and by how much a queue law is broken, if above 0."""
    flat = {"v": v, "eta": 1.0, "participation": FLOOR * FLEET / WANTED, "energy-budget-j": BUDGET_J}
    policy = Lyapunov(
        parse({f"selection.{key}": value for key, value in flat.items()}).selection, FLEET, seed
    )
    draw = rng(SEED, "budgets", seed)
    examples, cost_j = draw.lognormal(0.0, 1.0, FLEET), draw.uniform(0.3, 0.9, FLEET)
    fixed = draw.lognormal(0.0, 0.5, FLEET)
    utility = np.sqrt(examples / np.median(examples))
    spent, rounds, total = np.zeros(FLEET), np.zeros(FLEET), 0.0
    for number in range(1, LONG + 1):
        fade = np.maximum(draw.standard_exponential(FLEET), 0.05)
        known = {"upload_s": 0.2 / fade, "energy_j": cost_j / fade, "examples": examples}
        state = in_round(number, WANTED, 1.0, fixed_s=fixed, **known)
        places = policy.select(state, draw).places
        outcome = came(state, places, 1.0)
        policy.feedback(outcome)
        spent[places] += outcome.energy_j
        rounds[places] += 1
        total += float(utility[places].sum())
    broken = (
        spent / LONG - BUDGET_J - policy.energy / LONG,
        FLOOR - policy.participation / LONG - rounds / LONG,
    )
    return float(spent.max()) / (LONG * BUDGET_J), total / LONG, float(np.max(broken))


def long_budgets() -> list[Figure]:
    """Return the budgets' figures: three fleets at V = 1, one at rising V."""
    fleets = [budgets(seed, 1.0) for seed in range(3)]
    rising = [budgets(0, v) for v in RISING_V]
    utilities = [utility for _, utility, _ in rising]
    broken = max(law for _, _, law in (*fleets, *rising))
    return [
        Figure("wireless", "queue laws of energy and participation, broken by", broken, "", "<= 1e-9"),
        Figure(
            "wireless", "worst device's energy over its budget", max(f[0] for f in fleets), "x", "<= 1.15"
        ),
        *(
            Figure("wireless", f"utility a round at V = {v:g}", u, "")
            for v, u in zip(RISING_V, utilities, strict=True)
        ),
        Figure("wireless", "utility, smallest step with V", float(np.diff(utilities).min()), "", ">= 0"),
    ]


def speed() -> list[Figure]:
    """Return what a choice and its feedback cost in a fleet of 100,000."""
    devices, wanted, draw = 100_000, 100, rng(SEED, "speed")
    policy = Lyapunov(parse({}).selection, devices, SEED)
    loss = np.where(draw.random(devices) < 0.5, np.inf, draw.uniform(0.1, 2.5, devices))
    known = {"examples": draw.lognormal(4.0, 0.5, devices), "loss": loss}
    times = {name: draw.lognormal(mean, 1.0, devices) for name, mean in (("fixed_s", 3.0), ("upload_s", 1.0))}
    state = in_round(1, wanted, BAND_HZ, **known, **times)
    policy.participation += 0.3 * draw.random(devices)
    drawn = cpu_s(lambda: policy.select(state, draw), 61)
    learnt = []
    for _ in range(60):
        outcome = came(state, policy.select(state, draw).places, 1.0)
        learnt.append(cpu_s(lambda: policy.feedback(outcome)))  # noqa: B023 - called at once
    depleted = cpu_s(lambda: policy.select(state, draw), 61)
    name = "drift plus penalty at 100,000"
    return [
        Figure("wireless", f"{name}, select, CPU", 1e3 * drawn, "ms", "<= 1.5"),
        Figure("wireless", f"{name}, select after 60 equal rounds, CPU", 1e3 * depleted, "ms"),
        Figure("wireless", f"{name}, feedback, CPU", 1e3 * float(np.median(learnt)), "ms"),
    ]


def main() -> int:
    """Measure, write ``results/schedulers.json``; 0 where every bound holds."""
    parts = (speed, against_brute_force, target, latencies, long_budgets)
    figures = [figure for part in parts for figure in part()]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    write_result("schedulers", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
