"""Fed-SB on the device: between two fixed factors only an r x r square trains, W = W0 + s B R A.

The model computes with B' = B R in the place of LoRA's B, so its gradient by R is B^T dL/dB' (the chain rule,
B' being linear in R): no change to the model, r^2 numbers to train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector, pack, unpack

Factors = Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]]


class Compact:
    """The squares of every pair, and what is not LoRA, as the parameters of an optimiser."""

    def __init__(self, named: Mapping[str, nn.Parameter], layout: Layout, basis: Factors) -> None:
        self._fixed, self._b, self._r = [], [], []
        for pair, (a, b) in zip(layout.pairs, basis, strict=True):
            weight_a = named[f"{pair.name}.lora_A.default.weight"]
            with torch.no_grad():
                weight_a.copy_(torch.from_numpy(np.array(a)))
            self._b.append(named[f"{pair.name}.lora_B.default.weight"])
            self._fixed.append(torch.from_numpy(np.array(b)).to(weight_a))  # (out, r)
            self._r.append(nn.Parameter(weight_a.new_zeros(pair.rank, pair.rank)))
        rest = [p for name, p in named.items() if ".lora_" not in name]
        self.parameters = [*self._r, *rest]

    def load(self, vector: Vector) -> None:
        """Start from a compact vector: the squares, then the rest."""
        unpack(vector, self.parameters)
        self.push()

    def vector(self) -> Vector:
        """Return the compact vector."""
        return pack(self.parameters)

    def pull(self) -> None:
        """Take the gradient of every square from that of its B'."""
        for fixed, b, r in zip(self._fixed, self._b, self._r, strict=True):
            if b.grad is not None:
                r.grad, b.grad = fixed.T @ b.grad, None

    def push(self) -> None:
        """Give the model B' = B R."""
        with torch.no_grad():
            for fixed, b, r in zip(self._fixed, self._b, self._r, strict=True):
                b.copy_(fixed @ r)
