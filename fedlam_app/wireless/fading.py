"""Rayleigh fading: what it leaves of the capacity on average, and draws of it.

With mean SNR s and |h|^2 ~ Gamma(M, 1) of maximum ratio combining over M antennas (M = 1: Exp(1)):

    E log2(1 + s |h|^2)            = e^{1/s} E1(1/s) / ln 2                                        (M = 1)
    E min(log2(1 + s |h|^2), c)    = [e^{1/s} E1(1/s) - e^{1/s} E1((1 + x) / s)] / ln 2,  x = 2^c - 1
    E log2(1 + s |h|^2)           >= log2(1 + e^{psi(M)} s)        M = 1: e^-0.5772 = 0.5615

The first is textbook (Goldsmith, Wireless Communications, ch. 4); the second is its integral up to the cap;
the third is Jensen's inequality in ln|h|^2, whose mean is psi(M), exact as s grows: allocators invert it.
e^x E1(x) is never formed from its factors where they overflow: beyond x = 20 it is a continued fraction,

    e^x E1(x) = 1 / (x + 1 - 1 / (x + 3 - 4 / (x + 5 - 9 / ...)))          (DLMF 6.9.1, even part)

An upload of seconds outlives the channel's memory (milliseconds) and sees the mean; one draw a round is for
uploads shorter than that. SNRs are ratios, not dB; rates are in b/s/Hz.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

Doubles = NDArray[np.float64]

_FAR = 20.0
_TERMS = 12  # of the continued fraction: relative error under 1e-15 from _FAR on


def ergodic_rate(snr: NDArray[np.floating], cap: float = math.inf) -> Doubles:
    """Return E min(log2(1 + snr |h|^2), cap) [b/s/Hz] for M = 1, ``snr`` >= 0 of any shape, ``cap`` > 0."""
    snr = np.asarray(snr, np.float64)
    # Without a signal 1 / snr is infinite, and the rate 0.
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.divide(1.0, snr)
        beyond = (np.exp2(cap) - 1.0) * inverse
        lost = np.exp(-beyond) * _scaled_exp1(inverse + beyond)
    return np.divide(_scaled_exp1(inverse) - lost, math.log(2.0))


def snr_factor(antennas: int = 1) -> float:
    """Return e^{psi(M)}: the SNR without fading that is worth, at high SNR, an SNR of 1 with it."""
    if antennas < 1:
        raise ValueError(f"antennas = {antennas} must be at least 1")
    return math.exp(float(special.digamma(antennas)))


def ergodic_bound(snr: NDArray[np.floating], antennas: int = 1) -> NDArray[np.floating]:
    """Return log2(1 + e^{psi(M)} snr) [b/s/Hz], at most the mean rate, exact as the SNR grows."""
    return np.log2(1.0 + snr_factor(antennas) * snr)


def block_fading(count: int, draw: np.random.Generator, antennas: int = 1) -> NDArray[np.float32]:
    """Return power gains |h|^2 (count,), one for a whole block; their mean is ``antennas``."""
    if antennas < 1:
        raise ValueError(f"antennas = {antennas} must be at least 1")
    if antennas == 1:
        return draw.standard_exponential(count, dtype=np.float32)
    return draw.standard_gamma(antennas, count, dtype=np.float32)


def _scaled_exp1(x: Doubles) -> Doubles:
    """Return e^x E1(x) for x > 0, infinity included."""
    near = np.minimum(x, _FAR)
    value = np.exp(near) * special.exp1(near)
    far = np.maximum(x, _FAR)
    tail = far + (2 * _TERMS + 1)
    for k in range(_TERMS, 0, -1):
        tail = far + (2 * k - 1) - k * k / tail
    return np.where(x > _FAR, 1.0 / tail, value)
