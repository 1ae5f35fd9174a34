"""How a budget is spread over releases: evenly, more for late rounds, or for rounds with a good channel.

A Gaussian release of noise v = z^2 costs 1 / v (its RDP is a / (2 v) at order a): T releases share a budget
R = sum_t 1 / v_t. Here R is T, and v and z are over those of the even plan, the *factors*:

    late       min sum_t w_t v_t              v_t = sum_s sqrt(w_s) / (R sqrt(w_t)),    w_t = rho^(T - t)
    channel    max sum_t 1 / (v_t + D_t)      1 / v_t = R (1 / D_t) / sum_s (1 / D_s)

with D_t the noise or loss of the link in round t, of which only proportions matter. Both by Lagrange; derived
here, not quoted, and held against SLSQP in tests. Nothing here looks at data: a decision that followed a
gradient's norm would tell of it. The optimum over channels needs all rounds at once, and a run knows the
past: :func:`even_share` is the causal form, what is left times this round's quality over its own and that of
the rounds to come, each of which is taken for a mean one. It never spends more than there is.

Sampled events (q < 1) cost about q^2 / v, and exactly what the ledger says. The even plan's epsilon is
attained at one order a*; a plan whose RDP at a* is no larger has no larger epsilon. So :class:`Prices` prices
a factor at a*, and :func:`rescaled` finds the one scale of all factors at which epsilon is the even plan's.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlam_app.privacy.accounting import EXACT, epsilon_of, epsilons_of, rdp

Reals = NDArray[np.float64]

LEVELS = 12  # different factors of a sampled plan, each of which costs a pass of the accountant
BOUND = 4.0  # no release gets more than this many even shares, nor less than one over it
GRID = 2.0 ** (np.arange(-8, 9) / 8.0)  # factors of z that sampled events may have: 1/2 to 2
STEP = 2e-4  # of log z, in which a scale is found: about 0.003 of an epsilon of 8


def late_weights(rounds: int, rho: float) -> Reals:
    """Return w_t = rho^(T - t) (T,), t = 1 to T."""
    return np.asarray(rho ** np.arange(rounds - 1, -1, -1, dtype=np.float64))


def variances(weights: ArrayLike, budget: float) -> Reals:
    """Return v_t (T,), the least sum_t w_t v_t of budget sum_t 1 / v_t."""
    root = np.sqrt(np.asarray(weights, np.float64))
    return np.asarray(root.sum() / (budget * root))


def by_channel(distortion: ArrayLike, budget: float) -> Reals:
    """Return p_t = 1 / v_t (T,), the largest sum_t 1 / (v_t + D_t) of budget sum_t p_t; D > 0."""
    quality = 1.0 / np.asarray(distortion, np.float64)
    return np.asarray(budget * quality / quality.sum())


def even_share(left: float, releases: float, quality: float, mean: float) -> float:
    """Return what this release may cost of ``left``, with ``releases`` to come, this one included.

    ``quality`` is 1 / D now, ``mean`` that of the rounds so far, this one included.
    """
    if releases <= 1.0:
        return max(left, 0.0)
    even = left / releases
    fair = left * quality / (quality + (releases - 1.0) * mean) if mean > 0.0 else even
    return min(max(fair, even / BOUND), even * BOUND, left)


class Prices:
    """What releases of factors f cost, over one of factor 1."""

    def __init__(self, q: float, z: float, events: float, delta: float) -> None:
        """The even plan is ``events`` events of noise ``z`` at rate ``q``."""
        self.exact = q == 1.0 or z == 0.0
        if not self.exact:
            order = _order(q, z, events, delta)
            self.costs = np.array([rdp(q, z * f)[order] for f in GRID.tolist()]) / rdp(q, z)[order]

    def factor(self, price: float) -> tuple[float, float]:
        """Return the least factor that costs no more than ``price``, and its cost."""
        if price <= 0.0:
            return 1.0, 1.0  # nothing is left: the ledger will say so
        if self.exact:
            return price**-0.5, price
        place = int(np.argmax(self.costs <= price)) if (self.costs <= price).any() else len(GRID) - 1
        return float(GRID[place]), float(self.costs[place])


def rescaled(factors: ArrayLike, q: float, z: float, events: float, delta: float) -> Reals:
    """Return the factors (T,), scaled so that they cost what factors of 1 do, and at most that.

    Each stands for ``events`` events of noise z f_t at rate ``q``. Of sampled events, factors come in few
    levels.
    """
    f = np.asarray(factors, np.float64)
    if q == 1.0 or z == 0.0:
        return np.asarray(f * math.sqrt(float((f**-2).mean())))
    from scipy.optimize import brentq

    low, high = math.log(f.min()), math.log(f.max())
    width = max(high - low, 1e-9) / (LEVELS - 1)
    levels = low + width * np.round((np.log(f) - low) / width)
    values, counts = np.unique(levels, return_counts=True)
    target = epsilon_of(rdp(q, z) * events * len(f), delta)

    def over(scale: float) -> float:
        noises = (z * np.exp(values + scale)).tolist()
        total = sum(rdp(q, noise) * events * count for noise, count in zip(noises, counts, strict=True))
        return epsilon_of(np.asarray(total), delta) - target

    if over(-high) <= EXACT:  # all alike
        return np.asarray(np.exp(levels - high))
    scale = brentq(over, -high, -low, xtol=STEP)
    while over(scale) > 0.0:
        scale += STEP
    return np.asarray(np.exp(levels + scale))


@lru_cache(maxsize=1024)
def _order(q: float, z: float, events: float, delta: float) -> int:
    """Return the place of the order at which ``events`` events attain their epsilon."""
    return int(epsilons_of(rdp(q, z) * events, delta).argmin())
