"""Where everything lies in a flat vector: the LoRA factors A and B of each linear, and what is not LoRA.

A LoRA pair adapts one linear W (out, in) by ``scale`` B A, with A (r, in) and B (out, r). Aggregation rules
work on such vectors alone; the layout gives them the factors as views, so that a rule reads like its paper.

Unlike ranks share one layout, that of the largest: components past a device's rank are zero in A and in B.
Such components stay zero under any gradient step (dB = s dy (A x)^T and dA = s B^T dy x^T vanish), so a
device of rank r_k may carry them, and only r_k components travel: :meth:`Layout.wire`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Pair:
    """One adapted linear: where its factors start in the vector, and their shapes."""

    name: str  # the linear's dotted name
    a: int  # A (rank, inputs) starts here
    b: int  # B (outputs, rank) starts here
    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Layout:
    """The places of a vector of length ``size``; ``scale`` is alpha / r, the same for every pair."""

    size: int
    pairs: tuple[Pair, ...]
    scale: float = 1.0
    _parts: dict[str, NDArray[np.bool_]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, tuple[int, ...]]], scale: float = 1.0) -> Layout:
        """Return the layout of parameters packed in this order, from their names and shapes."""
        start, starts, sizes = 0, {}, {}
        for name, shape in shapes:
            starts[name], sizes[name] = start, shape
            start += int(np.prod(shape, dtype=np.int64))
        pairs = []
        for name, shape in sizes.items():
            other = name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." in name and other in starts:
                rank, inputs = shape
                outputs = sizes[other][0]
                linear = name.partition(".lora_A.")[0]
                pairs.append(Pair(linear, starts[name], starts[other], rank, inputs, outputs))
        return cls(start, tuple(pairs), scale)

    @property
    def rank(self) -> int:
        """The rank of the pairs; 0 where nothing is adapted."""
        return self.pairs[0].rank if self.pairs else 0

    def factors(self, vector: Array) -> list[tuple[Array, Array]]:
        """Return (A (r, in), B (out, r)) of every pair, as views into ``vector`` (p,)."""
        return [
            (
                vector[p.a : p.a + p.rank * p.inputs].reshape(p.rank, p.inputs),
                vector[p.b : p.b + p.outputs * p.rank].reshape(p.outputs, p.rank),
            )
            for p in self.pairs
        ]

    def part(self, which: str) -> NDArray[np.bool_]:
        """Return the mask (p,) of 'a', 'b', 'other' (no LoRA factor), or any of them joined by '+'."""
        if which not in self._parts:
            marks = np.full(self.size, "o")
            for p in self.pairs:
                marks[p.a : p.a + p.rank * p.inputs] = "a"
                marks[p.b : p.b + p.outputs * p.rank] = "b"
            wanted = [word[0] for word in which.split("+") if word]
            self._parts[which] = np.isin(marks, wanted)
        return self._parts[which]

    def within(self, rank: int) -> NDArray[np.bool_]:
        """Return the mask (p,) of what a device of this rank has: its first components, and all the rest."""
        key = f"rank {rank}"
        if key not in self._parts:
            mask = np.ones(self.size, bool)
            for a, b in self.factors(mask):
                a[rank:] = False
                b[:, rank:] = False
            self._parts[key] = mask
        return self._parts[key]


def factors_at(layout: Layout, vector: Array, rank: int) -> list[tuple[Array, Array]]:
    """Return (A (rank, in), B (out, rank)) of factors of any rank, listed pair by pair, A then B; views."""
    factors, start = [], 0
    for pair in layout.pairs:
        middle = start + rank * pair.inputs
        end = middle + pair.outputs * rank
        factors.append(
            (vector[start:middle].reshape(rank, pair.inputs), vector[middle:end].reshape(pair.outputs, rank))
        )
        start = end
    if start != len(vector):
        raise ValueError(f"factors of rank {rank} have {start} values, got {len(vector)}")
    return factors


def expand(compact: Array, basis: Array, layout: Layout) -> NDArray[np.float32]:
    """Return the LoRA vector (p,) of Fed-SB's compact one: A = A_basis, B = B_basis R, the rest as it is.

    ``compact`` is R (r, r) of every pair, then 'other'; ``basis`` lists factors of the layout's rank.
    """
    r, pairs = layout.rank, len(layout.pairs)
    squares = compact[: pairs * r * r].reshape(pairs, r, r)
    full = np.empty(layout.size, np.float32)
    full[layout.part("other")] = compact[pairs * r * r :]
    fixed = factors_at(layout, basis, r)
    for (a, b), (fixed_a, fixed_b), square in zip(layout.factors(full), fixed, squares, strict=True):
        a[:], b[:] = fixed_a, fixed_b.astype(np.float64) @ square
    return full
