"""FedEx-LoRA: FedIT, and what its averaging gets wrong is added to the frozen weight.

"FedEx-LoRA", ACL 2025, arXiv:2410.09432.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   W0 <- W0 + s (sum_k p_k B_k A_k - B A)

The residual is a covariance, sum_k p_k (B_k - B)(A_k - A). As sum_k p_k (B_k - B) = 0, the last device's
term can be written by the others', and A cancels:

    residual = sum_{k<K} p_k (B_k - B)(A_k - A_K)

which is exact, has rank (K - 1) r, needs no subtraction of two large products, and is nothing for one
device. Beyond the full rank of the linears an SVD rewrites it at that rank, still exact.

Departures: that form of the residual; device modules that are not LoRA are averaged. Ranks must be equal.
Bytes: r (d + l) a linear up; down that and (K - 1) r (d + l), to every device, also to those that were
away (see FLoRA).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlam_app.base.layout import Layout
from strategies.flora import Factors, Sent, Stacking, at_most_full_rank, mean, shares


class FedExLora(Stacking):
    """FedAvg of the factors, and a merge of the residual."""

    def step(self) -> None:
        sent = self.taken()
        self.vector = mean(sent)
        if len(sent) > 1:
            self.broadcast(at_most_full_rank(residual(sent, self.layout)))


def residual(sent: Sequence[Sent], layout: Layout) -> Factors:
    """Return the factors, of rank (K - 1) r, of sum_k p_k B_k A_k - B A for every pair."""
    devices = [layout.factors(one.vector.astype(np.float64)) for one in sent]
    parts = shares(sent)
    factors = []
    for pair in zip(*devices, strict=True):  # one (A_k, B_k) a device
        centre = sum(p * b for p, (_, b) in zip(parts, pair, strict=True))  # (out, r)
        last = pair[-1][0]
        a = np.concatenate([a - last for a, _ in pair[:-1]])  # ((K - 1) r, in)
        b = np.concatenate([p * (b - centre) for p, (_, b) in zip(parts, pair[:-1], strict=False)], axis=1)
        factors.append((a, b))
    return factors
