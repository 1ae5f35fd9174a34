"""Who holds which labelled samples: disjoint shards that together are the whole set, one for each device.

``iid``        a uniform draw; shards differ in size by one sample at most.
``dirichlet``  every class c is dealt out by shares of its own, q_c ~ Dir(alpha, ..., alpha) over the devices:
               device k receives q_ck of the class. Both the mixture of classes and the size of a shard
               then differ from device to device, the more the smaller alpha.

The Dirichlet rule is that of M. Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural
Networks", ICML 2019, arXiv:1905.12022. T.-M. H. Hsu et al., arXiv:1909.06335, draw shares of the classes for
every device instead, at equal sizes. Departure: a device that is left with fewer than two samples is
given some by the largest, so that everybody can train.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.registry import pick

Labels = NDArray[np.int64]  # (N,)
Shards = list[NDArray[np.intp]]


def partition(kind: str, labels: Labels, devices: int, alpha: float, seed: int) -> Shards:
    """Return ``devices`` sorted arrays of sample indices by the rule ``kind``; ``alpha`` is Dirichlet's.

    Raises ``ValueError``, naming the configuration keys, for an unknown kind or too few samples.
    """
    return pick(PARTITIONS, kind, "text.partition")(labels, devices, alpha, seed)


def iid(labels: Labels, devices: int, seed: int) -> Shards:
    """Return a uniform draw for each device, equal in size to within one sample."""
    _check(labels, devices)
    order = rng(seed, "partition", "iid").permutation(len(labels))
    return [np.sort(shard) for shard in np.array_split(order, devices)]


def dirichlet(labels: Labels, devices: int, alpha: float, seed: int) -> Shards:
    """Return shards with Dirichlet shares of each label; at least two samples each where there are enough."""
    _check(labels, devices)
    if not alpha > 0:
        raise ValueError(f"text.dirichlet = {alpha} must be above 0")
    generator = rng(seed, "partition", "dirichlet")
    shards: list[list[int]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(devices, np.clip(alpha, *ALPHAS)))
        cuts = np.cumsum(shares)[:-1] * len(own)
        for shard, part in zip(shards, np.split(own, np.rint(cuts).astype(int)), strict=True):
            shard.extend(part.tolist())
    least = min(2, len(labels) // devices)
    for shard in shards:
        while len(shard) < least:
            largest = max(shards, key=len)
            shard.append(largest.pop(int(generator.integers(len(largest)))))
    return [np.sort(np.array(shard, np.intp)) for shard in shards]


def _check(labels: Labels, devices: int) -> None:
    if not 1 <= devices <= len(labels):
        raise ValueError(
            f"train.devices = {devices} does not fit {len(labels)} training texts; "
            f"train.devices must be 1 to {len(labels)}, or text.train larger"
        )


ALPHAS = (1e-9, 1e9)  # beyond these one device takes all, or all take the same, and the draw may overflow
PARTITIONS: dict[str, Callable[[Labels, int, float, int], Shards]] = {
    "iid": lambda labels, devices, alpha, seed: iid(labels, devices, seed),
    "dirichlet": dirichlet,
}
