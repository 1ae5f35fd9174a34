"""Clean channels of U users, in the one layout and the one scale that everything else assumes.

Every user is scaled so that its history has unit mean power; the scale is kept as ``gain_db``.
LLM4CP (arXiv 2406.14440) normalises the whole batch instead, where users span tens of dB: there weak
users drown in noise, strong ones dominate the loss, and a prediction depends on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ChannelSet:
    """Clean channels of U users at A antennas: T slots of history and F slots of future on K subcarriers.

    Antennas are ordered ``a = polarisation * (columns * rows) + column * rows + row``, V first.
    The arrays may be read-only (memory-mapped from a cache). Building a set checks dtypes and shapes;
    values are checked once, where they come in (:meth:`from_raw`).

    Raises ``ValueError`` where a dtype or a shape is wrong.
    """

    history: npt.NDArray[np.complex64]
    """(U, A, T, K), mean |H|^2 = 1 for each user."""
    future: npt.NDArray[np.complex64]
    """(U, A, F, K), the same scale; under FDD these are the subcarriers of the downlink band."""
    gain_db: npt.NDArray[np.float32]
    """(U,) [dB], the scale removed: 10 log10 of the mean |H|^2 of the raw history."""
    speed_kmh: npt.NDArray[np.float32]
    """(U,) [km/h]."""
    scenario: npt.NDArray[np.str_]
    """(U,), such as ``uma-nlos``."""

    def __post_init__(self) -> None:
        for name in ("history", "future"):
            array = getattr(self, name)
            if array.ndim != 4 or array.dtype != np.complex64 or 0 in array.shape[1:]:
                raise ValueError(
                    f"{name} must be complex64 of shape (users, antennas, slots, subcarriers), "
                    f"got {array.dtype} of shape {array.shape}"
                )
        users, antennas, _, subcarriers = self.history.shape
        if (self.future.shape[0], self.future.shape[1], self.future.shape[3]) != (
            users,
            antennas,
            subcarriers,
        ):
            raise ValueError(
                "history and future must agree in users, antennas and subcarriers, "
                f"got shapes {self.history.shape} and {self.future.shape}"
            )
        for name, kind in (("gain_db", "f"), ("speed_kmh", "f"), ("scenario", "U")):
            array = getattr(self, name)
            if array.shape != (users,) or array.dtype.kind != kind:
                raise ValueError(
                    f"{name} must hold one {'word' if kind == 'U' else 'float'} for each of {users} users, "
                    f"got {array.dtype} of shape {array.shape}"
                )

    @classmethod
    def from_raw(
        cls,
        history: npt.NDArray[np.complexfloating],
        future: npt.NDArray[np.complexfloating],
        speed_kmh: npt.ArrayLike,
        scenario: str | npt.NDArray[np.str_],
    ) -> ChannelSet:
        """Scale each user of raw channels to unit mean history power and record what was removed.

        ``history`` (U, A, T, K) and ``future`` (U, A, F, K) are complex of any precision, ``speed_kmh``
        a number or (U,), ``scenario`` a word or (U,). Raises ``ValueError`` where a value is not finite
        or a user's history is zero.
        """
        for name, array in (("history", history), ("future", future), ("speed_kmh", np.asarray(speed_kmh))):
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{name} holds NaN or infinite values; every channel and speed must be finite"
                )
        users = len(history)
        if history.ndim != 4 or future.ndim != 4 or len(future) != users:
            raise ValueError(
                "history and future must have the shape (users, antennas, slots, subcarriers), "
                f"got {history.shape} and {future.shape}"
            )
        power = np.array([np.mean(np.square(np.abs(user), dtype=np.float64)) for user in history])
        if not (power > 0).all():
            raise ValueError(
                f"the history of user {int(np.argmin(power))} is zero; it cannot be scaled to unit power"
            )
        scale = (1 / np.sqrt(power))[:, None, None, None]
        return cls(
            history=(history * scale).astype(np.complex64),
            future=(future * scale).astype(np.complex64),
            gain_db=(10 * np.log10(power)).astype(np.float32),
            speed_kmh=np.broadcast_to(np.asarray(speed_kmh, np.float32), (users,)).copy(),
            scenario=np.broadcast_to(np.asarray(scenario, np.str_), (users,)).copy(),
        )

    def __len__(self) -> int:
        return len(self.history)

    def take(self, users: npt.ArrayLike) -> ChannelSet:
        """Return the set of the users at these indices, in this order, copied into memory."""
        chosen = np.asarray(users, dtype=np.intp)
        return ChannelSet(**{f.name: np.asarray(getattr(self, f.name))[chosen] for f in fields(self)})


def concatenate(sets: Sequence[ChannelSet]) -> ChannelSet:
    """Return the users of all ``sets``, in order; the sets must agree in antennas, slots and subcarriers."""
    if len({(s.history.shape[1:], s.future.shape[1:]) for s in sets}) != 1:
        shapes = ", ".join(f"{s.history.shape} + {s.future.shape}" for s in sets)
        raise ValueError(
            f"channel sets to join must agree in antennas, slots and subcarriers, got {shapes or 'none'}"
        )
    return ChannelSet(
        **{f.name: np.concatenate([getattr(s, f.name) for s in sets]) for f in fields(ChannelSet)}
    )
