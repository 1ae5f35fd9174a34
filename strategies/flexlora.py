"""FlexLoRA: average the products, and give each rank the best adapter of that rank.

"FlexLoRA", NeurIPS 2024, arXiv:2402.11505.

    W = sum_k p_k B_k A_k = U S V^T,      B = U_r sqrt(S_r),   A = sqrt(S_r) V_r^T   for every rank r

The best of a smaller rank is the first components of the best of a larger one, so there is one vector, and
what a device is sent is its first components. W itself is never formed: an SVD by QR of the stacked factors
gives the same. Exact where r >= sum_k r_k; else the error is the singular values that are cut off, which is
the least possible (Eckart and Young).

Departures: device modules that are not LoRA are averaged. Where W has fewer than r components (a small
cohort of small ranks), the rest keep the A that they had, with B = 0: zeros in both would never train again.
Bytes: r_k (d + l) a linear, up and down.
"""

from __future__ import annotations

import numpy as np

from strategies.flora import Stacking, mean, stacked, svd

NEGLIGIBLE = 1e-12  # singular values below this part of the largest are rounding: the factors are float32


class FlexLora(Stacking):
    """One vector, whose first r components are the best adapter of rank r."""

    unlike_ranks = True

    def step(self) -> None:
        sent = self.taken()
        former, self.vector = self.vector, mean(sent)
        places = zip(self.layout.factors(self.vector), self.layout.factors(former), strict=True)
        for ((a, b), (former_a, _)), product in zip(places, stacked(sent, self.layout), strict=True):
            u, s, vt = svd(*product, self.layout.rank)
            root = np.sqrt(np.where(s > NEGLIGIBLE * s[0], s, 0.0))
            a[:] = np.where(root[:, None] > 0.0, root[:, None] * vt, former_a)
            b[:] = u * root
        self.vector *= self.layout.within(int(self.ranks().max()))
