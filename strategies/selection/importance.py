"""Importance and channel: devices drawn by what they teach and how long they take, and weighted for it.

J. Ren et al., "Scheduling for Cellular Federated Edge Learning with Importance and Channel Awareness",
arXiv:2004.00490. Only its abstract was at hand: the objective and its solution are derived here.

    min_p  rho sum p_k T_k + (1 - rho) sum u_k^2 / p_k,    sum p_k = 1,    rho = ``selection.rho``
    p_k = u_k sqrt((1 - rho) / (rho T_k + lambda)),        u_k = n_k |g_k| / sum n |g|

mu = lambda / (1 - rho) is the root of S(mu) = 1, S = sum p_k. S^-2 is a power mean of linear functions, so it
is concave, and Newton's step on it ends left of the root from either side:  mu <- mu + (S^3 - S) / (-2 S').

With K places,  pi_k = min(1, tau p_k),  sum pi = K,  is the chance to be taken; the draw is systematic
(points u, u + 1, ... on the cumulated pi: exactly K devices, each with its pi_k). With w_k = 1 / (N pi_k),

    sum_{k chosen} w_k n_k x_k    has the mean    (1/N) sum_{k of the M reachable} n_k x_k

for any x (D. Horvitz, D. Thompson, JASA 47, 1952).

Departures: lambda, pi and the draw are ours. T, the whole round of a device at an equal share of the band, is
over its mean, and the variance over its least value, so that rho weighs like with like. rho is held below
1 - 1e-6. |g| is the norm of the last update that arrived; one that is not known counts as the largest known,
and one below 1 % of that as 1 % of it, for a device that is never drawn is a bias. Devices without examples,
or that would never finish, are not drawn; the mean is that of all others. Of 4,096 devices and more, lambda
is found from some 2,048, evenly spaced: p is then optimal to second order, and the weights are no less exact.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.selection.base import Choice, Floats, Places, Policy, RoundState
from strategies.selection.picks import nth, top

Doubles = NDArray[np.float64]
Reals = TypeVar("Reals", Doubles, Floats)

SAMPLE = 2048  # devices, and up to as many more, that lambda is found from
ROW = 64  # devices whose chances are cumulated together


class Importance(Policy):
    """Remembers nothing: the norms are the run's."""

    unbiased: ClassVar[bool] = True

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        if len(state) <= state.wanted:
            return Choice(np.arange(len(state)), np.full(len(state), 1.0 / self.devices))
        size, time_s = known_norms(state.norm), state.time_s
        size *= state.examples
        alive = None
        if not (size.min() > 0.0 and time_s.max() < np.inf):
            alive = np.flatnonzero((size > 0.0) & (time_s < np.inf))
            if len(alive) <= state.wanted:
                return Choice(alive, np.full(len(alive), 1.0 / self.devices))
            size, time_s = size[alive], time_s[alive]
        chance = inclusions(shares(size, time_s, self.config.rho, SAMPLE), state.wanted)
        drawn = systematic(chance, state.wanted, draw)
        weights = 1.0 / (self.devices * chance[drawn].astype(np.float64))
        return Choice(drawn if alive is None else alive[drawn], weights)


def known_norms(norm: Floats) -> Floats:
    """Return update norms (M,) > 0, with what is unknown or next to nothing replaced; ones if all are."""
    known = int(np.count_nonzero(norm < np.inf))
    largest = np.float32(nth(norm, known - 1) if known else 0.0)
    if largest == 0.0:
        return np.ones_like(norm)
    held = np.minimum(norm, largest)
    return np.maximum(held, np.float32(0.01) * largest, out=held)


def shares(size: Reals, time_s: Reals, rho: float, sample: int = 0) -> Reals:
    """Return p (M,), sum 1 and in the precision of ``size``, for n |g| > 0 and finite times [s].

    With ``sample``, mu is that of about so many devices, evenly spaced, and the sum is 1 to about 1 %.
    """
    rho = min(rho, 1.0 - 1e-6)
    kind = size.dtype.type
    whole, mean = float(size.sum()), float(time_s.mean())
    slope = whole**2 * rho / ((1.0 - rho) * mean) if mean > 0.0 else 0.0
    first = int(np.argmin(time_s))
    # Over the quickest: what all have in common moves mu alone, and would cancel in single precision.
    p = time_s - time_s[first]
    step = max(len(size) // sample, 1) if sample else 1
    part, part_s = size[::step].astype(np.float64), p[::step].astype(np.float64)
    # Everybody's root is right of where the quickest alone would have it.
    mu = max(multiplier(part * (whole / part.sum()), part_s, slope), float(size[first]) ** 2)
    p *= kind(slope)
    p += kind(mu)
    np.sqrt(p, out=p)
    return np.divide(size, p, out=p)


def multiplier(size: Doubles, time_s: Doubles, slope: float) -> float:
    """Return mu with sum_k size_k / sqrt(slope time_k + mu) = 1 to 1e-12; size (M,) > 0, time (M,) finite."""
    whole, cost = float(size.sum()), slope * time_s
    # Bounds that lie left of the root: one term alone, and Jensen's inequality.
    bound = max(float((size * size - cost).max()), whole**2 - float((size * cost).sum()) / whole)
    at = bound
    while True:
        inner = cost + at
        p = size / np.sqrt(inner)
        total, fall = float(p.sum()), float((p / inner).sum())  # S and -2 S'
        after = max(at + (total**3 - total) / fall, bound)
        if abs(total - 1.0) <= 1e-12 or after == at:
            return after
        at = after


def inclusions(p: Reals, wanted: int) -> Reals:
    """Return pi = min(1, tau p) (M,) with sum ``wanted`` < M, in the place of p > 0."""
    whole = float(p.sum())
    if float(p.max()) * wanted <= whole:
        p *= p.dtype.type(wanted / whole)
        return p
    heads = top(p, wanted)
    largest = np.sort(p[heads].astype(np.float64))[::-1]
    rest = float(np.delete(p, heads).sum())
    left = rest + np.cumsum(largest[::-1])[::-1]  # beside the j largest
    tau = np.arange(wanted, 0, -1) / left
    fits = np.flatnonzero(largest * tau <= 1.0)
    p *= p.dtype.type(tau[fits[0] if len(fits) else -1])
    return np.minimum(p, p.dtype.type(1.0), out=p)


def systematic(chance: Reals, wanted: int, draw: np.random.Generator) -> Places:
    """Return ``wanted`` places (k,), ascending, each once, with these inclusion probabilities (M,)."""
    point = draw.random()
    certain = np.flatnonzero(chance >= 1.0 - 1e-6)
    count = wanted - len(certain)
    if count == 0:
        return certain
    rows = -(-len(chance) // ROW)
    table = np.zeros((rows, ROW), chance.dtype)
    table.ravel()[: len(chance)] = chance
    table.ravel()[certain] = 0.0
    sums = table.sum(1, dtype=np.float64)
    ends = np.cumsum(sums)
    points = (point + np.arange(count)) * (ends[-1] / count)
    row = np.minimum(np.searchsorted(ends, points, side="right"), rows - 1)
    inner = np.cumsum(table[row], 1, dtype=np.float64)  # (count, ROW): only where a point falls
    column = (inner <= (points - (ends - sums)[row])[:, None]).sum(1)
    drawn = np.minimum(row * ROW + np.minimum(column, ROW - 1), len(chance) - 1)
    return np.sort(np.concatenate([certain, drawn]))
