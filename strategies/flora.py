"""FLoRA: adapters are stacked, not averaged; their sum is merged into the frozen weight, exactly.

"FLoRA", NeurIPS 2024, arXiv:2409.05976.

    B = [B_1 .. B_K],   A = [p_1 A_1; ..; p_K A_K],   W0 <- W0 + s B A = W0 + s sum_k p_k B_k A_k

Then every device starts from a fresh adapter: A uniform in ±1/sqrt(inputs) (as peft draws it), B = 0.
Ranks may be unlike, as a device adds as many components as it has.

Departures: the fresh A is drawn once a round by a key, the same for all, and a device of rank r_k takes
its first r_k rows; device modules that are not LoRA are averaged; a stack whose rank exceeds every
linear's is rewritten at full rank (by an SVD, still exact), so no broadcast is larger than its weights.
Bytes: r_k (d + l) a linear up; down (sum_k r_k) (d + l) to every device, also to those that were away:
the broadcasts of all rounds are kept for them, and a saved state grows by one each round.

The rules that work on products (FedEx-LoRA, FlexLoRA, Fed-SB) share :class:`Stacking` and the functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector, WeightedMean
from strategies.algorithm import Algorithm, Entry

Matrix = NDArray[np.float64]
Factors = list[tuple[Matrix, Matrix]]  # (A (R, in), B (out, R)) of every pair


class Sent(NamedTuple):
    """What one device handed in."""

    rank: int
    vector: Vector
    weight: float


class Stacking(Algorithm):
    """A rule that needs all factors of a round at once; it keeps them, and what it ever broadcast."""

    lora = True
    kind: ClassVar[str] = "merge"  # of its broadcasts

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(vector, devices, layout)
        self._entries: list[Entry] = []
        self._sent: list[Sent] = []

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self._sent.append(Sent(self.rank(device), vector.copy(), weight))

    def taken(self) -> list[Sent]:
        """Return what was folded since the last step, and forget it."""
        sent, self._sent = self._sent, []
        return sent

    def broadcast(self, factors: Factors) -> None:
        """Have every device keep these factors."""
        flat = [matrix.ravel() for a, b in factors for matrix in (a, b)]
        rank = len(factors[0][0])
        self._entries.append(Entry(self.kind, rank, np.concatenate(flat).astype(np.float32)))

    def entries(self) -> Sequence[Entry]:
        return self._entries

    def state(self) -> dict[str, NDArray[np.generic]]:
        vectors = [np.zeros(0, np.float32), *(entry.vector for entry in self._entries)]
        return super().state() | {
            "entry_ranks": np.array([entry.rank for entry in self._entries], np.int64),
            "entry_vectors": np.concatenate(vectors),
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        super().load(state)
        ranks = state["entry_ranks"].astype(np.int64)
        ends = np.cumsum(ranks * sum(pair.inputs + pair.outputs for pair in self.layout.pairs))
        vectors = np.split(state["entry_vectors"].astype(np.float32), ends)  # and an empty last one
        self._entries = [Entry(self.kind, *pair) for pair in zip(ranks.tolist(), vectors, strict=False)]


class Flora(Stacking):
    """Stack, merge, start afresh."""

    unlike_ranks = True

    def step(self) -> None:
        sent = self.taken()
        self.broadcast(at_most_full_rank(stacked(sent, self.layout)))
        self.vector = mean(sent)
        draw = rng(self.config.seed, "flora", len(self._entries))  # one broadcast a round
        for a, b in self.layout.factors(self.vector):
            bound = a.shape[1] ** -0.5
            a[:] = draw.uniform(-bound, bound, a.shape)
            b[:] = 0.0


def mean(sent: Iterable[Sent]) -> Vector:
    """Return the weighted mean (p,) of the vectors."""
    total = WeightedMean()
    for one in sent:
        total.add(one.vector, one.weight)
    return total.value()


def shares(sent: Sequence[Sent]) -> list[float]:
    """Return p_k, the devices' parts of the examples."""
    total = sum(one.weight for one in sent)
    return [one.weight / total for one in sent]


def stacked(sent: Sequence[Sent], layout: Layout) -> Factors:
    """Return the factors of sum_k p_k B_k A_k, of rank sum_k r_k, for every pair."""
    devices = [layout.factors(one.vector.astype(np.float64)) for one in sent]
    weighted = list(zip(sent, shares(sent), strict=True))
    factors = []
    for pair in zip(*devices, strict=True):  # one (A_k, B_k) a device
        terms = list(zip(weighted, pair, strict=True))
        a = np.concatenate([p * a[: one.rank] for (one, p), (a, _) in terms])  # (R, in)
        b = np.concatenate([b[:, : one.rank] for (one, _), (_, b) in terms], axis=1)  # (out, R)
        factors.append((a, b))
    return factors


def svd(a: Matrix, b: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return the largest ``rank`` triples of B A: U (out, rank), S (rank,), V^T (rank, in).

    B = Q_b R_b and A^T = Q_a R_a give B A = Q_b (R_b R_a^T) Q_a^T, so only the small core is decomposed.
    A linear that has fewer than ``rank`` singular values gets zeros for the rest.
    """
    q_b, r_b = np.linalg.qr(b)  # (out, m), (m, R)
    q_a, r_a = np.linalg.qr(a.T)  # (in, n), (n, R)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)  # (m, k), (k,), (k, n)
    u, s, vt = (q_b @ u)[:, :rank], s[:rank], (vt @ q_a.T)[:rank]
    missing = rank - len(s)
    return np.pad(u, ((0, 0), (0, missing))), np.pad(s, (0, missing)), np.pad(vt, ((0, missing), (0, 0)))


def at_most_full_rank(factors: Factors) -> Factors:
    """Return equal products whose common rank is at most the largest that any of the linears can have."""
    full = max(min(a.shape[1], len(b)) for a, b in factors)
    if len(factors[0][0]) <= full:
        return factors
    triples = [svd(a, b, full) for a, b in factors]
    return [(np.sqrt(s)[:, None] * vt, u * np.sqrt(s)) for u, s, vt in triples]
