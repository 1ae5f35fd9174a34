"""The input of every channel predictor: rows, one user and one antenna each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A batch of B rows, scaled to their user's mean power."""

    history: Tensor  # (B, T, K, 2) noisy, real and imaginary parts last
    anchor: Tensor | None = None  # (B, F, K, 2) a classical forecast to refine, or none
