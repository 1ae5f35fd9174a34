"""The coordinate-wise median: no device can drag a coordinate past the honest majority.

D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, arXiv:1803.01498, definition 1.

    g_j = median_k g_kj

Batch sizes are ignored, as in the paper: a median has no natural weights, and whoever lies about a gradient
may lie about its weight. The median of devices with unlike data is not their mean: without attackers, this
rule costs accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.fedsgd_lora import Stacked
from strategies.server_optimiser import Doubles


class Median(Stacked):
    """Every coordinate is the median over the devices that answered."""

    def combine(self, devices: Sequence[int], gradients: Doubles, weights: Doubles) -> Doubles:
        middle: Doubles = np.median(gradients, axis=0)
        return middle
