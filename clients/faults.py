"""Faults made on purpose, on the device: some vanish, some lie. What the server makes of it is the test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.config import RunConfig


def vanishes(config: RunConfig, device: int, step: int) -> bool:
    """Whether a device is gone before it has sent what a step asks for."""
    share = config.faults.vanish
    return share > 0.0 and rng(config.seed, "vanish", device, step).random() < share


def tampered(config: RunConfig, device: int, sent: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return what the device sends instead of ``sent``: itself, unless it attacks."""
    faults = config.faults
    if faults.attack == "none" or device >= faults.attackers:
        return sent
    if faults.attack == "sign-flip":
        return (-faults.attack_scale * sent).astype(sent.dtype)
    if faults.attack == "nan":
        return np.full_like(sent, np.nan)
    return sent[:-1]  # 'shape': the last row, or value, is missing
