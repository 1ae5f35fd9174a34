"""Scores of a channel forecast: normalised error and spectral efficiency, on complex arrays.

Every array is complex with axes (U, A, F, K): users, antennas, future slots, subcarriers.

**NMSE.** sum |predicted - target|^2 / sum |target|^2. The ratio of sums weighs users by power; the mean
of per-user ratios weighs them alike. The reference implementation of LLM4CP (arXiv 2406.14440) scores
its networks by the first and its classical competitor by the second, a difference of 7 dB for the same
forecast; here one scorer gives both, for every predictor. The target is whatever is passed: a clean
channel, or a noisy label, for which even a perfect forecast cannot fall below ``noisy_floor_db``.

**Spectral efficiency.** log2(1 + Nt snr rho^2), rho = |h^H hhat| / (|h| |hhat|) over the antennas: a
matched-filter precoder built from the forecast, for a channel whose gain per antenna is one. The
reference views its interleaved real array as pairs after folding the antennas, so that its "complex"
numbers join the real parts of two antennas: its score changes when the forecast is turned by a common
phase, which costs no rate at all. Complex arrays from end to end make that mistake impossible.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Complex = npt.NDArray[np.complexfloating]
Real = npt.NDArray[np.float64]

_USER_AXES = (1, 2, 3)
_SLOT_AXES = (0, 1, 3)


def nmse_sums(predicted: Complex, target: Complex) -> tuple[Real, Real]:
    """Return per-user sums (error (U,), power (U,)): all that the NMSEs over users are made of."""
    return _sums(predicted, target, _USER_AXES)


def nmse_db(error: Real, power: Real) -> float:
    """Return the NMSE [dB] as a ratio of sums; ``error`` and ``power`` of any one shape, for example (U,)."""
    return to_db(float(np.sum(error)) / float(np.sum(power)))


def nmse_per_user_db(error: Real, power: Real) -> float:
    """Return the NMSE [dB] as the mean over users of each user's own ratio, (U,) and (U,)."""
    return to_db(float(np.mean(np.asarray(error) / np.asarray(power))))


def nmse_per_speed(error: Real, power: Real, speed_kmh: Real, width_kmh: float = 10.0) -> dict[float, float]:
    """Return {bin centre [km/h]: linear ratio of sums} over the users (U,) of each occupied speed bin.

    The bins are centred on multiples of ``width_kmh`` (10, 20, ...), as the speeds of LLM4CP's test set.
    """
    bins = np.floor(np.asarray(speed_kmh, dtype=np.float64) / width_kmh + 0.5)
    return {
        float(index * width_kmh): float(np.sum(error[bins == index]) / np.sum(power[bins == index]))
        for index in np.unique(bins)
    }


def nmse_speed_mean_db(error: Real, power: Real, speed_kmh: Real, width_kmh: float = 10.0) -> float:
    """Return the NMSE [dB] of the mean over speed bins of the linear ratios: LLM4CP's headline figure."""
    return to_db(float(np.mean(list(nmse_per_speed(error, power, speed_kmh, width_kmh).values()))))


def nmse_per_horizon(predicted: Complex, target: Complex) -> Real:
    """Return the linear ratio of sums of each future slot, (F,)."""
    error, power = _sums(predicted, target, _SLOT_AXES)
    return error / power


def noisy_floor_db(snr_db: float) -> float:
    """Return the NMSE [dB] of a perfect forecast scored on labels with noise at ``snr_db``.

    The error is the noise n and the label's power is 1 + n: n / (1 + n), -18.07 dB at 18 dB.
    """
    noise = 10.0 ** (-snr_db / 10.0)
    return to_db(noise / (1.0 + noise))


def squared_cosine(predicted: Complex, target: Complex) -> Real:
    """Return rho^2 (U, F, K) between forecast and channel across the antennas; 0 where one of them is 0."""
    _same_shape(predicted, target)
    inner = np.abs(np.einsum("uafk,uafk->ufk", target.conj(), predicted, dtype=np.complex128)) ** 2
    norms = _power(target).sum(axis=1) * _power(predicted).sum(axis=1)
    return np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0.0)


def spectral_efficiency(
    predicted: Complex, target: Complex, snr_db: float = 10.0, antennas: int | None = None
) -> float:
    """Return the mean of log2(1 + Nt snr rho^2) [bit/s/Hz] over users, slots and subcarriers.

    ``antennas`` (Nt) is the size of one array; A must be a multiple of it, and each group of Nt
    consecutive antennas (one polarisation) is then precoded on its own, as in LLM4CP with Nt = 16 of
    A = 32. By default Nt = A. A perfect forecast gives log2(1 + Nt snr): 7.331 for Nt = 16 at 10 dB.
    """
    users, available, slots, subcarriers = target.shape
    array = available if antennas is None else antennas
    if array < 1 or available % array:
        raise ValueError(f"antennas is {array}; it must be positive and divide the array of {available}")
    _same_shape(predicted, target)
    grouped = (users * (available // array), array, slots, subcarriers)
    rho_squared = squared_cosine(predicted.reshape(grouped), target.reshape(grouped))
    return float(np.mean(np.log2(1.0 + array * 10.0 ** (snr_db / 10.0) * rho_squared)))


def to_db(ratio: float) -> float:
    """Return 10 log10 of a power ratio; 0 gives minus infinity."""
    return float(10.0 * np.log10(ratio)) if ratio > 0.0 else float("-inf")


def _sums(predicted: Complex, target: Complex, axes: tuple[int, ...]) -> tuple[Real, Real]:
    """Sum squared error and target power over ``axes``, in float64 whatever the arrays' precision."""
    _same_shape(predicted, target)
    return _power(predicted - target).sum(axis=axes), _power(target).sum(axis=axes)


def _power(value: Complex) -> Real:
    """Return |value|^2 in float64, without the square root of ``abs``."""
    return np.square(value.real, dtype=np.float64) + np.square(value.imag, dtype=np.float64)


def _same_shape(predicted: Complex, target: Complex) -> None:
    """Refuse arrays that NumPy would silently broadcast."""
    if predicted.shape != target.shape or predicted.ndim != 4:
        raise ValueError(
            f"predicted has shape {predicted.shape} and target {target.shape}; "
            "both must be the same (users, antennas, slots, subcarriers)"
        )
