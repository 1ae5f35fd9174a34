"""FedCS: as many devices as fit a deadline, one upload after the other.

T. Nishio, R. Yonetani, "Client Selection for Federated Learning with Heterogeneous Resources in Mobile Edge",
arXiv:1804.08333.

    poll ceil(c K) devices at random for their resources,   c = ``selection.candidates``
    Theta = 0, S = {}
    repeat   x = argmin_k  tUL_k + max(0, tUD_k - Theta)      tUD: ready [s], tUL: upload over all of the band
             Theta <- Theta + tUL_x + max(0, tUD_x - Theta)
             S <- S + x                                        while Theta < ``selection.deadline-s``, |S| < K

As tUL + max(0, tUD - Theta) = max(tUL, tUL + tUD - Theta), a device comes after all that are no worse in
tUL and better in tUL + tUD, whatever Theta is. So whoever has K of these can be left out beforehand, and the
greedy runs over the few others (``rivals``). Equal costs go by tUL + tUD, then by lower id.

Departures: at most K devices are taken; the paper's bound is the deadline alone. tUD holds each device's own
download, for its part in a multicast is not known. The whole band is priced from the equal share by
Shannon's law, tUL = upload ln(1 + K a / B) / (K ln(1 + a / B)); where both rates are at their cap that is too
long. Where not one device fits, the quickest is taken: a round of nobody teaches nothing.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.selection.base import Choice, Places, Policy, RoundState
from strategies.selection.picks import asked, evenly, nth

Seconds = NDArray[np.float32]


class FedCs(Policy):
    """Remembers nothing."""

    polls: ClassVar[str] = "status"

    def candidates(self, state: RoundState, draw: np.random.Generator) -> Places:
        return evenly(len(state), asked(state.wanted, self.config.candidates), draw)

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        upload = whole_band_s(state)
        total = upload + state.fixed_s
        return Choice(queued(upload, total, state.wanted, self.config.deadline_s))


def whole_band_s(state: RoundState) -> Seconds:
    """Return the upload times (M,) [s] of devices that have the whole band, each in its turn."""
    snr = np.maximum(state.gain_hz / np.float32(state.band_hz), np.float32(1e-12))
    gain = np.log1p(snr * np.float32(state.places)) / (np.float32(state.places) * np.log1p(snr))
    return state.upload_s * gain


def queued(upload: Seconds, total: Seconds, wanted: int, deadline_s: float) -> Places:
    """Return the places (k,), as they upload, of who fits; ``total`` (M,) is upload + ready [s]."""
    near = rivals(upload, total, wanted)
    near = near[np.lexsort((near, total[near]))]
    left, sums = upload[near].astype(np.float64), total[near].astype(np.float64)
    chosen: list[int] = []
    theta = 0.0
    for _ in range(min(wanted, len(near))):
        cost = np.maximum(left, sums - theta)
        best = int(np.argmin(cost))
        end = theta + float(cost[best])
        if end >= deadline_s and (chosen or not math.isfinite(end)):
            break  # all others cost more
        chosen.append(best)
        left[best] = np.inf
        theta = end
    return near[np.array(chosen, np.intp)]


def rivals(upload: Seconds, total: Seconds, wanted: int) -> Places:
    """Return at least the places of all who have fewer than ``wanted`` others before them in any case."""
    inside = np.arange(len(upload))
    kept = []
    while len(inside) > 4 * wanted > 0:
        up, sum_s = upload[inside], total[inside]
        cut = nth(up, max(len(up) // 4, wanted) - 1)
        bar = nth(sum_s[up <= cut], wanted - 1)
        below = up < cut
        kept.append(inside[~below & (sum_s <= bar)])
        inside = inside[below]
    return np.concatenate([*kept, inside])
