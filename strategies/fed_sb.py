"""Fed-SB: between two fixed factors only a small square trains, so that r^2 numbers a linear travel.

"Fed-SB", TMLR 2026, arXiv:2502.15436.

    W = W0 + s B R A,   B (d, r) and A (r, l) fixed and orthonormal,   R (r, r) <- sum_k p_k R_k

The product is linear in R, hence averaging is exact. B and A are chosen once, from the first gradient:

*Round 1, the probe.* ``plan()`` has ``probe``: a device trains nothing and returns, as a LoRA vector (p,),
    the best rank-r factors of MINUS the full gradient of each adapted linear on its first batch,
    -G_k ≈ B_k A_k with A_k = V^T (r, l) and B_k = U S (d, r). The step takes the top r singular vectors of
    sum_k p_k B_k A_k and broadcasts them as an entry of kind 'basis' and rank r: A = V_r^T, B = U_r.
    Until then ``models()`` is the ordinary first LoRA vector (p,), and 'other' does not change.
*From round 2, the compact vector.* What travels, is trained, folded and returned by ``models()`` is
    [R of every pair, r*r each by rows, in the layout's order] + [the 'other' part], of length
    sum r^2 + others. It starts at R = 0 and the first 'other' part: the model starts as the pretrained one.
    ``expand`` (``base/layout.py``) turns it into the LoRA vector with A = A_basis and B = B_basis R, which
    computes s B R A.

Departures: R = 0 at the start; device modules that are not LoRA are trained and averaged; the probe is
each device's rank-r gradient, not the whole, so the basis is that of the gradients' dominant parts.
Ranks must be equal.
Bytes: r (d + l) a linear once, up and down; then r^2 a linear and what is not LoRA, up and down.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from strategies.algorithm import Plan
from strategies.flora import Stacking, mean, stacked, svd


class FedSb(Stacking):
    """A probe that fixes the basis, then FedAvg of the squares."""

    compact: ClassVar[bool] = True  # after the probe, vectors are [R ..., other]
    kind = "basis"

    def plan(self, number: int) -> Plan:
        return Plan() if self._entries else Plan(returns="a+b", probe=True)

    def step(self) -> None:
        sent = self.taken()
        if self._entries:
            self.vector = mean(sent)
            return
        basis = []
        for a, b in stacked(sent, self.layout):
            u, _, vt = svd(a, b, self.layout.rank)
            basis.append((vt, u))
        self.broadcast(basis)
        squares = np.zeros(len(basis) * self.layout.rank**2, np.float32)
        self.vector = np.concatenate([squares, self.vector[self.layout.part("other")]])
