"""Batteries: what they hold, what work and idling take from them, and when they charge.

    level' = level - 0.01 dt / h  - E / capacity        unplugged
    level' = level + 0.40 dt / h  - E / capacity        plugged in, and never above 1 or below 0

A device is plugged in once a day, at its own local hour, N(22.5 h, 1.5 h), for seven hours. Devices on the
mains are always plugged in, and full. Whoever charges may take part, and else whose level is at least
``fleet.battery-floor``. All these numbers are assumptions of this project (a phone that idles through a day
loses a quarter, and is full after two hours and a half).

A long step is taken in parts of at most half an hour, and whether a device charges is asked in their middle.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

IDLE, CHARGE = 0.01, 0.40  # of a full battery, an hour
PLUG_HOUR, PLUG_STD_H, PLUGGED_H = 22.5, 1.5, 7.0
PART_S = 1800.0
BLOCK = 8192  # devices whose arrays fit the cache


class Batteries:
    """N batteries; ``level`` (N,) is the state of charge in [0, 1]."""

    def __init__(self, capacity_j: Floats, zone_h: NDArray[np.uint8], draw: np.random.Generator) -> None:
        """``capacity_j`` (N,) [J] is infinite on the mains; ``zone_h`` (N,) is local time less ours [h]."""
        count = len(capacity_j)
        self.capacity_j = capacity_j
        self.mains = np.isinf(capacity_j)
        local = PLUG_HOUR + PLUG_STD_H * draw.standard_normal(count, dtype=np.float32)
        self.plug_h = np.mod(local - zone_h, np.float32(24.0)).astype(np.float32)  # on our clock
        self.level = draw.uniform(0.3, 1.0, count).astype(np.float32)
        self.level[self.charging(0.0)] = 1.0

    def charging(self, at_s: float, part: slice = slice(None)) -> NDArray[np.bool_]:
        """Return who is plugged in at ``at_s``, of the devices in ``part``."""
        plug = self.plug_h[part]
        latest = at_s / 3600.0 % 24.0
        earliest = latest - PLUGGED_H
        if earliest >= 0.0:
            plugged = (plug <= latest) & (plug > earliest)
        else:
            plugged = (plug <= latest) | (plug > earliest + 24.0)
        return plugged | self.mains[part]

    def advance(self, from_s: float, to_s: float) -> None:
        """Charge and idle from ``from_s`` to ``to_s``."""
        parts = max(1, int(np.ceil((to_s - from_s) / PART_S)))
        hours = (to_s - from_s) / parts / 3600.0
        for number in range(parts):
            middle_s = from_s + (number + 0.5) * hours * 3600.0
            for start in range(0, len(self.level), BLOCK):
                part = slice(start, start + BLOCK)
                level = self.level[part]
                change = np.multiply(self.charging(middle_s, part), np.float32((IDLE + CHARGE) * hours))
                level += change
                level -= np.float32(IDLE * hours)
                np.clip(level, 0.0, 1.0, out=level)

    def ready(self, at_s: float, floor: float) -> NDArray[np.bool_]:
        """Return who (N,) charges at ``at_s`` or has at least ``floor``."""
        return (self.level >= np.float32(floor)) | self.charging(at_s)

    def spend(self, ids: NDArray[np.int64], energy_j: NDArray[np.floating]) -> None:
        """Take ``energy_j`` (k,) [J] from the batteries of ``ids``, each named once; none falls below 0."""
        left = self.level[ids] - energy_j / self.capacity_j[ids]
        self.level[ids] = np.maximum(left, 0.0)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        return {"level": self.level.copy()}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""
        self.level = np.array(state["level"], np.float32)
