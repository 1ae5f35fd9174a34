"""A backbone in which nothing trains, asked once a sample: its answers are kept.

A head alone (``model.tuning = "none"``) visits every text many times, and the large model says the same of
it each time. Answers are kept by the content of a sample's tokens and computed sample by sample, without its
neighbours' padding: so they depend neither on the batch in which a sample came first nor on who computes.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fedlam_app.models.split import Tokens, rows_of

MOST = 200_000  # answers that are kept of a backbone; past that all are forgotten

Answers = dict[bytes, Tensor]
_ANSWERS: dict[bytes, Answers] = {}  # of this process, by backbone: experiments beside each other share them


class Remembering(nn.Module):
    """A frozen backbone: Tokens in training mode from memory, everything else as the backbone does it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.inner = backbone
        self._known = _ANSWERS.setdefault(_name(backbone), {})

    @property
    def width(self) -> int:
        """The backbone's."""
        return int(self.inner.width)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor | Tokens) -> Tensor:
        """Map (B, S, D) to (B, S, D), or Tokens to (R, D)."""
        if not self.training or not isinstance(tokens, Tokens):
            out: Tensor = self.inner(tokens)
            return out
        if len(self._known) > MOST:
            self._known.clear()
        return torch.cat([self._answer(sample) for sample in _apart(tokens)])  # (R, D)

    def _answer(self, sample: Tokens) -> Tensor:
        parts = [sample.values] if sample.rows is None else [sample.values, sample.rows]
        name = hashlib.sha256(b"".join(part.detach().cpu().numpy().tobytes() for part in parts)).digest()
        if name not in self._known:
            with torch.no_grad():
                self._known[name] = self.inner(sample)
        return self._known[name]


def remembering(backbone: nn.Module) -> nn.Module:
    """Return the backbone with a memory, if nothing in it trains."""
    return backbone if any(p.requires_grad for p in backbone.parameters()) else Remembering(backbone)


def _name(backbone: nn.Module) -> bytes:
    """Return a name of all that a backbone's answers depend on beside their tokens."""
    name = hashlib.sha256(repr(backbone).encode())
    for key, value in backbone.state_dict().items():
        name.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return name.digest()


def _apart(tokens: Tokens) -> list[Tokens]:
    """Return each sample as tokens of its own."""
    lengths = tokens.lengths.tolist()
    values = tokens.values.split(lengths)
    if tokens.rows is None:
        return [Tokens(v, torch.tensor([len(v)], device=v.device)) for v in values]
    starts = (tokens.lengths.cumsum(0) - tokens.lengths).tolist()
    rows = tokens.rows.split(rows_of(tokens).tolist())
    return [
        Tokens(v, torch.tensor([len(v)], device=v.device), own - start)
        for v, own, start in zip(values, rows, starts, strict=True)
    ]
