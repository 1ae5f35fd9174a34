"""What the chosen devices ask of the uplink band, and what each gets: the contract of an allocator.

    finish_k = t0_k + s_k / r_k(b_k)      r_k(b) = min(b log2(1 + a_k / b), e b)

s_k bits over a band b_k [Hz] at a = P g / N0 [Hz] and a largest spectral efficiency e [bit/s/Hz], begun t0_k
seconds after the round. The losses of a real link are folded in beforehand: ``bits`` and ``cap`` are over the
link's efficiency, ``gain_hz`` is times its SNR factor. A radio that takes ``power_w`` has this gain at that
power. Everything is float64, for the equations divide by small differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reals = NDArray[np.float64]
_POSITIVE = ("bits", "cap", "power_w", "energy_j", "band_hz", "deadline_s", "block_hz")
_NOT_NEGATIVE = ("gain_hz", "fixed_s", "examples")


def one_by_one(count: int, name: str, values: ArrayLike) -> Reals:
    """Return ``values`` as float64 (K,); one number stands for all. ``ValueError`` on any other shape."""
    array = np.asarray(values, np.float64)
    if array.shape not in ((), (1,), (count,)):
        raise ValueError(
            f"{name} has shape {array.shape}; one number, or one for each of {count} devices, is allowed"
        )
    return np.broadcast_to(array, (count,))


def above_zero(name: str, values: ArrayLike) -> None:
    """Raise ``ValueError`` unless every one of ``values`` is above zero (infinity is)."""
    array = np.asarray(values)
    if not (array > 0).all():
        raise ValueError(f"{name} = {array.ravel()[~(array.ravel() > 0)][0]:g} must be above 0")


def not_negative(name: str, values: ArrayLike) -> None:
    """Raise ``ValueError`` unless every one of ``values`` is at least zero and finite."""
    array = np.asarray(values).ravel()
    allowed = (array >= 0) & np.isfinite(array)
    if not allowed.all():
        raise ValueError(f"{name} = {array[~allowed][0]:g} must be a finite number, and not below 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """K devices and one band. A number in place of an array (K,) stands for all devices."""

    bits: Reals  # (K,) to upload, over the link's efficiency
    gain_hz: Reals  # (K,) a = P g / N0 at power_w, times the link's SNR factor; 0: no link
    band_hz: float  # to share
    fixed_s: Reals = 0.0  # type: ignore[assignment]  # (K,) before the upload begins
    cap: Reals = math.inf  # type: ignore[assignment]  # (K,) largest spectral efficiency [bit/s/Hz]
    power_w: Reals = 1.0  # type: ignore[assignment]  # (K,) largest transmit power
    energy_j: Reals = math.inf  # type: ignore[assignment]  # (K,) that the radio may spend at most
    examples: Reals = 1.0  # type: ignore[assignment]  # (K,) training examples
    deadline_s: float = math.inf  # after the round began
    block_hz: float = 180e3  # band of a resource block

    def __post_init__(self) -> None:
        count = int(np.size(self.gain_hz))
        for field in fields(self):
            if field.type == "Reals":
                array = one_by_one(count, field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, array)
        for name in _POSITIVE:
            above_zero(name, getattr(self, name))
        for name in _NOT_NEGATIVE:
            not_negative(name, getattr(self, name))

    def __len__(self) -> int:
        return len(self.gain_hz)

    def at(self, places: NDArray[np.bool_] | NDArray[np.intp]) -> Demand:
        """Return the demand of these devices alone, over the same band."""
        arrays = {f.name: getattr(self, f.name)[places] for f in fields(self) if f.type == "Reals"}
        return replace(self, **arrays)


@dataclass(frozen=True, slots=True)
class Share:
    """What each device gets, and when it has finished."""

    band_hz: Reals  # (K,)
    time_s: Reals  # (K,) after the round began; inf where a device got nothing
    power_w: Reals  # (K,) transmit power while it uploads; 0 where a device got nothing
