"""Over-the-air aggregation: all devices send at once, and the channel adds what they send.

    y = sum_k h_k p_k w_k x_k + z,   x_k = (g_k - mean_k) / std,   w_k = n_k / max n,   z ~ N(0, sigma^2)

entry by entry, real. A device scales by its weight, its fading and its power; means, and one std for all (the
weighted root mean square of the devices' own), go over a side channel of a few bytes. At received amplitude
sqrt(eta) per unit, the server estimates the weighted mean by

    (std y / sqrt(eta) + sum_k w_k mean_k) / sum_k w_k
        = sum_k w_k (theta_k g_k + (1 - theta_k) mean_k) / sum_k w_k + noise,   theta_k = h_k p_k / sqrt(eta)

so theta and the noise's std are all that a simulator needs of the air: devices fold theta_k w_k g_k into an
exact running sum, and :func:`received` makes of it what the server would have heard. Three rules of power:

* *truncated inversion*: theta = 1 where |h_k|^2 / Omega_k >= g, else the device is silent, and not in the
  mean. G. Zhu et al., "Broadband Analog Aggregation for Low-Latency Federated Edge Learning",
  arXiv:1812.11494. Under Rayleigh fading of mean Omega_k, and a limit P_k on average power: eta = min_k P_k
  Omega_k / (w_k^2 E1(g)), and a device takes part in exp(-g) of all rounds.
* *inversion*: theta = 1 for all; eta = min_k P_k |h_k|^2 / w_k^2.
* *least error*: X. Cao et al., "Optimized Power Control for Over-the-Air Computation in Fading Channels",
  arXiv:1906.06858. With a_k = sqrt(P_k) |h_k|, in ascending order of a_k / w_k, the least mean squared error
  of the sum is at sqrt(eta) = min_k (sigma^2 + sum_{i<=k} a_i^2) / sum_{i<=k} a_i w_i: weak devices send at
  full power, theta_k = min(1, a_k / (w_k sqrt(eta))).

    MSE of the sum of w_k x_k = sum_k w_k^2 (theta_k - 1)^2 + sigma^2 / eta

The formulas were derived again here, with weights and unlike mean gains (w = Omega = 1 gives the papers');
they are not quoted by the papers' numbers. Powers in W, on one scale with sigma^2; gains are power gains
|h|^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import exp1

from fedlam_app.wireless.demand import Reals, above_zero, not_negative, one_by_one


@dataclass(frozen=True, slots=True)
class Air:
    """What the air does to the sum of normalised, weighted entries in one round."""

    theta: Reals  # (K,) in [0, 1]: the share of each device's signal that arrives; 0: silent
    weights: Reals  # (K,) over their largest
    heard: NDArray[np.bool_]  # (K,) who is in the mean
    eta: float  # received power per unit entry of weight 1 [W]
    noise_std: float  # of the sum, in units of an entry: sigma / sqrt(eta)

    @property
    def total_weight(self) -> float:
        """Sum of the weights of those in the mean; 0 where all are silent."""
        return float(self.weights[self.heard].sum())

    @property
    def mse(self) -> float:
        """Mean squared error of the weighted sum over those in the mean, of unit-variance entries."""
        lost = self.weights * (1.0 - self.theta)
        return float((lost[self.heard] ** 2).sum()) + self.noise_std**2

    @property
    def noise_variance(self) -> float:
        """Variance of the noise in an entry of the estimated mean, over std^2; inf where all are silent."""
        return (self.noise_std / self.total_weight) ** 2 if self.total_weight else math.inf


def participation(threshold: float) -> float:
    """Return the share exp(-g) of rounds in which a Rayleigh-fading device is not silent."""
    return math.exp(-threshold)


def truncated_inversion(
    gain: ArrayLike,
    weights: ArrayLike,
    power_w: ArrayLike,
    noise_w: float,
    threshold: float,
    mean_gain: ArrayLike = 1.0,
) -> Air:
    """Invert the channel, and be silent in deep fades; ``power_w`` limits the average over Rayleigh fading.

    ``gain`` (K,) is |h|^2 now, ``mean_gain`` its mean over fading, ``threshold`` the |h|^2 over that mean
    below which a device is silent (> 0: the power of full inversion has no mean).
    """
    g, w, p = _checked(gain, weights, power_w, noise_w)
    above_zero("threshold", threshold)
    omega = one_by_one(len(g), "mean_gain", mean_gain)
    above_zero("mean_gain", omega)
    eta = float((p * omega / w**2).min() / exp1(threshold))
    heard = g >= threshold * omega
    return Air(heard.astype(np.float64), w, heard, eta, math.sqrt(noise_w / eta))


def inversion(gain: ArrayLike, weights: ArrayLike, power_w: ArrayLike, noise_w: float) -> Air:
    """Invert every channel at ``power_w`` (K,) at most: no bias, and the weakest device sets the noise."""
    g, w, p = _checked(gain, weights, power_w, noise_w)
    above_zero("gain", g)
    eta = float((p * g / w**2).min())
    return Air(np.ones(len(g)), w, np.ones(len(g), np.bool_), eta, math.sqrt(noise_w / eta))


def least_error(gain: ArrayLike, weights: ArrayLike, power_w: ArrayLike, noise_w: float) -> Air:
    """Balance bias and noise for the least mean squared error of the sum, at ``power_w`` (K,) at most."""
    g, w, p = _checked(gain, weights, power_w, noise_w)
    if not (g > 0).any():
        raise ValueError("gain is 0 for all devices; one at least must be heard")
    a = np.sqrt(p * g)
    order = np.argsort(a / w, kind="stable")
    squares, sums = np.cumsum(a[order] ** 2), np.cumsum((a * w)[order])
    reached = sums > 0  # a prefix of devices without any gain bounds nothing
    root = float(((noise_w + squares[reached]) / sums[reached]).min())  # sqrt(eta)
    theta = np.minimum(1.0, a / (w * root))
    return Air(theta, w, np.ones(len(g), np.bool_), root**2, math.sqrt(noise_w) / root)


def common_std(stds: ArrayLike, weights: ArrayLike) -> float:
    """Return the one std that all normalise by: the weighted root mean square of theirs (K,)."""
    return float(
        np.sqrt(np.average(np.square(np.asarray(stds, np.float64)), weights=np.asarray(weights, np.float64)))
    )


def received(total: Reals, air: Air, means: ArrayLike, std: float, draw: np.random.Generator) -> Reals:
    """Return the estimate (d,) of the weighted mean, from the exact sum of what the devices sent.

    ``total`` (d,) = sum_k theta_k w_k g_k, with ``air.theta`` and ``air.weights``; ``means`` (K,) of each
    device's entries; ``std`` of :func:`common_std`. ``ValueError`` where everybody was silent.
    """
    if not air.total_weight:
        raise ValueError("all devices are silent: there is nothing to estimate; lower the threshold")
    kept = np.where(air.heard, air.weights * (1.0 - air.theta), 0.0)
    level = float(kept @ one_by_one(len(kept), "means", means))
    noise = std * air.noise_std * draw.standard_normal(total.shape)
    return (total + level + noise) / air.total_weight


def airtime_s(entries: int, band_hz: float) -> float:
    """Return how long the air is in use [s]: d / B symbols of one entry each, however many devices send."""
    above_zero("band_hz", band_hz)
    return entries / band_hz


def _checked(
    gain: ArrayLike, weights: ArrayLike, power_w: ArrayLike, noise_w: float
) -> tuple[Reals, Reals, Reals]:
    """Return gains, weights over their largest, and powers, as float64 (K,)."""
    g = np.atleast_1d(np.asarray(gain, np.float64))
    if g.size == 0:
        raise ValueError("gain is empty; at least one device must send")
    w, p = one_by_one(len(g), "weights", weights), one_by_one(len(g), "power_w", power_w)
    not_negative("gain", g)
    above_zero("weights", w)
    above_zero("power_w", p)
    above_zero("noise_w", noise_w)
    return g, w / w.max(), p
