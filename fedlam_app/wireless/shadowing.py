"""Shadowing that follows a device: one standard normal process per device, scaled by the state of its link.

    S' = R S + sqrt(1 - R^2) N(0, 1)        R = exp(-|dx| / d_corr)        shadowing = sigma(state) S  [dB]

Its autocorrelation over a way of x metres is exp(-x / d_corr) (TR 38.901 section 7.4.4; Gudmundson's model),
and its variance stays 1 however far and however often a device moves. sigma and d_corr are those of Tables
7.4.1-1 and 7.5-6 for line of sight, for line of sight beyond RMa's breakpoint, and for none.

Departures: a device whose state changes keeps S, so that its shadowing changes by the ratio of the sigmas and
not by a new draw; devices that stand side by side are not correlated with each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlam_app.wireless.tr38901 import Scenario, breakpoint_m, scenario_of

Floats = NDArray[np.float32]


def std_db(
    scenario: Scenario | str, distance_m: Floats, carrier_ghz: float, los: NDArray[np.bool_]
) -> Floats:
    """Return sigma [dB] of devices at ``distance_m`` in the state ``los``, of the same shape."""
    site = scenario_of(scenario)
    sight = np.float32(site.std_los_db)
    if site.std_far_db == site.std_los_db:
        return np.where(los, sight, np.float32(site.std_nlos_db))
    far = distance_m > breakpoint_m(site, carrier_ghz)
    return np.where(los, np.where(far, np.float32(site.std_far_db), sight), np.float32(site.std_nlos_db))


def correlation_m(scenario: Scenario | str, los: NDArray[np.bool_]) -> Floats:
    """Return the distance [m] over which shadowing falls to e^-1, for each ``los``, of the same shape."""
    site = scenario_of(scenario)
    return np.where(los, np.float32(site.correlation_los_m), np.float32(site.correlation_nlos_m))


def evolve(
    shadow: Floats,
    moved_m: NDArray[np.floating] | float,
    correlation: NDArray[np.floating] | float,
    draw: np.random.Generator,
) -> None:
    """Move ``shadow``, S of any shape, on in place after each device moved ``moved_m``.

    ``correlation`` is the correlation distance [m] (:func:`correlation_m`); both may be one number for all.
    """
    kept = np.exp(-np.abs(np.divide(moved_m, correlation, dtype=np.float32)))
    fresh = draw.standard_normal(shadow.shape, dtype=np.float32)
    fresh *= np.sqrt(1.0 - np.square(kept))
    shadow *= kept
    shadow += fresh
