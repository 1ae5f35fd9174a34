"""Channels as a site sees them: noisy, in its own scale, with a forecast of the whole user to start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlam_app.base.registry import pick
from fedlam_app.data.channel_set import ChannelSet
from fedlam_app.data.noise import add_noise
from fedlam_app.models import classical
from fedlam_app.models.rows import Rows

Complex = NDArray[np.complex64]
Index = NDArray[np.intp]
Snr = tuple[NDArray[np.float64], NDArray[np.float64]]  # of history and of label, (U,) each [dB]

# The forecast that an anchored model refines, from the noisy history (U, A, T, K) of a whole user.
ANCHORS: dict[str, Callable[[Complex, int], Complex | None]] = {
    "none": lambda history, slots: None,
    "ar": lambda history, slots: classical.fb_ar(history, slots).astype(np.complex64),
}


@dataclass(frozen=True)
class Observed:
    """Users as their site sees them: noisy, in the site's own scale, with a forecast to start from."""

    history: Complex  # (U, A, T, K) noisy, unit mean power
    label: Complex  # (U, A, F, K) noisy, the same scale
    clean: Complex  # (U, A, F, K) the same scale
    anchor: Complex | None  # (U, A, F, K) forward-backward AR(10) forecast

    def rows(self, users: Index, antennas: Index) -> tuple[Rows, Tensor]:
        """Cut rows, one a (user, antenna) pair (n,): inputs, and noisy labels (n, F, K, 2)."""
        anchor = None if self.anchor is None else _real(self.anchor[users, antennas])
        return Rows(_real(self.history[users, antennas]), anchor), _real(self.label[users, antennas])


def observe(
    channels: ChannelSet,
    snr_db: Snr,
    draw: np.random.Generator,
    anchor: str,
) -> Observed:
    """Add noise at (history, label) SNRs [dB] a user, and scale each user by what its site can measure."""
    history = add_noise(channels.history, snr_db[0], draw)
    label = add_noise(channels.future, snr_db[1], draw)
    power = np.square(np.abs(history), dtype=np.float32).mean((1, 2, 3), keepdims=True)
    scale = 1.0 / np.sqrt(power)  # (U, 1, 1, 1)
    history = history * scale
    forecast = pick(ANCHORS, anchor, "anchor")(history, channels.future.shape[2])
    return Observed(history, label * scale, channels.future * scale, forecast)


def _real(channels: Complex) -> Tensor:
    """Return complex rows (n, t, K) as real ones (n, t, K, 2)."""
    return torch.view_as_real(torch.from_numpy(channels))
