"""Norm clipping against liars: no gradient counts for more than a middling one.

Z. Sun, P. Kairouz, A. T. Suresh, H. B. McMahan, "Can You Really Backdoor Federated Learning?", 2019,
arXiv:1911.07963 (norm thresholding).

    g = sum_k n_k g_k min(1, c / ||g_k||) / sum_k n_k,   c = ``robust.clip-norm`` * median_k ||g_k||

Departure: the threshold follows the step's median norm, which a minority cannot move past the honest
norms, instead of being one number for a run whose gradients shrink.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.fedsgd_lora import Stacked
from strategies.server_optimiser import Doubles


class NormClip(Stacked):
    """The weighted mean of gradients no longer than a multiple of the median norm."""

    def combine(self, devices: Sequence[int], gradients: Doubles, weights: Doubles) -> Doubles:
        norms = np.linalg.norm(gradients, axis=1)  # (n,)
        largest = self.config.robust.clip_norm * np.median(norms)
        shares = np.where(norms > largest, largest / np.where(norms > 0.0, norms, 1.0), 1.0)
        mean: Doubles = (weights * shares) @ gradients / weights.sum()
        return mean
