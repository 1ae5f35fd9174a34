"""Nearest-neighbour mixing, before a robust rule: each gradient becomes the mean of those closest to it.

Y. Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023,
arXiv:2302.01772.

    y_k = mean of the n - f gradients nearest to g_k, itself among them

Small batches make gradients differ from device to device far more than they agree, and within that spread f
liars can push a median or a trimmed mean. Honest gradients that lie apart from the liars are mixed with each
other alone: their spread falls, and the rule that follows sees n - f values close to the honest mean.

f is ``robust.byzantine``, or as many as are a minority where too few devices answer. Batch sizes are ignored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from strategies.server_optimiser import Doubles


def mixed(gradients: Doubles, byzantine: int) -> Doubles:
    """Return the mixed gradients (n, p) of ``gradients`` (n, p), f = ``byzantine``, a minority at most."""
    n = len(gradients)
    keep = n - min(byzantine, (n - 1) // 2)
    nearest = np.argsort(square_distances(gradients), axis=1, kind="stable")[:, :keep]  # (n, keep)
    chosen = np.zeros((n, n))
    np.put_along_axis(chosen, nearest, 1.0 / keep, axis=1)
    means: Doubles = chosen @ gradients
    return means


def square_distances(gradients: Doubles) -> NDArray[np.float64]:
    """Return ||g_i - g_j||^2 (n, n), zero on the diagonal."""
    # Differences, not norms and products: one huge vector would cancel the distances of all others away.
    return squareform(pdist(gradients, "sqeuclidean"))
