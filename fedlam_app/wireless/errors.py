"""Lost packets: how likely an upload is gone although it was sent.

    rayleigh, ergodic   q = E[1 - exp(-A / |h|^2)] = 1 - 2 sqrt(A) K1(2 sqrt(A)),    A = m (I + B N0) / (P g)
    rayleigh, block     q = 1 - exp(-A), whose gain already has the round's |h|^2
    harq                q = 1e-3, what is left of the 10 % first transmissions that fail; they cost rate
    none                q = 0

The expectation, over |h|^2 ~ Exp(1), is the packet error rate of Chen et al., "A Joint Learning and
Communications Framework for Federated Learning over Wireless Networks" (arXiv 1909.07972); its closed form is
derived here from int_0^inf exp(-x - A / x) dx. m = 1.08 is the waterfall threshold of the authors' code;
interference and noise figure are in N0, so that A = m b / a with the gain a [Hz].

As A falls the closed form is 1 minus nearly 1. Up to A = 0.1 it is therefore the series of K1 (DLMF 10.31.1)
with the 1 cancelled by hand, H_j = 1 + 1/2 + ... + 1/j:

    q = A sum_j A^j / (j! (j + 1)!) (H_j + H_{j+1} - 2 gamma - ln A)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from fedlam_app.config import WirelessConfig

Floats = NDArray[np.floating]

WATERFALL = 1.08
HARQ_LOSS = 1e-3
_SERIES = 0.1  # up to which the series is taken
_TERMS = 7  # its next term is under 1e-16 of the sum


def rayleigh_error(a: Floats) -> NDArray[np.float64]:
    """Return q for A of any shape, from 0 (no loss) to infinity (no signal)."""
    a = np.asarray(a, np.float64)
    small = np.clip(a, 1e-300, _SERIES)
    total = np.zeros_like(small)
    for j in range(_TERMS):
        harmonic = float(special.digamma(j + 1) + special.digamma(j + 2))  # H_j + H_{j+1} - 2 gamma
        total += small**j / (math.factorial(j) * math.factorial(j + 1)) * (harmonic - np.log(small))
    z = 2.0 * np.sqrt(np.clip(a, _SERIES, 1e5))  # K1 is 0 long before, and 0 times infinity is nothing
    return np.where(a <= _SERIES, np.minimum(a, _SERIES) * total, 1.0 - z * special.k1(z))


def packet_error(config: WirelessConfig, gain_hz: Floats, band_hz: Floats | float) -> NDArray[np.float64]:
    """Return the chance that an upload is lost, for ``gain_hz`` of any shape on ``band_hz`` each."""
    gain = np.asarray(gain_hz, np.float64)
    if config.loss != "rayleigh":
        return np.full(gain.shape, HARQ_LOSS if config.loss == "harq" else 0.0)
    with np.errstate(divide="ignore"):
        a = np.divide(WATERFALL * np.maximum(band_hz, 1e-9), gain)
    return rayleigh_error(a) if config.fading == "ergodic" else -np.expm1(-a)
