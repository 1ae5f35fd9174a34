"""Sharing the band by whole resource blocks so that the last device finishes as early as can be.

    min T   s.t.   sum_k n_k <= N = floor(B / beta),   t0_k + s_k / r_k(n_k beta) <= T,   n_k = 0, 1, 2, ...

The continuous optimum (``allocate.py``) over a band that is K blocks narrower, each share rounded up, fits
and is in by some T'. Whoever keeps T' keeps the optimum's T with at least ceil(b_k(T') / beta) blocks, so
everybody gets these first; each block that is left then goes to whoever finishes last (a heap). That is the
optimum: the start is no more than the optimum has, and no block goes to a device that is earlier than the
optimum's last.

By whole blocks, floor(b_k / beta), a device keeps more than b_k - beta of its continuous band b_k, and r is
concave: with b the smallest of them, and b > beta,

    T <= T_continuous / (1 - beta / b)

A resource block is 12 subcarriers: 180 kHz at 15 kHz, 360 kHz at 30 kHz. Where there are fewer blocks than
devices, the last in order get none and never finish. Usual is to round down and to give the rest away, which
can leave a device with nothing though there are blocks enough.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlam_app.wireless.allocate import LN2, at_full_power, finish_s, min_max, minimum_band_hz
from fedlam_app.wireless.demand import Demand, Reals, Share, above_zero, one_by_one


@dataclass(frozen=True, slots=True)
class Blocks:
    """Whole resource blocks, and what wholeness costs."""

    count: NDArray[np.int64]  # (K,) of sum floor(B / beta)
    time_s: Reals  # (K,) inf without a block
    gap: float  # T / T_continuous - 1; inf where a device has no block


def whole_blocks(
    bits: ArrayLike,
    gain_hz: ArrayLike,
    fixed_s: ArrayLike,
    band_hz: float,
    block_hz: float,
    cap: ArrayLike = math.inf,
) -> Blocks:
    """Return the blocks of each device; all but ``band_hz`` and ``block_hz`` are (K,), or one number for all.

    ``ValueError`` unless all but the fixed times are above 0, and the band holds one block.
    """
    above_zero("block_hz", block_hz)
    total = math.floor(band_hz / block_hz * (1.0 + 1e-12))
    if total < 1:
        raise ValueError(f"band_hz = {band_hz:g} holds no block of block_hz = {block_hz:g}; it must hold one")
    _, earliest = min_max(bits, gain_hz, fixed_s, band_hz, cap)
    size = int(np.size(gain_hz))
    named = {"bits": bits, "gain_hz": gain_hz, "fixed_s": fixed_s, "cap": cap}
    s, a, t0, e = (one_by_one(size, name, values) for name, values in named.items())
    count = np.zeros(size, np.int64)
    if total >= size:
        count[:] = 1
        if total > size:
            narrow, _ = min_max(s, a, t0, (total - size) * block_hz, e)
            count = np.maximum(1, np.ceil(narrow / block_hz * (1.0 - 1e-9)).astype(np.int64))
        latest = float(finish_s(s, a, t0, count * block_hz, e).max())
        needed = minimum_band_hz(s / (latest - t0), a, e) / block_hz
        count = np.minimum(count, np.ceil(needed * (1.0 - 1e-9)).astype(np.int64))

    given = count.tolist()
    rows = list(zip(s.tolist(), a.tolist(), t0.tolist(), e.tolist(), strict=True))
    heap = [(-late, place) for place, late in enumerate(finish_s(s, a, t0, count * block_hz, e).tolist())]
    heapq.heapify(heap)
    for _ in range(total - sum(given)):
        place = heap[0][1]
        given[place] += 1
        bit, gain, fixed, most = rows[place]
        band = given[place] * block_hz
        late = fixed + bit / (band * min(math.log1p(gain / band) / LN2, most))
        heapq.heapreplace(heap, (-late, place))
    count = np.array(given, np.int64)
    time = finish_s(s, a, t0, count * block_hz, e)
    return Blocks(count, time, float(time.max()) / earliest - 1.0)


def share_blocks(demand: Demand) -> Share:
    """Give every device whole blocks of ``block_hz``, at its largest power."""
    arrays = (demand.bits, demand.gain_hz, demand.fixed_s, demand.band_hz, demand.block_hz, demand.cap)
    band: Reals = whole_blocks(*arrays).count * np.float64(demand.block_hz)
    return at_full_power(demand, band)
