"""The learning rate over a run: two rounds of warm-up, then a cosine down to 5 %.

    rate(x) = lr min(1, x / 2) (0.05 + 0.95 (1 + cos(pi (x - 1) / (rounds - 1))) / 2)

x is the position in rounds at the end of a step. A device, whose optimiser starts fresh every round, has
x = 1, 2, ..., rounds. A server that takes L steps a round has x = s / L for its step s = 1, ..., rounds L:
the last step of round r has the rate that a device has in round r, and with L = 1 the two are one. Before
the end of the first round (x < 1) the cosine stands at its top and only the warm-up moves.
"""

from __future__ import annotations

import math

WARM_UP_ROUNDS = 2


def learning_rate(lr: float, rounds: int, number: float) -> float:
    """Return the rate at position ``number`` (above 0, at most ``rounds``) of a run with peak ``lr``."""
    warm_up = min(1.0, number / WARM_UP_ROUNDS)
    progress = max(0.0, number - 1) / max(1, rounds - 1)
    return lr * warm_up * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress)))
