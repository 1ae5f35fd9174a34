"""The input of every channel predictor: rows, one user and one antenna each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A batch of B rows, scaled to their user's mean power."""

    history: Tensor  # (B, T, K, 2) noisy, real and imaginary parts last
    anchor: Tensor | None = None  # (B, F, K, 2) a classical forecast to refine, or none

    def to(self, device: torch.device) -> Rows:
        """Return the same rows on a device."""
        return Rows(self.history.to(device), None if self.anchor is None else self.anchor.to(device))
