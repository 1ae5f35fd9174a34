"""Where base stations stand and devices live: a hexagonal grid of sites, and discs around them.

    sites    a1 (i + j / 2), a1 j sqrt(3) / 2   of the hexagons within 0, 1 or 2 rings: 1, 7, 19
    device   (R sqrt(U), 2 pi V) around its home site

The distance between sites is a1 = sqrt(3) R, which R = 289 m makes 500 m. Every device lives in the disc of
radius R around its home, uniformly by area; discs of neighbours overlap a little. Units: m.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_RINGS = {1: 0, 7: 1, 19: 2}


def sites_m(cells: int, radius_m: float) -> Floats:
    """Return the places (cells, 2) [m] of 1, 7 or 19 base stations, the middle one first."""
    if cells not in _RINGS:
        raise ValueError(f"wireless.cells = {cells} must be 1, 7 or 19")
    rings = _RINGS[cells]
    apart = math.sqrt(3.0) * radius_m
    found = [
        (max(abs(i), abs(j), abs(i + j)), apart * (i + j / 2.0), apart * j * math.sqrt(3.0) / 2.0)
        for i in range(-rings, rings + 1)
        for j in range(-rings, rings + 1)
        if abs(i + j) <= rings
    ]
    return np.array([place[1:] for place in sorted(found)], np.float32)


def drop_m(count: int, radius_m: float, draw: np.random.Generator) -> tuple[Floats, Floats]:
    """Return x and y (count,) [m], uniform in the disc of ``radius_m`` around 0."""
    reach = np.sqrt(draw.random(count, dtype=np.float32)) * np.float32(radius_m)
    angle = draw.random(count, dtype=np.float32) * np.float32(2.0 * math.pi)
    return reach * np.cos(angle), reach * np.sin(angle)
