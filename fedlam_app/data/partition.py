"""Who holds which users: disjoint shards of a data set, one for each server.

A shard is ``share`` of all users. All the shards that fit are made, ``floor(1 / share)`` at most, and the
first ``servers`` of them are dealt out, so shards are nested: the data of 5 servers is part of the data of
10, and server 0 holds the same users in both. Curves over the number of servers then differ in the
data added and in nothing else.

``iid``       every shard is a uniform draw of the users.
``speed``     a shard is one band of speeds: users sorted by speed and cut into as many bands as there
              are shards, dealt in random order. k servers hold k of these bands, not all speeds.
``scenario``  a shard holds users of one scenario; scenarios take turns in random order, so any number of
              servers from the number of scenarios upwards holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedlam_app.base.keys import rng
from fedlam_app.base.registry import pick
from fedlam_app.data.channel_set import ChannelSet

Shards = list[npt.NDArray[np.intp]]


def partition(kind: str, channel_set: ChannelSet, servers: int, share: float, seed: int) -> Shards:
    """Return ``servers`` disjoint, sorted arrays of user indices by the rule ``kind`` (see the module).

    Raises ``ValueError``, naming the configuration keys, for an unknown kind, a share of less than one
    user, or more servers than shards.
    """
    return pick(PARTITIONS, kind, "data.partition")(channel_set, servers, share, seed)


def iid(users: int, servers: int, share: float, seed: int) -> Shards:
    """Return ``servers`` uniform draws of ``round(share * users)`` users each, without replacement."""
    size, count = _shape(users, share)
    order = rng(seed, "partition", "iid").permutation(users)
    return _deal(list(order[: count * size].reshape(count, size)), servers, share)


def by_speed(speed_kmh: npt.NDArray[np.floating], servers: int, share: float, seed: int) -> Shards:
    """Return ``servers`` shards that each hold one band of speeds; ``speed_kmh`` (U,)."""
    size, count = _shape(len(speed_kmh), share)
    generator = rng(seed, "partition", "speed")
    # Users that no shard has room for are left out at random, so the bands still span all speeds.
    chosen = generator.permutation(len(speed_kmh))[: count * size]
    bands = chosen[np.argsort(speed_kmh[chosen], kind="stable")].reshape(count, size)
    return _deal(list(bands[generator.permutation(count)]), servers, share)


def by_scenario(scenario: npt.NDArray[np.str_], servers: int, share: float, seed: int) -> Shards:
    """Return ``servers`` shards that each hold one scenario; ``scenario`` (U,) names at least two."""
    names = np.unique(scenario)
    if len(names) < 2:
        raise ValueError(
            "data.partition = 'scenario' needs users of at least two scenarios in data.scenario, "
            f"got {', '.join(names) or 'none'}"
        )
    size, count = _shape(len(scenario), share)
    generator = rng(seed, "partition", "scenario")
    piles = []
    for name in generator.permutation(names):
        own = generator.permutation(np.flatnonzero(scenario == name))
        piles.append(list(own[: len(own) // size * size].reshape(-1, size)))
    turns = range(max(map(len, piles)))
    shards = [pile[turn] for turn in turns for pile in piles if turn < len(pile)]
    return _deal(shards[:count], servers, share)


PARTITIONS: dict[str, Callable[[ChannelSet, int, float, int], Shards]] = {
    "iid": lambda data, servers, share, seed: iid(len(data), servers, share, seed),
    "speed": lambda data, servers, share, seed: by_speed(data.speed_kmh, servers, share, seed),
    "scenario": lambda data, servers, share, seed: by_scenario(data.scenario, servers, share, seed),
}


def _shape(users: int, share: float) -> tuple[int, int]:
    """Return the users in a shard and the number of shards."""
    if not 0 < share <= 1:
        raise ValueError(f"data.share must be above 0 and at most 1, got {share}")
    size = int(share * users + 0.5)
    if size < 1:
        raise ValueError(
            f"data.share = {share} of {users} users is less than one user; "
            f"data.share must be at least {1 / max(users, 1):.3g}, or data.users larger"
        )
    # The small term keeps 1 / 0.05 at 20 whatever the rounding of the quotient.
    return size, min(int(1 / share + 1e-9), users // size)


def _deal(shards: Shards, servers: int, share: float) -> Shards:
    """Return the first shards, sorted so that memory-mapped channels are read in order."""
    if not 1 <= servers <= len(shards):
        raise ValueError(
            f"train.devices = {servers} does not fit data.share = {share}, which makes {len(shards)} "
            f"disjoint shards; train.devices must be 1 to {len(shards)}, or data.share smaller"
        )
    return [np.sort(shard) for shard in shards[:servers]]
