"""Exact picks from long arrays: order statistics, the k largest, and draws without replacement.

    nth(v, j)       the value at place j of sorted v
    top(v, k)       places of the k largest; of equal values those with the lower place
    race(w, k)      k places drawn one after the other with probability w / (w of who is left)

``top`` partitions the values and not their places: NumPy does that in wide registers, and two comparisons
find the places. Equal values and infinities cost nothing more, and the answer is that of a full, stable sort.

``race`` gives each place an exponential clock of rate w and takes the first k: P. Efraimidis, P. Spirakis,
"Weighted random sampling with a reservoir", Inf. Process. Lett. 97(5), 2006; it is the Gumbel top-k draw
without its logarithms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.selection.base import Places

Values = NDArray[np.floating[Any]]
_TINY = np.finfo(np.float32).tiny


def nth(values: Values, place: int) -> float:
    """Return the value at ``place``, 0 <= place < n, of the sorted ``values`` (n,); no NaN among them."""
    return float(np.partition(values, place)[place])


def top(values: Values, count: int) -> Places:
    """Return the places (k,), ascending, of the ``count`` largest ``values`` (n,); all where n is smaller.

    Of equal values the ones with lower places are taken.
    """
    if count >= len(values):
        return np.arange(len(values))
    if count <= 0:
        return np.arange(0)
    cut = nth(values, len(values) - count)
    above = np.flatnonzero(values > cut)
    level = np.flatnonzero(values == cut)[: count - len(above)]
    return np.sort(np.concatenate([above, level]))


def race(weights: Values, count: int, draw: np.random.Generator) -> Places:
    """Return ``count`` places (k,), ascending, drawn without replacement in proportion to ``weights`` (n,).

    Weights are finite and not negative; places of weight 0 come last, in their order. All where n is smaller.
    """
    if count >= len(weights):
        return np.arange(len(weights))
    clocks = draw.standard_exponential(len(weights), np.float32)
    return top(weights / np.maximum(clocks, _TINY), count)


def evenly(among: int, count: int, draw: np.random.Generator) -> Places:
    """Return ``count`` of ``among`` places (k,), ascending, each set as likely; all where there are fewer."""
    if count >= among:
        return np.arange(among)
    return np.sort(draw.choice(among, count, replace=False, shuffle=False))


def asked(wanted: int, factor: float) -> int:
    """Return ``selection.candidates`` times ``wanted``, rounded up."""
    return math.ceil(factor * wanted)
