"""Best channel: the K devices with the largest gain-to-noise a = P g / N0 [Hz].

The most bits for a band, and the least fair choice: who lives near the base station is always taken. Equal
gains go by lower id.
"""

from __future__ import annotations

import numpy as np

from strategies.selection.base import Choice, Policy, RoundState
from strategies.selection.picks import top


class BestChannel(Policy):
    """Remembers nothing, draws nothing."""

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        return Choice(top(state.gain_hz, state.wanted))
