"""Partial sums: what a SuperNode adds up for a rule that needs only the weighted sum of the vectors.

A round of 1,000 devices with 400,000 values each would bring 1.6 GB to the server; a linear rule needs

    sum_k w_k v_k  and  sum_k w_k,      w_k = examples of device k * its factor

The devices of a round, in their order, are cut into at most ``CHUNKS`` contiguous chunks whose borders depend
on their number alone. A SuperNode has whole chunks, and adds each up in float64, device by device. Chunks are
added in a fixed binary tree: node (l, i) is the sum of chunks i 2^l to (i + 1) 2^l - 1,

    node (l + 1, i) = node (l, 2 i) + node (l, 2 i + 1),

and a SuperNode sends the largest nodes that it can (:func:`tops`), one where it has half of the chunks; the
server adds the rest of the tree. So no bit of the result depends on how many SuperNodes there are.
Up to ``APART`` devices hand in their float32 vectors, as for any other rule: that is no more to send.

Own design; the idea of summing before sending is that of K. Bonawitz et al., "Towards Federated Learning at
Scale: System Design", MLSys 2019, arXiv:1902.01046, section 4. Departure: the tree, for the sake of equal
bits. Memory: 8 q bytes a sum, q the values that a device hands in, and a sum for each level of the tree.

What a device's own radio link carries is its vector (``sizes``), not the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.records import TrainOrder, TrainReport, join
from fedlam_app.base.vectors import Vector

APART = 16  # devices of a round whose vectors travel as they are
CHUNKS = 64  # and so the SuperNodes that can share a round of sums
BLOCK = 8192  # float64 values that stay in a core's cache: passes over a whole vector wait for memory

Node = tuple[int, int]  # (level, index) in the tree of sums
Sum = NDArray[np.float64]  # (q,)


@dataclass(frozen=True)
class Answer:
    """What one device hands in."""

    device: int
    vector: Vector  # (q,); empty where the device was only polled
    weight: float  # training examples times the device's factor
    loss: float  # mean over its local steps; of a poll, of its first batch
    norm: float  # of its update, see :func:`distance`


def chunked(devices: int) -> list[int]:
    """Return the chunk of each of a round's devices, ascending from 0; nothing where vectors travel apart."""
    if devices <= APART:
        return []
    parts = np.array_split(np.arange(devices), min(devices, CHUNKS))
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts]).tolist()


class Tree:
    """Adds nodes that come from left to right, as far as they are siblings."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Node, Sum | None]] = []  # what could not be added yet, from left to right

    def add(self, node: Node, total: Sum | None) -> None:
        """Add the next node to the right; ``None`` is nothing. The sum is the tree's, to be written to."""
        self.nodes.append((node, total))
        while len(self.nodes) > 1:
            (left, one), (right, other) = self.nodes[-2:]
            if left[0] != right[0] or left[1] % 2 or right[1] != left[1] + 1:
                return
            if one is not None and other is not None:
                one += other
            self.nodes[-2:] = [((left[0] + 1, left[1] // 2), other if one is None else one)]


def tops(chunks: Iterable[int]) -> dict[int, Node]:
    """Return, for each of a SuperNode's chunks, the largest node whose chunks are all there."""
    chunks, tree = sorted(set(chunks)), Tree()
    for chunk in chunks:
        tree.add((0, chunk), None)
    nodes = {level: {index for (at, index), _ in tree.nodes if at == level} for level in range(16)}
    return {c: next((at, c >> at) for at in nodes if c >> at in nodes[at]) for c in chunks}


def distance(vector: NDArray[np.floating], start: NDArray[np.floating]) -> float:
    """Return ||v - v_start||, in float64; NaN for a vector that is not finite, or has another shape."""
    if vector.shape != start.shape:
        return float("nan")
    squared, moved, origin = 0.0, np.empty(BLOCK), np.empty(BLOCK)
    with np.errstate(invalid="ignore"):
        for here in _blocks(len(vector)):
            part, began = moved[: here.stop - here.start], origin[: here.stop - here.start]
            part[:], began[:] = vector[here], start[here]
            part -= began
            squared += float(part @ part)
    return squared**0.5 if np.isfinite(squared) else float("nan")


def add_weighted(total: NDArray[np.float64], vector: Vector, weight: float) -> None:
    """Add ``weight`` times a vector (q,) to a sum (q,) in place, in float64."""
    term = np.empty(BLOCK)
    for here in _blocks(len(vector)):
        part = term[: here.stop - here.start]
        part[:] = vector[here]
        part *= weight
        total[here] += part


def _blocks(values: int) -> Iterator[slice]:
    for begin in range(0, values, BLOCK):
        yield slice(begin, min(begin + BLOCK, values))


def flaw(values: int, width: int, weight: float, loss: float, norm: float) -> str:
    """Return what keeps a device's vector out of the mean, as a clause; empty where nothing does.

    ``values`` is what it handed in, ``width`` what it was asked for. The SuperNode and the server ask the
    same question of the same numbers, so both know whose vectors a sum holds.
    """
    if values != width:
        return f"sent {values} values instead of {width}"
    if not np.isfinite(norm):
        return "sent a vector that is not finite"
    if not (np.isfinite(weight) and np.isfinite(loss) and weight > 0.0):
        return f"sent a weight of {weight} and a loss of {loss}"
    return ""


def gathered(order: TrainOrder, answers: Iterable[Answer]) -> TrainReport:
    """Return the report of these answers, which come in the order of ``order.devices``.

    With chunks a vector is forgotten once it is in its sum. A node of which no device answered has no sum.
    Time and memory are left at zero.
    """
    chunk_of = dict(zip(order.devices, order.chunks, strict=False))
    sums = _Sums(order)
    vectors: list[Vector] = []
    devices, sizes = list[int](), list[int]()
    weights, losses, norms = list[float](), list[float](), list[float]()
    for one in answers:
        devices.append(one.device)
        sizes.append(len(one.vector))
        weights.append(one.weight)
        losses.append(one.loss)
        norms.append(one.norm)
        if not order.chunks:
            vectors.append(one.vector)
            continue
        total = sums.of(chunk_of[one.device])
        if not flaw(len(one.vector), order.width, one.weight, one.loss, one.norm):
            add_weighted(total, one.vector, one.weight)
    found = sums.end()
    return TrainReport(
        devices=devices,
        weights=weights,
        losses=losses,
        norms=norms,
        refused=[],
        ledgers=[],
        cpu_s=0.0,
        peak_rss_bytes=0,
        vectors=join(vectors, np.float32)[0],
        sizes=sizes,
        sums=np.stack(found) if found else np.zeros((0, order.width)),
    )


class _Sums:
    """The chunks of a SuperNode, from left to right."""

    def __init__(self, order: TrainOrder) -> None:
        self._left = sorted(set(order.chunks), reverse=True)  # of the open chunk and those after it
        self._width, self._tree = order.width, Tree()
        self._open: Sum | None = None

    def of(self, chunk: int) -> Sum:
        """Return the running sum of a chunk; those before it are closed."""
        while self._left[-1] != chunk:
            self._close()
        if self._open is None:
            self._open = np.zeros(self._width)
        return self._open

    def end(self) -> list[Sum]:
        """Return the sums of the largest nodes, from left to right, but those that nobody answered for."""
        while self._left:
            self._close()
        return [total for _, total in self._tree.nodes if total is not None]

    def _close(self) -> None:
        self._tree.add((0, self._left.pop()), self._open)
        self._open = None
