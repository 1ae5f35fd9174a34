"""The coordinate-wise trimmed mean: the mean of what is left when both ends are cut off.

D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, arXiv:1803.01498, definition 2.

    g_j = mean of {g_kj : k} without its c largest and its c smallest values,   c = floor(trim n)

n is the number of devices that answered. c values at either end withstand c liars; batch sizes are ignored,
as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from strategies.fedsgd_lora import Stacked
from strategies.server_optimiser import Doubles

_SLACK = 1e-9  # 0.29 of 100 devices are 29, although 0.29 * 100 is below that in floating point


class TrimmedMean(Stacked):
    """Every coordinate is the mean over the devices that answered, without ``robust.trim`` at each end."""

    def combine(self, devices: Sequence[int], gradients: Doubles, weights: Doubles) -> Doubles:
        n = len(gradients)
        cut = min(math.floor(self.config.robust.trim * n + _SLACK), (n - 1) // 2)
        kept = np.partition(gradients, (cut, n - 1 - cut), axis=0)[cut : n - cut]  # (n - 2 cut, p)
        mean: Doubles = kept.mean(axis=0)
        return mean
