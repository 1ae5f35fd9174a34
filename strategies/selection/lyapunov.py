"""Lyapunov drift plus penalty: fast and useful devices, under a budget of energy and a share of the rounds.

    Q_k <- [Q_k + spent_k - e]^+      energy queue [J], e = ``selection.energy-budget-j``; 0: no such queue
    Z_k <- [Z_k + beta - x_k]^+       participation queue, beta = ``selection.participation`` K / N

    min over S of   T(S) - V sum_{k in S} w_k,     T(S) = max_{k in S} t_k [s],   V = v median_k t_k [s]
    w_k = sqrt(U_k / median U) + eta Z_k - Q_k e_k,     U_k = (training examples) x (last loss)

Every round moves the queues of all N devices, reached or not. x_k counts an update that *arrived*; energy
counts for everyone chosen, as it is spent anyway. Telescoping the queues from 0 gives, on every run and for
any choices, (1/T) sum_t spent_k <= e + Q_k(T)/T and (1/T) sum_t x_k >= beta - Z_k(T)/T.

**Who may be chosen.** A device of negative weight would cost time and be worth less than nothing: it is left
out. Of the others exactly K are taken, or all where they are fewer; possibly nobody, while budgets recover.

**Exact, at any M.** S is the K heaviest among those that are done by its own T, so it is enough to walk the
devices by time with the K heaviest so far in a heap. A device whose weight is below that of K faster ones is
never among them; where M is large, two cuts leave out most of these first (about 3 K (M / K)^(1/3) stay where
weight and time are unrelated). The walk is in parts, and parts of these; left out is one where T at its
begin, less V times the heaviest at its end, is no better than the best known.

Drift plus penalty: M. Neely, "Stochastic Network Optimization with Application to Communication and Queueing
Systems", 2010. The prefix argument is that of RBCS-F (T. Huang et al., "An Efficiency-Boosting Client
Selection Scheme for Federated Learning with Fairness Guarantee", arXiv:2011.01783). U is after Oort (F. Lai
et al., arXiv:2010.06081). Departures: V weighs utility *and* queues against time, so a large V is slow and
fair, and it is in medians of the reachable devices' times, so that one v suits rounds of seconds and of
minutes; U takes the mean loss for the root of the mean square; without a loss the median of those known
stands in, so that newcomers come by Z; e_k is in J and so Q_k e_k in J^2, which for devices of many joules
makes the budget nearly hard in every window; above 2,048 devices medians are of evenly spaced ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlam_app.tables.wireless import SelectionConfig
from strategies.selection.base import Choice, Floats, Outcome, Places, Policy, RoundState

Queue = NDArray[np.float64]
_SAMPLE = 2048  # devices that are enough for a median, and few enough to be walked without a cut


class Lyapunov(Policy):
    """``energy`` and ``participation`` are the queues (N,) of all devices, by id."""

    def __init__(self, config: SelectionConfig, devices: int, seed: int) -> None:
        super().__init__(config, devices, seed)
        self.energy: Queue = np.zeros(devices)
        self.participation: Queue = np.zeros(devices)
        self.beta = 0.0  # known with the first round, as K is

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        """Return the best set; nothing is drawn."""
        self.beta = self.config.participation * (self.a_turn or state.wanted) / state.devices
        weight = self.weights(state)  # before the times: less memory at once, which malloc then keeps
        time_s = state.time_s
        v_s = self.config.v * float(_median(time_s, np.ones(len(time_s), np.bool_)))
        return Choice(fast_and_heavy(time_s, weight, state.wanted, v_s))

    def weights(self, state: RoundState) -> Floats:
        """Return w (M,): what a device is worth."""
        weight = utility(state.examples, state.loss)
        everyone = len(state) == self.devices  # in the order of their ids
        z = (self.participation if everyone else self.participation[state.ids]).astype(np.float32)
        z *= np.float32(self.config.eta)
        weight += z
        if self.config.energy_budget_j > 0:
            q = (self.energy if everyone else self.energy[state.ids]).astype(np.float32)
            q *= state.energy_j
            weight -= q
        return weight

    def feedback(self, outcome: Outcome) -> None:
        """Move all queues by one round."""
        came = outcome.ids[outcome.arrived]
        self.participation += self.beta
        self.participation[came] = np.maximum(self.participation[came] - 1.0, 0.0)
        if self.config.energy_budget_j > 0:
            self.energy -= self.config.energy_budget_j
            self.energy[outcome.ids] += outcome.energy_j
            np.maximum(self.energy, 0.0, out=self.energy)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {
            "energy": self.energy.copy(),
            "participation": self.participation.copy(),
            "beta": np.array([self.beta]),
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`; ``ValueError`` where it is of another number of devices."""
        for name in ("energy", "participation"):
            if state[name].shape != (self.devices,):
                raise ValueError(
                    f"the saved queue '{name}' has the shape {state[name].shape}; it must be"
                    f" ({self.devices},), one number for each device"
                )
        self.energy = state["energy"].astype(np.float64)
        self.participation = state["participation"].astype(np.float64)
        self.beta = float(state["beta"].item())


def utility(examples: Floats, loss: Floats) -> Floats:
    """Return sqrt(U / median U) (M,), U = examples x loss; ones where the median is 0.

    A loss that is not finite is unknown, and the median of the known ones stands in; below 0 it counts as 0.
    """
    known = np.isfinite(loss)
    worth = np.fmax(loss, np.float32(0.0))
    if not known.all():
        stand_in = _median(worth, known)
        # Five times as fast as ``where`` on a mask without a pattern.
        np.minimum(worth, np.finfo(np.float32).max, out=worth)
        mask = known.astype(np.float32)
        worth *= mask
        mask -= np.float32(1.0)
        mask *= -stand_in
        worth += mask
    worth *= examples
    middle = _median(worth, np.ones_like(known))
    if not middle > 0.0:
        return np.ones_like(worth)
    worth *= np.float32(1.0 / middle)
    return np.sqrt(worth, out=worth)


