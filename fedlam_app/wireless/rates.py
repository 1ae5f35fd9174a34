"""From a link to its rate: three models of modulation and coding, each with and without fading.

A device of gain a = P g / N0 [Hz] (N0 with noise figure and interference) has the SNR a / b over a band b.

    shannon    e = 0.75, cap 5.55 b/s/Hz                         (an implementation loss; the cap is CQI 15)
    truncated  e = 0.4, cap 2 up; e = 0.6, cap 4.4 down; from -10 dB                    (TR 36.942, annex A)
    cqi        efficiency of the highest CQI whose threshold the SNR reaches  (TS 38.214, Table 5.2.2.1-2)

Allocators need a rate that they can invert. :class:`Link` is that, for every model:

    r(b) = min(e b log2(1 + f a / b), c b)            f = 1, or e^-0.5772 under ergodic Rayleigh fading

for ``cqi`` with e = 0.79 and f = 0.53, fitted by least squares to the staircase over its range of dB (rms
error 0.12 b/s/Hz). :func:`rate_bps` of a configuration is what is really transmitted: with block fading the
model at the SNR of the round, whose fading is in a; with ergodic fading its exact mean over |h|^2 ~ Exp(1),

    e E min(log2(1 + |h|^2 a / b), c / e)                                                   (``fading.py``)
    sum_i (eta_i - eta_{i-1}) exp(-theta_i b / a)                 cqi, of thresholds theta, efficiencies eta

Below the floor (-6.7 dB, CQI 1; truncated -10 dB) nothing gets through, so a device whose SNR would be lower
uses only a / theta of its band, where it is the floor; one that cannot reach it over one resource block is in
outage: rate 0. ``wireless.loss = harq`` costs every rate its first transmissions that fail, a tenth.

Departures: the CQI's thresholds, at 10 % block errors, are simulators' customary ones, as no TS has any;
truncated's uplink constants are from memory of the TR; reference signals and control take no share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedlam_app.config import WirelessConfig
from fedlam_app.wireless.fading import ergodic_rate, snr_factor

Direction = Literal["uplink", "downlink"]
Floats = NDArray[np.floating]

BLOCK_HZ = 180e3  # a resource block: 12 subcarriers of 15 kHz
FIRST_LOSS = 0.1  # of first transmissions, which link adaptation aims at
CQI = (  # SNR [dB] from which, and efficiency [b/s/Hz] with which, CQI 1 to 15 are used
    (-6.7, 0.1523),
    (-4.7, 0.2344),
    (-2.3, 0.3770),
    (0.2, 0.6016),
    (2.4, 0.8770),
    (4.3, 1.1758),
    (5.9, 1.4766),
    (8.1, 1.9141),
    (10.3, 2.4063),
    (11.7, 2.7305),
    (14.1, 3.3223),
    (16.3, 3.9023),
    (18.7, 4.5234),
    (21.0, 5.1152),
    (22.7, 5.5547),
)
CQI_THRESHOLD_DB, CQI_EFFICIENCY = np.array(CQI).T
_THRESHOLD = 10.0 ** (CQI_THRESHOLD_DB / 10.0)
_STEP = np.diff(CQI_EFFICIENCY, prepend=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """r(b) = min(efficiency b log2(1 + snr_factor a / b), cap b), from an SNR a / b of ``floor_db`` on."""

    efficiency: float
    cap: float  # b/s/Hz
    snr_factor: float = 1.0
    floor_db: float = float(CQI_THRESHOLD_DB[0])

    @property
    def floor(self) -> float:
        """The lowest SNR that carries anything, as a ratio."""
        return float(10.0 ** (self.floor_db / 10.0))


def link_of(config: WirelessConfig, direction: Direction = "uplink") -> Link:
    """Return the invertible rate of a configuration; ``direction`` matters to ``truncated`` alone."""
    kept = _kept(config)
    factor = snr_factor() if config.fading == "ergodic" else 1.0
    if config.rate == "shannon":
        return Link(efficiency=0.75 * kept, cap=5.55 * kept, snr_factor=factor)
    if config.rate == "cqi":
        return Link(efficiency=0.79 * kept, cap=float(CQI_EFFICIENCY[-1]) * kept, snr_factor=0.53 * factor)
    efficiency, cap = (0.4, 2.0) if direction == "uplink" else (0.6, 4.4)
    return Link(efficiency=efficiency * kept, cap=cap * kept, snr_factor=factor, floor_db=-10.0)


def cqi_efficiency(snr: Floats) -> NDArray[np.float64]:
    """Return the efficiency [b/s/Hz] of the highest CQI for SNRs (ratios) of any shape; 0 below CQI 1."""
    reached = np.searchsorted(_THRESHOLD, snr, side="right")
    return np.concatenate([[0.0], CQI_EFFICIENCY])[reached]


def cqi_ergodic(snr: Floats) -> NDArray[np.float64]:
    """Return E ``cqi_efficiency(snr |h|^2)`` [b/s/Hz] over Rayleigh fading, for mean SNRs of any shape."""
    with np.errstate(divide="ignore"):
        inverse = np.divide(1.0, np.asarray(snr, np.float64))
    return np.exp(-_THRESHOLD * inverse[..., None]) @ _STEP


def rate_bps(
    model: WirelessConfig | Link,
    gain_hz: Floats,
    band_hz: Floats | float,
    direction: Direction = "uplink",
) -> Floats:
    """Return rates [b/s] of devices of ``gain_hz``, any shape, on ``band_hz`` each.

    Of a :class:`Link` its closed form, in the arguments' type; of a configuration what is really transmitted,
    in float64. Both know the floor and outage.
    """
    link = model if isinstance(model, Link) else link_of(model, direction)
    used, snr = _used(link, gain_hz, band_hz)
    if isinstance(model, Link) or (model.rate != "cqi" and model.fading == "block"):
        # NumPy vectorises the natural logarithm, and not log2.
        nats = np.log(1.0 + link.snr_factor * snr)
        return used * np.minimum(link.efficiency / math.log(2.0) * nats, link.cap)
    if model.rate == "cqi":
        mean = cqi_ergodic if model.fading == "ergodic" else cqi_efficiency
        return used * mean(snr) * _kept(model)
    return used * link.efficiency * ergodic_rate(snr, link.cap / link.efficiency)


def _kept(config: WirelessConfig) -> float:
    """Return the share of transmissions that carry something new."""
    return 1.0 - FIRST_LOSS if config.loss == "harq" else 1.0


def _used(link: Link, gain_hz: Floats, band_hz: Floats | float) -> tuple[Floats, Floats]:
    """Return the band [Hz] that a device fills, 0 in outage, and its SNR there."""
    widest = gain_hz / link.floor
    used = np.minimum(widest, band_hz)
    # The SNR at the edge is the floor itself, which rounding must not put below it.
    snr = np.maximum(gain_hz / np.maximum(used, 1e-9), link.floor)
    return np.where(widest < BLOCK_HZ, 0.0, used), snr
