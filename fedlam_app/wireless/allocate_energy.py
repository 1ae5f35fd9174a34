"""Sharing the band so that the radios spend least, where all must have finished by a deadline.

    min sum_k E_k(b_k)   s.t.   sum_k b_k = B,   p_k <= P_k,   b_k >= s_k / (e tau_k),   tau_k = T - t0_k
    E_k(b) = tau_k p_k,   p_k = (b / G_k) (2^{s_k / (b tau_k)} - 1),   G_k = a_k / P_k = g_k / N0  [Hz/W]

A device uploads for all the time that it has, at just the power that its band needs. With y = s ln2 / (b
tau):

    -dE/db = (tau / G) phi(y) = lambda,   phi(y) = 1 + (y - 1) e^y,   y = 1 + W0((lambda G / tau - 1) / e)

so y is capped where the device is at its largest power or at the largest spectral efficiency e, and the price
lambda [J/Hz] is where the bands add up to B (Newton's method in ln lambda, guarded by a bracket). Weak
channels and slow computers get more band. Derived here from the KKT conditions, with W0 polished on phi
itself, which is exact to rounding next to its branch point too. Energies are of the transmitted power alone,
in J; bands in Hz; bits and caps over the link's efficiency, gains times its SNR factor (``demand.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import lambertw

from fedlam_app.wireless.allocate import LN2, at_full_power, increasing_root, min_max, minimum_band_hz
from fedlam_app.wireless.demand import Demand, Reals, Share, above_zero, one_by_one

_SERIES = tuple(
    1.0 / (math.factorial(n) * (n + 2)) for n in range(5, -1, -1)
)  # of phi(y) / y^2, highest first
_SPARE = 1e-6  # of the deadline: who uses all of it must not be late by the rounding of a float32


@dataclass(frozen=True, slots=True)
class LeastEnergy:
    """What each device gets for the least total energy."""

    band_hz: Reals  # (K,) of sum B
    power_w: Reals  # (K,) transmit power, for all the time until the deadline
    energy_j: Reals  # (K,) transmitted
    price_j_hz: float  # lambda: what one more Hz of band would save; 0 where nobody could use it
    held: NDArray[np.bool_]  # (K,) at the largest power or spectral efficiency: would else have less band


def min_energy(
    bits: ArrayLike,
    gain_hz: ArrayLike,
    power_w: ArrayLike,
    fixed_s: ArrayLike,
    band_hz: float,
    deadline_s: float,
    cap: ArrayLike = math.inf,
) -> LeastEnergy:
    """Return bands, powers and energies; ``gain_hz`` (K,) is at ``power_w``, the largest powers.

    All but ``band_hz`` and ``deadline_s`` are (K,), or one number for all. ``ValueError`` where the deadline
    cannot be met: it names the devices that have too little time or power even over an infinite band, or the
    band that all would need.
    """
    gain = np.atleast_1d(np.asarray(gain_hz, np.float64))
    named = {"bits": bits, "gain_hz": gain, "power_w": power_w, "fixed_s": fixed_s, "cap": cap}
    arrays = {name: one_by_one(len(gain), name, values) for name, values in named.items()}
    for name in ("bits", "gain_hz", "power_w", "cap"):
        above_zero(name, arrays[name])
    above_zero("band_hz", band_hz)
    tau = deadline_s - arrays["fixed_s"]
    per_watt = gain / arrays["power_w"]  # G
    rate = arrays["bits"] / np.where(tau > 0, tau, math.nan)
    least = minimum_band_hz(np.where(tau > 0, rate, math.inf), gain, arrays["cap"])
    _feasible(least, band_hz, deadline_s)

    need = rate * LN2  # s ln2 / tau, so that b = need / y
    most = need / least  # y at the largest power or spectral efficiency
    unit = tau / per_watt  # -dE/db over phi
    limit = _phi(most)
    band, held, price = least, np.ones(len(gain), np.bool_), 0.0

    def given(x: float) -> tuple[float, float]:  # x = -ln lambda
        nonlocal band, held, price
        price = math.exp(-x)
        level = price / unit
        held = level >= limit
        q = np.where(held, limit, level)
        y = np.where(held, most, _phi_inverse(q))
        band = need / y
        total = float(band.sum())
        slope = float((band * q / (y * y * np.exp(y)))[~held].sum())
        return math.log(total / band_hz), slope / total

    if least.sum() < band_hz * (1.0 - 1e-12):
        # At the dearest price all are held, which leaves band over; at the cheapest each alone would take B.
        low = -math.log(float((unit * limit).max()))
        high = -math.log(float((unit * _phi(np.minimum(need / band_hz, most))).min()))
        middle = -math.log(float((unit * _phi(np.minimum(need * len(gain) / band_hz, most))).mean()))
        increasing_root(given, min(max(middle, low), high), low - 1.0, high + 1.0, 1e-13)
    y = need / band
    power = (need / per_watt) * np.expm1(y) / y
    return LeastEnergy(band, power, tau * power, price, held)


def share_min_energy(demand: Demand) -> Share:
    """Spend least by ``deadline_s``; where it cannot be met, finish as early as can be at the largest powers.

    Whoever is late then is the caller's to drop: how many devices a round can take is not decided here.
    """
    arrays = (demand.bits, demand.gain_hz, demand.fixed_s, demand.band_hz)
    band, earliest = min_max(*arrays, demand.cap)
    planned = demand.deadline_s * (1.0 - _SPARE)
    if earliest >= planned or not math.isfinite(planned):
        return at_full_power(demand, band)
    least = min_energy(*arrays[:2], demand.power_w, *arrays[2:], planned, demand.cap)
    return Share(least.band_hz, np.full(len(demand), planned), least.power_w)


def _phi(y: Reals) -> Reals:
    """Return 1 + (y - 1) e^y = int_0^y u e^u du; where it cancels, y^2 sum_n y^n / (n! (n + 2))."""
    direct = y * np.exp(y) - np.expm1(y)
    return np.where(y < 0.02, y * y * np.polyval(_SERIES, np.minimum(y, 0.02)), direct)


def _phi_inverse(q: Reals) -> Reals:
    """Return y > 0 of phi(y) = ``q`` > 0, elementwise: 1 + W0((q - 1) / e), polished."""
    root = np.sqrt(2.0 * q)
    near = root - root * root / 3.0 + 11.0 / 72.0 * root**3  # the series of W0 at its branch point
    y: Reals = np.where(q < 1e-4, near, 1.0 + lambertw((np.maximum(q, 1e-4) - 1.0) / math.e).real)
    for _ in range(2):
        y = y - (_phi(y) - q) / (y * np.exp(y))
    return y


def _feasible(least: Reals, band_hz: float, deadline_s: float) -> None:
    """Raise ``ValueError`` unless everybody's least band exists and all of them fit."""
    lost = np.flatnonzero(~np.isfinite(least))
    if len(lost):
        places = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        raise ValueError(
            f"deadline_s = {deadline_s:g} cannot be met by {len(lost)} of {len(least)} devices at any band "
            f"(places {places}): give them more time or power, or leave them out"
        )
    if least.sum() > band_hz * (1.0 + 1e-9):
        raise ValueError(
            f"deadline_s = {deadline_s:g} needs {least.sum():g} Hz at the largest powers, and band_hz is "
            f"{band_hz:g}: allow more time or band, or fewer devices"
        )
