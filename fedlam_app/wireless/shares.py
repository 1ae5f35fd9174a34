"""Ways to share the uplink band, by name. Adding one: a file beside this one, and a line here.

An allocator takes a :class:`Demand` of K >= 1 devices, all of which have a link (a > 0), and returns their
:class:`Share`. Bands add up to at most ``band_hz``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedlam_app.base.registry import pick
from fedlam_app.wireless.allocate import share_equally, share_min_max
from fedlam_app.wireless.allocate_energy import share_min_energy
from fedlam_app.wireless.assign import share_hungarian
from fedlam_app.wireless.demand import Demand, Share
from fedlam_app.wireless.resource_blocks import share_blocks

Allocator = Callable[[Demand], Share]
ALLOCATORS: dict[str, Allocator] = {
    "equal": share_equally,
    "min-max": share_min_max,
    "min-energy": share_min_energy,
    "resource-blocks": share_blocks,
    "hungarian": share_hungarian,
}


def allocate(name: str, demand: Demand) -> Share:
    """Return the share of each device (K,) by the allocator of this name (``wireless.allocation``).

    A device without a link (``gain_hz`` = 0) gets nothing, and never finishes; nobody waits for it. No
    devices get an empty share. ``ValueError`` on another name.
    """
    allocator = pick(ALLOCATORS, name, "allocator")
    linked = demand.gain_hz > 0
    if linked.all() and len(demand):
        return allocator(demand)
    share = Share(np.zeros(len(demand)), np.full(len(demand), math.inf), np.zeros(len(demand)))
    if linked.any():
        part = allocator(demand.at(linked))
        share.band_hz[linked], share.time_s[linked], share.power_w[linked] = (
            part.band_hz,
            part.time_s,
            part.power_w,
        )
    return share
