"""Recurrent baselines of LLM4CP: RNN, LSTM and GRU, one step at a time.

A row is one antenna of one user. Each slot's 2K real features go through linear -> cell -> linear; the
state is filled with the history, then every forecast is fed back as the next input (arXiv 2406.14440,
baselines). The reference's widths are known only from inside its pickled weights: here the hidden size is
96, one layer, stated and not tuned.

Deviation: a row is divided by the root mean square of its own history and multiplied back, where the
reference standardises with the statistics of the whole batch. So a row's forecast does not depend on
its batch mates, and scales with its input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CELLS: dict[str, type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]] = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


def row_scale(x: Tensor) -> Tensor:
    """Return the root mean square amplitude of every row of x (B, T, K, 2), as (B, 1, 1, 1); never zero."""
    power = 2.0 * x.square().mean(dim=(1, 2, 3), keepdim=True)  # re and im each carry half
    return power.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


class Recurrent(nn.Module):
    """Forecast rows (B, T, K, 2) -> (B, F, K, 2) with a recurrent cell, autoregressively."""

    def __init__(
        self,
        cell: str,
        subcarriers: int = 48,
        history: int = 16,
        future: int = 4,
        hidden: int = 96,
    ) -> None:
        super().__init__()
        if cell not in _CELLS:
            raise ValueError(f"cell is '{cell}'; allowed are {', '.join(_CELLS)}")
        self.future = future
        self.enter = nn.Linear(2 * subcarriers, hidden)
        self.cell = _CELLS[cell](hidden, hidden, batch_first=True)
        self.leave = nn.Linear(hidden, 2 * subcarriers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next F slots of x (B, T, K, 2); any T is accepted, since the cell has no length."""
        scale = row_scale(x)
        states, memory = self.cell(self.enter((x / scale).flatten(2)))
        slot = self.leave(states[:, -1:])  # (B, 1, 2K)
        slots = [slot]
        while len(slots) < self.future:
            states, memory = self.cell(self.enter(slot), memory)
            slot = self.leave(states)
            slots.append(slot)
        return torch.cat(slots, dim=1).unflatten(2, (-1, 2)) * scale


def rnn(subcarriers: int = 48, history: int = 16, future: int = 4) -> Recurrent:
    """Return the RNN baseline (tanh cell)."""
    return Recurrent("rnn", subcarriers, history, future)


def lstm(subcarriers: int = 48, history: int = 16, future: int = 4) -> Recurrent:
    """Return the LSTM baseline."""
    return Recurrent("lstm", subcarriers, history, future)


def gru(subcarriers: int = 48, history: int = 16, future: int = 4) -> Recurrent:
    """Return the GRU baseline."""
    return Recurrent("gru", subcarriers, history, future)
