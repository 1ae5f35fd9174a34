"""One resource block each, to whom it does most good: assignment by packet error, latency and energy limits.

M. Chen et al., "A Joint Learning and Communications Framework for Federated Learning over Wireless Networks",
IEEE TWC 2021, arXiv:1909.07972. Device i sends n_i examples' worth of update over block n, lost with q_in:

    min sum_i sum_n x_in n_i (q_in - 1),   a block to at most one device, a device at most one block,
    x_in = 1 only where the update is in by the deadline and costs no more than the energy limit

a linear assignment, solved exactly (Hungarian method). A device sends with P* = min(P_max, P_E), where P_E
spends the limit E: with x the SNR over b and c = s ln2 / (E g / N0), ln(1 + x) = c x, P_E = b N0 x / g; no
power keeps it where c >= 1. With a largest spectral efficiency e the upload takes s / (e b) at least: P_E <=
E e b / s too.

Packet error rates are those of Rayleigh fading, by the mean gain (``errors.py``), over the block's noise with
i = I_n / (b N0): A = m b (1 + i) / a.

Departures: the mean gain, and so the rate, is one for all blocks, where the paper takes a mean rate per
block; the energy of the computation is left to the caller, who takes it off the limit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from fedlam_app.wireless.allocate import LN2, finish_s, log_snr
from fedlam_app.wireless.demand import Demand, Reals, Share, one_by_one
from fedlam_app.wireless.errors import WATERFALL, rayleigh_error

NOBODY = -1


def block_error(gain_hz: ArrayLike, block_hz: float, interference: ArrayLike = 0.0) -> Reals:
    """Return the packet error rate over a block; ``interference`` is over the block's noise.

    ``gain_hz`` (mean, P g / N0) and ``interference`` have any shapes that broadcast; no gain is a rate of 1.
    """
    with np.errstate(divide="ignore"):
        ratio = WATERFALL * block_hz * (1.0 + np.asarray(interference)) / np.asarray(gain_hz, np.float64)
    return rayleigh_error(ratio)


def limited_power(
    bits: ArrayLike,
    gain_hz: ArrayLike,
    power_w: ArrayLike,
    energy_j: ArrayLike,
    band: float,
    cap: ArrayLike = math.inf,
) -> Reals:
    """Return P* (K,) [W]: the largest <= ``power_w`` whose upload over ``band`` Hz costs <= ``energy_j``.

    ``gain_hz`` is at ``power_w``. 0 where no power keeps the limit.
    """
    s, a, most, limit, e = np.broadcast_arrays(
        *(np.asarray(values, np.float64) for values in (bits, gain_hz, power_w, energy_j, cap))
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slack = limit * (a / most) / (s * LN2) - 1.0  # 1 / c - 1
        snr = np.expm1(log_snr(np.where((slack > 0) & np.isfinite(slack), slack, 1.0)))
        spent = np.minimum(band * snr * most / a, limit * (e * band / s))
    return np.where(slack > 0, np.where(np.isfinite(slack), np.minimum(most, spent), most), 0.0)


def assign(examples: ArrayLike, error: ArrayLike, allowed: ArrayLike) -> NDArray[np.intp]:
    """Return each device's block (K,), or -1 where it gets none.

    ``error`` (K, N): packet error rates; ``allowed`` (K, N) bool: whether the limits are kept;
    ``examples`` (K,).
    """
    errors, may = np.asarray(error, np.float64), np.asarray(allowed, np.bool_)
    if errors.ndim != 2 or may.shape != errors.shape:
        raise ValueError(
            f"error has shape {errors.shape} and allowed {may.shape}; both must be (devices, blocks)"
        )
    weight = one_by_one(len(errors), "examples", examples)[:, None] * (errors - 1.0) * may
    devices, blocks = linear_sum_assignment(weight)
    found = np.full(len(errors), NOBODY, np.intp)
    found[devices] = np.where(weight[devices, blocks] < 0, blocks, NOBODY)
    return found


def share_hungarian(demand: Demand) -> Share:
    """Give the devices that matter most a block each, within ``deadline_s`` and ``energy_j``."""
    count = math.floor(demand.band_hz / demand.block_hz * (1.0 + 1e-12))
    if count < 1:
        raise ValueError(f"band_hz = {demand.band_hz:g} holds no block of block_hz = {demand.block_hz:g}")
    power = limited_power(
        demand.bits, demand.gain_hz, demand.power_w, demand.energy_j, demand.block_hz, demand.cap
    )
    gain = demand.gain_hz * (power / demand.power_w)
    time = finish_s(demand.bits, gain, demand.fixed_s, np.full(len(demand), demand.block_hz), demand.cap)
    fits = np.isfinite(time) & (time <= demand.deadline_s)
    shape = (len(demand), min(count, len(demand)))  # blocks are alike here: no device needs the others
    error = np.broadcast_to(block_error(gain, demand.block_hz)[:, None], shape)
    got = assign(demand.examples, error, np.broadcast_to(fits[:, None], shape)) != NOBODY
    return Share(
        np.where(got, demand.block_hz, 0.0), np.where(got, time, math.inf), np.where(got, power, 0.0)
    )