def fast_and_heavy(time_s: Floats, weight: Floats, most: int, v: float) -> Places:
    """Return the places, ascending, of the set that minimises max(time_s) - v sum(weight), as above.

    ``time_s`` >= 0 and ``weight`` are (M,) float32; the set has ``most`` of those with weight >= 0, or all of
    them where they are fewer. Ties go to the faster, then to the first.
    """
    kept = _contenders(time_s, weight, most)
    kept = kept[weight[kept] >= 0]
    if len(kept) <= most:
        return kept
    # Floats that are not negative sort as their bits do: with the order below them, no tie is left open.
    order = time_s[kept].view(np.uint32).astype(np.uint64) << np.uint64(32)
    order |= np.arange(len(kept), dtype=np.uint64)
    order.sort()
    kept = kept[(order & np.uint64(0xFFFFFFFF)).astype(np.intp)]
    walked = weight[kept]
    inside = walked[: _best_prefix(time_s[kept], walked, most, v)]
    least = _largest(inside, most)
    above, level = np.flatnonzero(inside > least), np.flatnonzero(inside == least)
    return np.sort(kept[np.concatenate((above, level[: most - len(above)]))])


def _contenders(time_s: Floats, weight: Floats, most: int) -> Places:
    """Return all that can be among the ``most`` heaviest of some prefix by time, and some others."""
    count = len(time_s)
    if count <= _SAMPLE:
        return np.arange(count)
    sample = np.sort(time_s[:: count // _SAMPLE])
    kept, least = np.zeros(count, np.bool_), np.float32(-np.inf)
    for power in (2 / 3, 1 / 3):  # two prefixes, of lengths about evenly spaced on a logarithmic scale
        rank = math.ceil(len(sample) * (most / count) ** power)
        fast = time_s <= sample[min(rank, len(sample) - 1)]
        kept |= fast & (weight > least)
        early = weight[np.flatnonzero(kept)]  # the heaviest of this prefix are among them
        if len(early) >= most:
            least = _largest(early, most)
    return np.flatnonzero(kept | (weight > least))


@dataclass(frozen=True, slots=True)
class _Part:
    """The prefixes that end after place ``start`` and up to ``end``."""

    start: int
    end: int
    top: Queue  # (K,) the heaviest before ``start``
    total: float  # their sum
    grown: float  # the sum of the heaviest before ``end``


def _best_prefix(time_s: Floats, weight: Floats, most: int, v: float) -> int:
    """Return the length of the prefix, by time, whose ``most`` heaviest are the best set."""
    times, weights = time_s.astype(np.float64), weight.astype(np.float64)
    count, length = len(times), most
    steps = np.geomspace(most, count, 2 + round(3 * math.log2(count / most)))
    parts = _cut(weights, np.unique(np.rint(steps).astype(np.intp)).tolist(), weights[:most])
    best = float(times[most - 1]) - v * parts[0].total
    for finer in (True, False):
        for part in parts:
            value = float(times[part.end - 1]) - v * part.grown
            if value < best:
                best, length = value, part.end
        # No end inside of a part can go below its first time less its last total.
        parts = [part for part in parts if float(times[part.start]) - v * part.grown < best]
        if finer:
            parts = [own for part in parts for own in _cut(weights, _evenly(part), part.top)]
    for part in parts:
        heap, total = part.top.tolist(), part.total
        heapq.heapify(heap)
        new = part.start + np.flatnonzero(weights[part.start : part.end] > heap[0])
        for place, heavy, when in zip(new.tolist(), weights[new].tolist(), times[new].tolist(), strict=True):
            if heavy > heap[0]:
                total += heavy - heapq.heapreplace(heap, heavy)
                if when - v * total < best:
                    best, length = when - v * total, place + 1
    return length


def _cut(weights: Queue, ends: list[int], top: Queue) -> list[_Part]:
    """Return the parts between ``ends``; ``top`` (K,) are the heaviest before the first of them."""
    parts, total = list[_Part](), float(top.sum())
    for start, end in itertools.pairwise(ends):
        pool = np.concatenate((top, weights[start:end]))
        pool.partition(end - start)
        later = pool[end - start :]
        grown = float(later.sum())
        parts.append(_Part(start, end, top, total, grown))
        top, total = later, grown
    return parts


def _evenly(part: _Part) -> list[int]:
    """Return where to cut a part so that walking what is left of it takes no longer than the cuts."""
    length, pieces = part.end - part.start, min(8, 1 + (part.end - part.start) // 64)
    return [part.start + length * piece // pieces for piece in range(pieces + 1)]


def _largest(values: Floats, rank: int) -> np.float32:
    """Return the ``rank``-th largest of (M,) values, 1 <= rank <= M."""
    place = len(values) - rank
    found: np.float32 = np.partition(values, place)[place]
    return found


def _median(values: Floats, known: NDArray[np.bool_]) -> np.float32:
    """Return the median of what is known of (M,) values, of evenly spaced ones where M is large; or 1."""
    step = len(values) // _SAMPLE + 1
    some = values[::step][known[::step]]
    if not len(some):
        some = values[known]
    if not len(some):
        return np.float32(1.0)
    low, high = (len(some) - 1) // 2, len(some) // 2
    parted = np.partition(some, (low, high))  # a third of what np.median takes
    return np.float32(0.5) * (parted[low] + parted[high])
