"""What an uncoded analog link adds to a release, and how much noise a device must then add by itself.

A device sends the entries of x (d,), ||x|| <= S, with artificial noise n ~ N(0, s^2), each as a real symbol
of amplitude a; the receiver hears it through a gain |h|^2 with noise w ~ N(0, N0) and divides by h a:

    y = h a (x + n) + w           sigma^2 = s^2 + N0 / (|h|^2 a^2)                  of an entry, in its units
                                  a^2 (S^2 / d + s^2) <= P                          power of a symbol

*Orthogonal* (each device on a band of its own): to have sigma = z C one tries a^2 = P d / S^2. If the
receiver's noise is then enough, privacy is free. If not, the rest is topped up, and takes power itself:

    s^2 = z^2 C^2 - N0 / (|h|^2 a^2),        a^2 = (P + N0 / |h|^2) / (S^2 / d + z^2 C^2)

*Over the air* (K devices at once, received at one amplitude |h_k| a_k = c) noise adds up like the signal:

    y / c = sum_k (x_k + n_k) + w / c        sigma^2 = K s^2 + N0 / c^2,      s^2 = (z^2 C^2 - N0 / c^2) / K
    c^2 = P d |h|^2 / S^2 where that is free, else (P d |h|^2 + N0 d / K) / (S^2 + d z^2 C^2 / K)

with |h|^2 of the weakest, so that all K together make the noise that on links of their own each would make:
the 1 / sqrt(K) of M. Seif, R. Tandon, M. Li, "Wireless Federated Learning with Local Differential Privacy",
ISIT 2020. That privacy is free below a threshold of the SNR: D. Liu, O. Simeone, "Privacy for Free: Wireless
Federated Learning via Uncoded Transmission with Adaptive Power Control", IEEE JSAC 2021, arXiv:2006.05459.
The closed forms are derived here and not quoted from either; tests hold them against a numerical optimiser.
S and d are public bounds and sizes: an amplitude that followed ||x|| would tell of it.

When may w count? Only uncoded (a decoder takes noise away); never at the estimate but at the *worst case*,
:func:`worst`: an adversary's receiver may be quieter, better placed, and hear no interference. A second copy
would halve N0, so nothing is sent twice. Against the server, who owns the receiver, counting is trust; and
where peers top up, of K - m honest devices' noise only (K - m) / K counts against m that collude.

Powers, gains and N0 are on one scale, all arrays broadcast, N0 is the noise of one *real* dimension: half of
that of a complex symbol.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reals = NDArray[np.float64]

REAL_SHARE = 0.5  # of a complex symbol's noise, in the one dimension that carries an entry


@dataclass(frozen=True, slots=True)
class Uplink:
    """How devices send: at which amplitude, and with how much noise of their own."""

    amplitude: Reals  # a^2; over the air c^2, as received
    artificial: Reals  # s^2 of an entry, of each device


def orthogonal(
    gain: ArrayLike, power: ArrayLike, noise: ArrayLike, signal: ArrayLike, wanted: ArrayLike
) -> Uplink:
    """Return a^2 and s^2 of devices on bands of their own.

    ``gain`` |h|^2 and ``noise`` N0 are those that count, ``signal`` is S^2 / d and ``wanted`` z^2 C^2.
    """
    h2, p, n0, x2, v = (np.asarray(value, np.float64) for value in (gain, power, noise, signal, wanted))
    loud = p / x2
    free = n0 / (h2 * loud) >= v
    joint = (p + n0 / h2) / (x2 + v)
    square = np.where(free, loud, joint)
    return Uplink(square, np.where(free, 0.0, np.maximum(v - n0 / (h2 * square), 0.0)))


def together(gain: ArrayLike, power: float, noise: float, signal: float, wanted: float) -> Uplink:
    """Return c^2 and every device's s^2, of K devices of gains (K,) that are heard as one sum."""
    h2 = np.atleast_1d(np.asarray(gain, np.float64))
    count, weakest = len(h2), float(h2.min())
    loud = power * weakest / signal
    if noise / loud >= wanted:
        return Uplink(np.float64(loud), np.float64(0.0))  # type: ignore[arg-type]
    square = (power * weakest + noise / count) / (signal + wanted / count)
    artificial = max(wanted - noise / square, 0.0) / count
    return Uplink(np.float64(square), np.float64(artificial))  # type: ignore[arg-type]


def received(gain: ArrayLike, noise: ArrayLike, amplitude: ArrayLike, artificial: ArrayLike) -> Reals:
    """Return sigma^2 = s^2 + N0 / (|h|^2 a^2) of an entry; over the air s^2 is the sum, and the gain 1."""
    h2, n0 = np.asarray(gain, np.float64), np.asarray(noise, np.float64)
    return np.asarray(np.asarray(artificial, np.float64) + n0 / (h2 * np.asarray(amplitude, np.float64)))


def power(amplitude: ArrayLike, artificial: ArrayLike, signal: ArrayLike) -> Reals:
    """Return the power a^2 (S^2 / d + s^2) of a symbol, at the largest signal."""
    level = np.asarray(signal, np.float64) + np.asarray(artificial, np.float64)
    return np.asarray(np.asarray(amplitude, np.float64) * level)


def worst(snr: ArrayLike, mean_snr: ArrayLike, figure_db: float, margin_db: float) -> Reals:
    """Return the gain over noise that an adversary may have, of links of SNR ``snr`` in this round.

    It hears no worse than without fading (its own fades are others), without the ``figure_db`` of noise
    figure and interference that the receiver has over thermal noise, and ``margin_db`` better than that.
    """
    best = np.maximum(np.asarray(snr, np.float64), np.asarray(mean_snr, np.float64))
    return np.asarray(best * 10.0 ** ((figure_db + margin_db) / 10.0))
