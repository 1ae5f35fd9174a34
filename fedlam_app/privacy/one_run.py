"""Audit in one run: m canaries, a fair coin each, and how many coins an adversary can guess.

T. Steinke, M. Nasr, M. Jagielski, NeurIPS 2023, arXiv:2305.08846. Each canary is in the training set by its
own coin. From what is released the adversary gives each a score, guesses "in" for the k / 2 highest and
"out" for the k / 2 lowest, and keeps silent on the rest. Under (epsilon, delta)-DP, of k guesses at least v
are right with a chance of at most

    P[Bin(k, p) >= v] + 2 m delta max_i P[v > Bin(k, p) >= v - i] / i,        p = e^epsilon / (1 + e^epsilon),

and the largest epsilon at which that is below the error allowed is a bound from below. Several k are tried,
each with its part of the error (Bonferroni).

The canaries here are the strongest there are for a sum: Dirac, canary i being a gradient of norm C along
coordinate i and nothing else, so that they do not disturb each other and the model does not matter. The score
of a canary is how far its coordinate went. The audit is weak all the same. With k right guesses of k the
bound ends, below log k - log log(1 / error), whatever the noise (:func:`ceiling`): gross errors are found (no
clipping, no noise, noise divided by the batch), and finer ones are not (half the noise; noise that is used
again; anything, where the claim is above the ceiling).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import Key, rng

ERROR = 0.05  # chance that the bound lies above the truth, all k together
GUESSES = (20, 50, 100, 200, 400, 600, 1000, 2000)

Floats = NDArray[np.float64]


def coins(canaries: int, *key: Key) -> NDArray[np.bool_]:
    """Return which canaries are in, (m,)."""
    return rng(*key, "one run coins").random(canaries) < 0.5


def lower_bound(
    scores: Floats,
    present: NDArray[np.bool_],
    delta: float,
    *,
    counts: Sequence[int] = GUESSES,
    error: float = ERROR,
) -> tuple[float, int, int]:
    """Return the best bound of epsilon from below, with its guesses and how many of them were right."""
    order = np.argsort(scores, kind="stable")
    tried = [k for k in counts if k <= len(scores)]
    found = []
    for k in tried:
        right = int(present[order[-(k // 2) :]].sum() + (~present[order[: k // 2]]).sum())
        found.append((epsilon_bound(len(scores), k, right, delta, error / len(tried)), k, right))
    return max(found)


def ceiling(canaries: int, delta: float, counts: Sequence[int] = GUESSES, error: float = ERROR) -> float:
    """Return the bound where every guess is right: no claim above it can be refuted."""
    scores = np.arange(canaries, dtype=np.float64)
    return lower_bound(scores, scores >= canaries / 2, delta, counts=counts, error=error)[0]


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Return the largest epsilon that ``right`` of ``guesses`` refute, with ``error``; 0 if they do none."""
    low, high = 0.0, 1.0
    if chance(canaries, guesses, right, 0.0, delta) >= error:
        return 0.0
    while chance(canaries, guesses, right, high, delta) < error:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = (low + high) / 2.0
        if chance(canaries, guesses, right, middle, delta) < error:
            low = middle
        else:
            high = middle
    return low


def chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the chance, at most, of ``right`` or more of ``guesses`` under (epsilon, delta)-DP."""
    from scipy.special import expit
    from scipy.stats import binom

    p = expit(epsilon)
    tail = float(binom.sf(right - 1, guesses, p))
    if right == 0 or delta == 0.0:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, p))  # P[v > Bin >= v - i], i = 1 ..
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(tail + 2.0 * canaries * delta * steepest, 1.0)
