"""Age of update: who has been away for long, and has a channel to say so.

H. H. Yang et al., "Age-Based Scheduling Policy for Federated Learning in Mobile Edge Networks",
arXiv:1910.14648.

    age = rounds since a device took part        r = bits / upload time [bit/s], at an equal share of the band
    score = f(age) r,    f(x) = ((1 + x)^(1 - alpha) - 1) / (1 - alpha),   f(x) = ln(1 + x) at alpha = 1

alpha = ``selection.fairness``: at 0 the age counts in full, at large alpha hardly, and the rate decides.

Departure: the product with the rate stands in for the paper's matching of devices to subchannels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.selection.base import Choice, Policy, RoundState
from strategies.selection.picks import top


class Age(Policy):
    """Remembers nothing: the ages are the run's."""

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        ages = state.age
        table = worth(np.arange(int(ages.max(initial=0)) + 1), self.config.fairness)
        return Choice(top(table.astype(np.float32)[ages] * (state.bits / state.upload_s), state.wanted))


def worth(ages: NDArray[np.integer], alpha: float) -> NDArray[np.float64]:
    """Return f(age) >= 0 of these ages [rounds], in their shape; f(0) = 0."""
    later = np.log1p(ages.astype(np.float64))
    power = 1.0 - alpha
    return later if power == 0.0 else np.expm1(power * later) / power
