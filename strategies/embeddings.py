"""The edge server's embeddings: what each device has sent up, by device and sample.

A frozen embedding module gives a sample the same tokens for ever, so they go up once. What is kept is what
came over the wire, sample by sample in the wire's own format (so int8 stays int8 in memory); it is decoded
for a pass, and ``lift`` makes tokens of the backbone's width of it where something else crosses: ids, or
vectors in a public projection. The server is the authority on what it has: a device that comes back after a
fault is asked for what lacks, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlam_app.base.split_payload import Uplink, from_integers
from fedlam_app.base.wire import FORMATS
from fedlam_app.models.split import Tokens, tail_rows


@dataclass(frozen=True)
class Sample:
    """One sample as it came."""

    data: bytes
    length: int
    tail: int


class Embeddings:
    """Samples by (device, place in the device's shard)."""

    def __init__(
        self,
        form: str,
        width: int,
        selection: str,
        longest: int,
        lift: Callable[[NDArray[Any]], NDArray[Any]] | None,
    ) -> None:
        self.form, self.width, self.selection = form, width, selection
        self.longest = longest  # tokens of a sample; the backbone has no positions for more
        self.lift = lift  # rows as they came (N, d) to tokens (N, D); None: they are tokens
        self.samples: dict[tuple[int, int], Sample] = {}

    def lacking(self, device: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids that have not come yet."""
        return np.array([i for i in ids.tolist() if (device, i) not in self.samples], np.int64)

    def take(self, device: int, ids: NDArray[np.int64], up: Uplink) -> None:
        """Keep what a device sent for ``ids``; ``ValueError`` for anything that is not what was asked for."""
        lengths = from_integers(up.lengths)
        if len(lengths) != len(ids):
            raise ValueError(f"it sent {len(lengths)} samples where {len(ids)} were asked for")
        if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= self.longest:
            raise ValueError(
                f"a sample must have 1 to {self.longest} tokens, got {lengths.min()} to {lengths.max()}"
            )
        tails = from_integers(up.tails) if self.selection == "tail" else np.ones_like(lengths)
        if len(tails) != len(lengths) or np.any(tails > lengths):
            raise ValueError("its supervised rows do not fit its samples")
        rows = self._decode(up.embeddings, int(lengths.sum()))
        if not np.isfinite(rows).all():
            raise ValueError("its embeddings are not finite")
        if self.lift is not None:
            self.lift(rows)  # an id that is none is refused here
        parts = np.split(rows, np.cumsum(lengths)[:-1])
        for i, part, length, tail in zip(ids.tolist(), parts, lengths.tolist(), tails.tolist(), strict=True):
            self.samples[device, i] = Sample(self._encode(part), length, tail)

    def tokens(self, wanted: Sequence[tuple[int, int]], like: torch.Tensor) -> Tokens:
        """Return samples (device, id) as one batch, on the device and in the precision of ``like``."""
        chosen = [self.samples[key] for key in wanted]
        values = [self._decode(s.data, s.length) for s in chosen]
        if self.lift is not None:
            values = [self.lift(rows) for rows in values]
        lengths = torch.tensor([s.length for s in chosen])
        ends = lengths.cumsum(0)
        rows = {
            "mean": lambda: None,
            "first": lambda: ends - lengths,
            "last": lambda: ends - 1,
            "tail": lambda: tail_rows(lengths, torch.tensor([s.tail for s in chosen])),
            "all": lambda: torch.arange(int(lengths.sum())),
        }[self.selection]()
        packed = torch.from_numpy(np.concatenate(values)).to(like)  # (N, D)
        return Tokens(packed, lengths.to(like.device), None if rows is None else rows.to(like.device))

    def _decode(self, data: bytes, tokens: int) -> NDArray[Any]:
        if self.form == "token-ids":
            ids = from_integers(data)
            if len(ids) != tokens:
                raise ValueError(f"it sent {len(ids)} token ids where its lengths say {tokens}")
            return ids[:, None].astype(np.float64)
        return FORMATS[self.form].decode(data, tokens, self.width)

    def _encode(self, rows: NDArray[Any]) -> bytes:
        # Rounding to nearest is idempotent: coding what was decoded gives the same bytes.
        if self.form == "token-ids":
            return rows[:, 0].astype("<u2").tobytes()
        return FORMATS[self.form].encode(rows)
