"""Who shares masks with whom: everybody with everybody, or a regular graph of few neighbours.

    everybody  n (n - 1) / 2 pairs          K. Bonawitz et al., CCS 2017
    degree d   n d / 2 pairs, d ~ log n     J. Bell et al., "Secure Single-Server Aggregation with
                                            (Poly)Logarithmic Overhead", CCS 2020 (SecAgg+)

The graph of degree d is a ring of the devices in a random order, in which each is joined to the d / 2 nearest
on either side, and for odd d to the one opposite (a Harary graph, as in SecAgg+). A regular graph of odd
degree needs an even number of devices: with an odd number the degree is d + 1.

Threshold. Of a device with d neighbours, t shares open its self mask (held by the neighbours and itself), or
the key of its pairwise masks (held by the neighbours):

    t = max(ceil(share * d), floor((d + 1) / 2) + 1)

Whoever has both sees the device's update. Each neighbour gives one kind of share alone, so that both together
take 2 t - 1 > d neighbours: a server that told each neighbour what it liked could not have them. Hence the
second term.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

LEAST = 3  # devices; of two, the sum and one's own update give the other's

Graph = dict[int, list[int]]  # a device's neighbours, ascending


def graph(devices: Sequence[int], degree: int, draw: np.random.Generator) -> Graph:
    """Return a regular graph on the devices; degree 0 is everybody with everybody."""
    count = len(devices)
    degree += degree % 2 * (count % 2)
    if degree == 0 or degree >= count - 1:
        return {k: sorted(set(devices) - {k}) for k in devices}
    ring = np.asarray(devices)[draw.permutation(count)]
    steps = [step for near in range(1, degree // 2 + 1) for step in (near, -near)]
    steps += [count // 2] * (degree % 2)
    return {int(k): sorted(int(ring[(at + step) % count]) for step in steps) for at, k in enumerate(ring)}


def threshold(neighbours: int, share: float) -> int:
    """Return how many shares open a secret of a device with so many neighbours."""
    # 0.67 * 100 is 67.00000000000001
    return max(math.ceil(share * neighbours - 1e-9), (neighbours + 1) // 2 + 1)


def connected(devices: Collection[int], joined: Mapping[int, Sequence[int]]) -> bool:
    """Whether the devices hang together; the sum of each part that does not would be seen by itself."""
    rest = set(devices)
    reached = [rest.pop()] if rest else []
    while reached:
        near = rest.intersection(joined[reached.pop()])
        rest -= near
        reached += near
    return not rest
