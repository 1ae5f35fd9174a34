"""The FedFT scheduler: how many devices take part, which, and by when, under a long-term average latency.

After Z. Wang, Y. Zhou, Y. Shi, K. B. Letaief, "Federated Fine-Tuning for Pre-Trained Foundation Models Over
Wireless Networks", IEEE TWC 2025, arXiv:2407.02924: the bound on convergence depends on how many devices take
part in each round, and a Lyapunov queue H [s] turns the long-term problem into one problem a round,

    min over S, b of   V phi(n) + H tau,      tau = max_{k in S} t0_k + s_k / (b_k log2(1 + a_k / b_k))
    n = |S| <= K,   sum_k b_k <= B,           H <- [H + (the round's seconds) - tau_bar]^+

Only its abstract was at hand: phi(n) = 1 / n, the usual term of such bounds, and the solver are
reconstructions, not the paper's equations. The paper weighs rounds unequally; no key sets such weights, so
here all weigh 1. tau_bar is ``selection.latency-budget-s``, or ``selection.deadline-s`` where that is 0.

**tau_n, exactly.** A device needs a band b_k(tau) that falls with tau; n devices can make tau if and only if
the n smallest fit into B. Their sum is solved for by Newton's method in w = 1 / (tau - the n-th smallest time
over an infinite band), as in ``fedlam_app/wireless/allocate.py``: for a set it is nearly concave in w, and so
is the least over sets, so that steps from below do not overshoot; a bracket guards the corners.

**Which n.** tau_n grows with n. A few n are solved at once; V phi(n) + H tau_m, for the next smaller m that
was solved, is a lower bound that leaves out most others.

With H = 0 the largest n is the best. Beyond max(512, 2 K) devices only the best are looked at: the fastest by
``state.time_s``, then the smallest bands at the K-th of these times; that is no longer exact. A cap on the
spectral efficiency is not in the state and not in tau (but in the round's seconds, and so in H). The bands
are for the allocator: min-max gives the chosen the same tau. Bits, Hz, s; a in Hz.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlam_app.tables.wireless import SelectionConfig
from fedlam_app.wireless.allocate import LN2, log_snr, minimum_band_hz
from fedlam_app.wireless.demand import Reals, above_zero
from strategies.selection.base import Choice, Outcome, Places, Policy, RoundState

_SCREEN, _PRESCREEN = 512, 4  # devices looked at, and how many times as many by their time alone
_AT_ONCE = 8  # numbers of devices solved together


class FedFt(Policy):
    """``queue`` is H [s], ``budget_s`` tau_bar."""

    def __init__(self, config: SelectionConfig, devices: int, seed: int) -> None:
        super().__init__(config, devices, seed)
        self.budget_s = config.latency_budget_s or config.deadline_s
        self.queue = 0.0

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        """Return the best set of at most ``state.wanted``; nothing is drawn."""
        seen = _screened(state, np.flatnonzero(state.gain_hz > 0))
        if not len(seen):
            return Choice(seen)
        chosen, _ = schedule(
            state.bits[seen],
            state.gain_hz[seen],
            state.fixed_s[seen],
            state.band_hz,
            state.wanted,
            self.config.v,
            self.queue,
        )
        return Choice(seen[chosen])

    def feedback(self, outcome: Outcome) -> None:
        """Move the queue by one round."""
        self.queue = max(0.0, self.queue + outcome.round_s - self.budget_s)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {"queue": np.array([self.queue])}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        self.queue = float(state["queue"].item())


def schedule(
    bits: ArrayLike,
    gain_hz: ArrayLike,
    fixed_s: ArrayLike,
    band_hz: float,
    most: int,
    v: float,
    queue_s: float,
) -> tuple[Places, float]:
    """Return the places, ascending, that minimise v / n + queue_s tau, n <= ``most``, and their tau [s].

    Arrays are (M,), M >= 1; ``ValueError`` unless bits, gains and the band are above 0.
    """
    most = min(most, np.size(gain_hz))
    left = np.arange(1, most + 1)
    taus = np.full(most + 1, -math.inf)  # by n; -inf: not solved
    best, tau, chosen = math.inf, math.inf, np.empty(0, np.intp)
    while len(left):
        some = left[np.unique(np.linspace(0, len(left) - 1, _AT_ONCE).astype(np.intp))]
        taus[some], places = earliest(bits, gain_hz, fixed_s, band_hz, some)
        costs = v / some + queue_s * taus[some]
        row = len(some) - 1 - int(np.argmin(costs[::-1]))  # of equals the largest n
        if costs[row] < best or (costs[row] == best and some[row] > len(chosen)):
            best, tau, chosen = float(costs[row]), float(taus[some[row]]), places[row]
        left = np.setdiff1d(left, some)
        lowest = v / left + queue_s * np.maximum(np.maximum.accumulate(taus)[left], 0.0)
        left = left[(lowest < best) | ((lowest == best) & (left > len(chosen)))]
    return np.sort(chosen), tau


def earliest(
    bits: ArrayLike, gain_hz: ArrayLike, fixed_s: ArrayLike, band_hz: float, numbers: NDArray[np.intp]
) -> tuple[Reals, list[Places]]:
    """Return the least latency [s] of any n devices that share the band, and which these are.

    Arrays are (M,); ``numbers`` (R,) are ascending n in 1 to M, and both results are in their order.
    ``ValueError`` unless bits, gains and the band are above 0, and numbers in their range.
    """
    bits, gain = np.asarray(bits, np.float64), np.asarray(gain_hz, np.float64)
    fixed = np.asarray(fixed_s, np.float64)
    for name, values in (("bits", bits), ("gain_hz", gain), ("band_hz", band_hz)):
        above_zero(name, values)
    if numbers.min() < 1 or numbers.max() > len(gain):
        raise ValueError(
            f"numbers = {numbers.tolist()} of devices are not allowed: each must be 1 to {len(gain)}, as many"
            " as there are"
        )
    most, rows = int(numbers.max()), np.arange(len(numbers))
    counted = np.arange(most) < numbers[:, None]  # (R, most)
    least = bits * (LN2 / gain)  # the upload over an infinite band
    pole = fixed + least
    first = np.sort(pole)[numbers - 1]  # no n devices are done before
    gap = first[:, None] - pole  # (R, M)

    # Feasible to start with: the n-th to be done when each has B / n. Its distance from ``first`` is made of
    # differences that keep their digits.
    snr = gain * (numbers / band_hz)[:, None]
    late = np.sort(least * np.maximum(snr / np.log1p(snr) - 1.0, snr / (3.0 + snr)) - gap, axis=1)
    w = 1.0 / late[rows, numbers - 1]
    low, high, done = np.zeros(len(w)), np.full(len(w), math.inf), np.zeros(len(w), np.bool_)
    while True:
        slack = 1.0 / w[:, None] + gap
        able = slack > 0
        slack = np.where(able, slack, least)
        y = log_snr(slack / least)
        over = 1.0 / np.expm1(y)
        band = np.where(able, gain * over, math.inf)
        order = np.argsort(band, axis=1, kind="stable")[:, :most]
        fall = band * (1.0 + over) / ((1.0 + over - 1.0 / y) * (slack + least))
        excess = _sum(band, order, counted) / band_hz - 1.0
        slope = _sum(fall, order, counted) / (w * w * band_hz)
        done |= np.abs(excess) <= 1e-12
        low, high = np.where(excess < 0, w, low), np.where(excess < 0, high, w)
        step = w - excess / slope
        middle = np.where(high < math.inf, 0.5 * (low + high), 2.0 * w)
        step = np.where((low < step) & (step < high), step, middle)
        done |= ~((low < step) & (step < high))  # no float is left between
        if done.all():
            return first + 1.0 / w, [order[row, :n] for row, n in enumerate(numbers.tolist())]
        w = np.where(done, w, step)


def _sum(values: Reals, order: NDArray[np.intp], counted: NDArray[np.bool_]) -> Reals:
    """Return the sum (R,) of the first n of each row, in its order."""
    total: Reals = np.take_along_axis(values, order, axis=1).sum(axis=1, where=counted)
    return total


def _screened(state: RoundState, places: Places) -> Places:
    """Return the most promising of ``places``, ascending: all where they are few."""
    kept = max(_SCREEN, 2 * state.wanted)
    if len(places) <= kept:
        return places
    time = state.time_s[places]
    if len(places) > _PRESCREEN * kept:
        near = np.argpartition(time, _PRESCREEN * kept)[: _PRESCREEN * kept]
        places, time = places[near], time[near]
    latest = np.partition(time, state.wanted - 1)[state.wanted - 1]
    left = latest - state.fixed_s[places].astype(np.float64)
    with np.errstate(divide="ignore"):
        rate = np.where(left > 0, state.bits[places] / left, math.inf)
    band = minimum_band_hz(rate, state.gain_hz[places])
    return np.sort(places[np.argpartition(band, kept)[:kept]])
