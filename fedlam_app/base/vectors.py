"""Flat adapter vectors: what trains, as one float32 vector of length p.

Algorithms are arithmetic on such vectors; modules appear only in ``pack`` and ``unpack``, which are
each other's inverse. One vector a message is also what makes federation cheap: Flower serialises
every array on its own, and a hundred small tensors cost more than one large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Vector = NDArray[np.float32]  # (p,)


def pack(parameters: Iterable[Tensor]) -> Vector:
    """Copy parameters, in their order, into one vector of shape (p,): float32, or float64 if they are."""
    flat = [p.detach().cpu().numpy().ravel() for p in parameters]
    return np.concatenate(flat) if flat else np.zeros(0, np.float32)


def unpack(vector: Vector, parameters: Iterable[Tensor]) -> None:
    """Copy ``vector`` (p,) into the parameters, in place; a wrong length raises ``ValueError``."""
    import torch

    parameters = list(parameters)
    expected = sum(p.numel() for p in parameters)
    if vector.shape != (expected,):
        raise ValueError(f"an adapter vector must have shape ({expected},), got {vector.shape}")
    start = 0
    with torch.no_grad():
        for p in parameters:
            stop = start + p.numel()
            p.copy_(torch.from_numpy(np.array(vector[start:stop])).view_as(p))
            start = stop


class WeightedMean:
    """Running weighted mean of vectors, in float64: memory is one vector, whatever the cohort.

    The mean of one vector is that vector bit for bit: float64 holds a float32 times a weight and the
    division back to within far less than half a float32 step.
    """

    def __init__(self) -> None:
        self._total: NDArray[np.float64] | None = None
        self.weight = 0.0

    def add(self, vector: Vector, weight: float) -> None:
        """Fold one vector of shape (p,) with a non-negative weight."""
        self.add_sum(weight * vector.astype(np.float64), weight, vector.dtype)

    def add_sum(self, total: NDArray[np.float64], weight: float, dtype: np.dtype[Any]) -> None:
        """Fold sum_k w_k v_k (p,) of vectors of type ``dtype``, whose weights sum to ``weight``."""
        if not weight >= 0.0:
            raise ValueError(f"a weight must be a non-negative number, got {weight}")
        self._dtype = dtype
        self._total = total.copy() if self._total is None else np.add(self._total, total, out=self._total)
        self.weight += weight

    def value(self) -> Vector:
        """Return the mean (p,) as what came; without any weight there is none, and that is an error."""
        if self._total is None or self.weight == 0.0:
            raise ValueError("the mean of no vectors is undefined: every reply was missing or empty")
        return (self._total / self.weight).astype(self._dtype)
