"""Multi-Krum: the mean of the gradients that lie closest to their neighbours.

P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, "Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent", NeurIPS 2017, arXiv:1703.02757.

    score_k = sum of ||g_k - g_i||^2 over the n - f - 2 gradients i closest to g_k
    g       = mean of the n - f - 2 gradients of lowest score

f is ``robust.byzantine`` and n the number of devices that answered. The paper leaves the number of kept
gradients open; n - f - 2 is below the number of honest ones, and at f = 0 the two most distant still go.
Gradients that tie with the last one kept are kept too, so that the order of the devices decides nothing.
Batch sizes are ignored, as in the paper.

Departure: the paper asks for n > 2 f + 2. When too few devices answer, f becomes the largest that n allows,
(n - 3) // 2, rather than stop the run; one or two gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.fedsgd_lora import Stacked
from strategies.mixing import square_distances
from strategies.server_optimiser import Doubles


class MultiKrum(Stacked):
    """The mean of the gradients that ``krum_keeps``."""

    def combine(self, devices: Sequence[int], gradients: Doubles, weights: Doubles) -> Doubles:
        mean: Doubles = gradients[krum_keeps(gradients, self.config.robust.byzantine)].mean(axis=0)
        return mean


def krum_keeps(gradients: Doubles, byzantine: int) -> list[int]:
    """Return the rows of ``gradients`` (n, p) that Multi-Krum averages, in ascending order."""
    n = len(gradients)
    if n < 3:
        return list(range(n))
    keep = n - min(byzantine, (n - 3) // 2) - 2  # at least 1
    squares = square_distances(gradients)  # (n, n)
    np.fill_diagonal(squares, np.inf)  # nobody is a neighbour of itself
    scores = np.sort(squares, axis=1)[:, :keep].sum(axis=1)  # (n,)
    return np.flatnonzero(scores <= np.sort(scores)[keep - 1]).tolist()
