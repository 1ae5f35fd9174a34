"""Update-aware (BC-BN2): of the best channels, those with the largest last updates.

M. M. Amiri et al., "Convergence of Update Aware Device Scheduling for Federated Learning at the Wireless
Edge", arXiv:2001.10402.

    A = the ceil(c K) largest gain-to-noise a = P g / N0,   c = ``selection.candidates``
    S = the K largest update norms in A

Departures: the norm is that of the last update that arrived, not of one computed for this round only to be
compared; a device that never took part counts as infinitely large. Equal values go by lower id.
"""

from __future__ import annotations

import numpy as np

from strategies.selection.base import Choice, Policy, RoundState
from strategies.selection.picks import asked, top


class UpdateAware(Policy):
    """Remembers nothing: the norms are the run's."""

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        best = top(state.gain_hz, asked(state.wanted, self.config.candidates))
        return Choice(best[top(state.norm[best], state.wanted)])
