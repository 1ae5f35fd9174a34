"""Devices that move: straight on, a new direction now and then, and back from the edge of the disc.

    turn     with probability 1 - exp(-dt / 60 s) a leg begins in a new direction, uniform in 2 pi
    move     p' = p + v dt,  reflected where |p| = R:  v' = v - 2 (v . n) n,  n = p / R
    leap     dt > max(4 R / v, 2 R^2 / (v^2 60 s)):  anywhere in the disc

The random direction model: reflection keeps the density uniform, so nobody gathers in the middle, as under
random waypoints. A step is taken in legs of at most a minute (at most a hundred of them, which then are
longer); a leap is what the longest steps come to, for by then the device has been all over the disc.

Three quarters of the moving devices walk, 0.83 m/s; a quarter drives, 8.3 m/s. Shares, speeds and the 60 s
are assumptions of this project. Walkers come first in every array, in blocks of 8,192, which never mix the
two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedlam_app.wireless.geometry import drop_m

Floats = NDArray[np.float32]

WALK_M_S, DRIVE_M_S = 0.83, 8.3
WALKING = 0.75  # of those that move
TURN_S = 60.0
BLOCK = 8192  # devices whose arrays fit the cache
LEGS = 100  # in one step
BOUNCES = 16  # in one leg; only who creeps along the edge needs as many


class Movers:
    """The m devices that move: ``ids`` (m,), and place [m] and velocity [m/s] relative to each one's home."""

    def __init__(self, ids: NDArray[np.int64], x: Floats, y: Floats, radius_m: float) -> None:
        """``ids`` in an order drawn at random; x and y (m,) are where they begin."""
        self.radius_m = radius_m
        self.walkers = round(WALKING * len(ids))
        # Each kind in ascending order: what is written back by id then stays near in memory.
        order = np.concatenate(
            [np.argsort(ids[: self.walkers]), self.walkers + np.argsort(ids[self.walkers :])]
        )
        self.ids, self.x, self.y = ids[order], x[order], y[order]
        self.vx, self.vy = np.zeros_like(x), np.zeros_like(y)

    def blocks(self) -> Iterator[tuple[slice, float]]:
        """Yield slices of the arrays, and the speed [m/s] of all devices in each."""
        for first, last, speed in ((0, self.walkers, WALK_M_S), (self.walkers, len(self.ids), DRIVE_M_S)):
            for start in range(first, last, BLOCK):
                yield slice(start, min(start + BLOCK, last)), speed

    def begin(self, draw: np.random.Generator) -> None:
        """Give everybody a direction."""
        for part, speed in self.blocks():
            angle = draw.random(part.stop - part.start, dtype=np.float32) * np.float32(2.0 * math.pi)
            self.vx[part], self.vy[part] = speed * np.cos(angle), speed * np.sin(angle)

    def move(self, part: slice, speed: float, dt_s: float, draw: np.random.Generator) -> None:
        """Move the devices of one block on by ``dt_s``."""
        x, y = self.x[part], self.y[part]
        radius = self.radius_m
        if dt_s > max(4.0 * radius / speed, 2.0 * (radius / speed) ** 2 / TURN_S):
            x[:], y[:] = drop_m(len(x), radius, draw)
            return
        legs = min(math.ceil(dt_s / TURN_S), LEGS)
        for _ in range(legs):
            self._leg(part, speed, dt_s / legs, draw)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        return {name: getattr(self, name).copy() for name in ("x", "y", "vx", "vy")}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""
        for name in ("x", "y", "vx", "vy"):
            setattr(self, name, np.array(state[name], np.float32))

    def _leg(self, part: slice, speed: float, dt_s: float, draw: np.random.Generator) -> None:
        x, y, vx, vy = self.x[part], self.y[part], self.vx[part], self.vy[part]
        turns = np.flatnonzero(draw.random(len(x), dtype=np.float32) < 1.0 - math.exp(-dt_s / TURN_S))
        angle = draw.random(len(turns), dtype=np.float32) * np.float32(2.0 * math.pi)
        vx[turns], vy[turns] = speed * np.cos(angle), speed * np.sin(angle)
        x += vx * np.float32(dt_s)
        y += vy * np.float32(dt_s)
        out = np.flatnonzero(x * x + y * y > self.radius_m**2)
        x[out], y[out], vx[out], vy[out] = reflected(x[out], y[out], vx[out], vy[out], self.radius_m)


def reflected(
    x: Floats, y: Floats, vx: Floats, vy: Floats, radius_m: float
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return places and velocities (k,) of devices that went straight out of the disc, had it a wall."""
    moving = np.stack([x, y, vx, vy]).astype(np.float64)  # (4, k)
    out = np.arange(len(x))
    for _ in range(BOUNCES):
        px, py, ux, uy = moving[:, out]
        speed2 = ux * ux + uy * uy
        along = px * ux + py * uy  # p . v, at least 0 outside
        # How long ago the device was at the edge: |p - v s| = R.
        over = px * px + py * py - radius_m**2
        since = (along - np.sqrt(np.maximum(along * along - speed2 * over, 0.0))) / speed2
        ex, ey = px - ux * since, py - uy * since
        across = 2.0 * (ux * ex + uy * ey) / (ex * ex + ey * ey)
        ux, uy = ux - across * ex, uy - across * ey
        moving[:, out] = ex + ux * since, ey + uy * since, ux, uy
        out = out[np.square(moving[:2, out]).sum(0) > radius_m**2]
        if not len(out):
            break
    # Rounding to float32 must not put anybody outside, and the last bounces may not all have been made.
    reach = np.maximum(np.hypot(moving[0], moving[1]), 1e-9)
    moving[:2] *= np.minimum(1.0, radius_m * (1.0 - 1e-6) / reach)
    x, y, vx, vy = moving.astype(np.float32)
    return x, y, vx, vy
