"""Power of choice: of d candidates, the K with the largest loss.

Y. J. Cho, J. Wang, G. Joshi, "Client Selection in Federated Learning: Convergence Analysis and
Power-of-Choice Selection Strategies", arXiv:2010.01243.

    A = ceil(c K) devices drawn without replacement, p proportional to examples; c = ``selection.candidates``
    S = the K in A whose loss is largest

``power-of-choice`` (the paper's pow-d) polls A for its loss at the present model, and pays for it;
``power-of-choice-stale`` (rpow-d) takes the losses as last reported, and whom nobody has heard comes first.
With c = 1 both are a plain draw in proportion to examples.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from strategies.selection.base import Choice, Places, Policy, RoundState
from strategies.selection.picks import asked, race, top


class PowerOfChoice(Policy):
    """pow-d; remembers nothing."""

    polls: ClassVar[str] = "loss"

    def candidates(self, state: RoundState, draw: np.random.Generator) -> Places:
        return race(state.examples, asked(state.wanted, self.config.candidates), draw)

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        return Choice(top(state.loss, state.wanted))


class PowerOfChoiceStale(PowerOfChoice):
    """rpow-d: without a poll."""

    polls: ClassVar[str] = ""

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        drawn = self.candidates(state, draw)
        return Choice(drawn[top(state.loss[drawn], state.wanted)])
