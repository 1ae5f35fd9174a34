"""The contract of an aggregation rule: arithmetic on flat vectors, and nothing else.

A rule sees device ids, float32 vectors of length p and weights; Flower, torch, files and clocks stay
outside (``base.py``). A new rule is one file with these five methods and one line in the registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector

Vectors = NDArray[np.float32]  # (m, p)


class Algorithm(Protocol):
    """What to send, how to fold, when to step."""

    def init(self, vector: Vector, devices: Sequence[int]) -> None:
        """Start every device from ``vector`` (p,)."""

    def rows(self) -> list[int]:
        """Return, for each device, the row of ``models()`` that it starts its round from."""

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        """Take in one device's result; called in the order of the devices."""

    def step(self) -> None:
        """End the round: turn what was folded into the next models."""

    def models(self) -> Vectors:
        """Return the current models (m, p): one global model, or one a device."""

    def load(self, models: Vectors) -> None:
        """Continue from the models of an earlier round (m, p)."""
