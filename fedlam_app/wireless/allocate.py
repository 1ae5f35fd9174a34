"""Sharing the band so that all finish together, as early as can be: exact bandwidth for minimum latency.

    min T   s.t.   sum_k b_k <= B,   t0_k + s_k / r_k(b_k) <= T,   r(b) = min(b log2(1 + a / b), e b)

**How much band a rate needs.** With y = ln(1 + a / b) and m / tau = r ln2 / a < 1, where tau = T - t0 and
m = s ln2 / a is the time of the upload over an infinite band,

    (e^y - 1) / y = tau / m,     b = max(a / (e^y - 1), r / e)

As h(y) = ln((e^y - 1) / y) is almost straight, y = L + ln(1 + L) solves h(y) = L = ln(tau / m) to 4 %, and
two steps of Halley's to rounding. Below L = 0.02, where h cancels, a power series in 2 L takes over; L itself
comes from tau / m - 1, which is known without cancellation also next to the pole.

**How early.** No T below max_k(t0_k + m_k) can be kept by any band. In w = 1 / (T - that pole) the band that
is needed, S(w), is increasing and nearly concave, so Newton's method from below does not overshoot; a bracket
guards it where the cap makes a corner. All times are kept as distances from the pole, which is what makes the
band exact where B is far larger than any a_k.

The problem and the inverse (by Lambert's W) are textbook; the choice of w, y and the pole are derived here,
as scipy's W_{-1} loses all digits for r ln2 / a near 1. Bits, band and times in bit, Hz and s; a in Hz; e in
bit/s/Hz; ``bits`` and ``cap`` are over the link's efficiency, ``gain_hz`` times its SNR factor
(``demand.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from fedlam_app.wireless.demand import Demand, Reals, Share, above_zero, not_negative, one_by_one

LN2 = math.log(2.0)
_TINY, _HUGE = 0.02, 690.0  # ln(tau / m) below which h cancels; above which e^y would overflow
# Reversal of y / 2 + y^2 / 24 - y^4 / 2880 + y^6 / 181440 = L: y over 2 L in powers of 2 L, highest first.
_SERIES = (-13 / 290304, 17 / 51840, -19 / 8640, 1 / 72, -1 / 12, 1.0)


def log_snr(slack: Reals) -> Reals:
    """Return y = ln(1 + SNR) of (e^y - 1) / y = 1 + ``slack`` > 1, to 1e-13 relative; any shape."""
    level = np.log1p(slack)
    inside = np.minimum(np.maximum(level, _TINY), _HUGE)
    y: Reals = inside + np.log1p(inside)
    for _ in range(2):
        over, inverse = 1.0 / np.expm1(y), 1.0 / y
        off = inside + np.log(over * y)  # -(h(y) - L)
        slope = 1.0 + over - inverse
        bend = inverse * inverse - over * (1.0 + over)
        y += off * slope / (slope * slope + 0.5 * off * bend)
    if level.size and level.min() < _TINY:
        twice = 2.0 * np.minimum(level, _TINY)
        y = np.where(level < _TINY, twice * np.polyval(_SERIES, twice), y)
    return y


def link_rate_bps(band: Reals, gain_hz: Reals, cap: ArrayLike = math.inf) -> Reals:
    """Return min(b log2(1 + a / b), e b) [bit/s], elementwise; 0 over no band."""
    with np.errstate(divide="ignore", invalid="ignore"):
        efficiency = np.minimum(np.log1p(gain_hz / band) / LN2, cap)
        return np.where(band > 0, band * efficiency, 0.0)


def minimum_band_hz(rate_bps: ArrayLike, gain_hz: ArrayLike, cap: ArrayLike = math.inf) -> Reals:
    """Return the least band [Hz] that carries a rate; inf where none does (r ln2 >= a), 0 for a rate of 0.

    ``rate_bps`` >= 0 and ``gain_hz`` >= 0 of shapes that broadcast.
    """
    rate, gain = np.broadcast_arrays(np.asarray(rate_bps, np.float64), np.asarray(gain_hz, np.float64))
    needed = rate * LN2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slack = np.where((rate > 0) & (needed < gain), (gain - needed) / needed, 1.0)
        band = np.maximum(gain / np.expm1(log_snr(slack)), rate / cap)
    return np.where(rate > 0, np.where(needed < gain, band, math.inf), 0.0)


def finish_s(
    bits: ArrayLike, gain_hz: ArrayLike, fixed_s: ArrayLike, band: ArrayLike, cap: ArrayLike = math.inf
) -> Reals:
    """Return when each device has finished [s], over ``band`` (K,) Hz; inf over no band."""
    rate = link_rate_bps(np.asarray(band, np.float64), np.asarray(gain_hz, np.float64), cap)
    with np.errstate(divide="ignore"):
        return np.asarray(fixed_s, np.float64) + np.asarray(bits, np.float64) / rate


def equal(
    bits: ArrayLike, gain_hz: ArrayLike, fixed_s: ArrayLike, band_hz: float, cap: ArrayLike = math.inf
) -> tuple[Reals, float]:
    """Return the band B / K of each device (K,), and when the last has finished [s]."""
    bits, gain, fixed, caps = _checked(bits, gain_hz, fixed_s, band_hz, cap)
    band = np.full(len(gain), band_hz / len(gain))
    return band, float(finish_s(bits, gain, fixed, band, caps).max())


def min_max(
    bits: ArrayLike, gain_hz: ArrayLike, fixed_s: ArrayLike, band_hz: float, cap: ArrayLike = math.inf
) -> tuple[Reals, float]:
    """Return the band of each device (K,) [Hz], of sum ``band_hz``, and the time T [s] when all are in.

    All but ``band_hz`` are (K,), or one number for all. ``ValueError`` unless bits, gains, caps and the band
    are above 0 and the fixed times finite.
    """
    bits, gain, fixed, caps = _checked(bits, gain_hz, fixed_s, band_hz, cap)
    least = bits * (LN2 / gain)  # m_k
    pole = fixed + least
    first = float(pole.max())
    gap = first - pole
    flat = bits / caps if np.isfinite(caps).any() else None  # s / e [Hz s]

    share = band_hz / len(gain)
    snr = gain / share
    # The second bound is below the first, and positive where that one is lost to rounding.
    excess = least * np.maximum(snr / np.log1p(snr) - 1.0, snr / (3.0 + snr))
    if flat is not None:
        excess = np.maximum(excess, flat / share - least)
    band = np.empty(0)

    def needed(w: float) -> tuple[float, float]:
        nonlocal band
        slack = 1.0 / w + gap  # T - t0 - m
        tau = slack + least
        y = log_snr(slack / least)
        over = 1.0 / np.expm1(y)
        band = gain * over
        slope = band * (1.0 + over) / (1.0 + over - 1.0 / y)  # -db/dT times tau
        if flat is not None:
            capped = flat / tau
            slope = np.where(capped > band, capped, slope)
            band = np.maximum(band, capped)
        return float(band.sum()) / band_hz - 1.0, float((slope / tau).sum()) / (w * w * band_hz)

    w = increasing_root(needed, 1.0 / float((excess - gap).max()), 0.0, math.inf, 1e-12)
    return band, first + 1.0 / w


def increasing_root(
    function: Callable[[float], tuple[float, float]], start: float, low: float, high: float, tolerance: float
) -> float:
    """Return x with |f(x)| <= ``tolerance``, or the nearest float; ``function`` gives f and f', f increasing.

    Newton's method; a step out of the bracket (``low``, ``high``) halves it, or doubles x where it is open.
    The last call of ``function`` is at the x that is returned.
    """
    x = start
    while True:
        value, slope = function(x)
        if abs(value) <= tolerance:
            return x
        low, high = (x, high) if value < 0.0 else (low, x)
        step = x - value / slope if slope > 0.0 else math.inf
        if not low < step < high:
            step = 0.5 * (low + high) if high < math.inf else 2.0 * x
            if not low < step < high:
                return x  # no float is left between
        x = step


def share_equally(demand: Demand) -> Share:
    """Give every device the same band, at its largest power."""
    band, _ = equal(demand.bits, demand.gain_hz, demand.fixed_s, demand.band_hz, demand.cap)
    return at_full_power(demand, band)


def share_min_max(demand: Demand) -> Share:
    """Let all devices finish together, as early as can be, at their largest powers."""
    band, _ = min_max(demand.bits, demand.gain_hz, demand.fixed_s, demand.band_hz, demand.cap)
    return at_full_power(demand, band)


def at_full_power(demand: Demand, band: Reals) -> Share:
    """Return what ``band`` (K,) means at the largest powers; over no band a device sends nothing."""
    time = finish_s(demand.bits, demand.gain_hz, demand.fixed_s, band, demand.cap)
    return Share(band, time, np.where(band > 0, demand.power_w, 0.0))


def _checked(
    bits: ArrayLike, gain_hz: ArrayLike, fixed_s: ArrayLike, band_hz: float, cap: ArrayLike
) -> tuple[Reals, Reals, Reals, Reals]:
    """Return the four as (K,) float64, or say what is wrong with them."""
    count = int(np.size(gain_hz))
    if count == 0:
        raise ValueError("gain_hz is empty; at least one device must share the band")
    named = {"bits": bits, "gain_hz": gain_hz, "fixed_s": fixed_s, "cap": cap}
    arrays = {name: one_by_one(count, name, values) for name, values in named.items()}
    for name in ("bits", "gain_hz", "cap"):
        above_zero(name, arrays[name])
    above_zero("band_hz", band_hz)
    not_negative("fixed_s", arrays["fixed_s"])
    return arrays["bits"], arrays["gain_hz"], arrays["fixed_s"], arrays["cap"]
