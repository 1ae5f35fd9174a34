"""Random: K of the M devices that can be reached, every set as likely.

B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv:1602.05629. With mode ``over-selection`` more are asked than are waited for (K. Bonawitz et al.,
"Towards Federated Learning at Scale", arXiv:1902.01046).
"""

from __future__ import annotations

import numpy as np

from strategies.selection.base import Choice, Policy, RoundState
from strategies.selection.picks import evenly


class Uniform(Policy):
    """Remembers nothing."""

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        return Choice(evenly(len(state), state.wanted, draw))
