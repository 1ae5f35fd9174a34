"""Path loss, line of sight and building penetration of 3GPP TR 38.901 (Tables 7.4.1-1, 7.4.2-1, 7.4.3-1).

    d3 = sqrt(d^2 + (h_BS - h_UT)^2)        d_BP' = 4 (h_BS - 1) (h_UT - 1) f 1e9 / c

    UMa     LOS   28 + 22 lg d3 + 20 lg f             NLOS  max(LOS, 13.54 + 39.08 lg d3 + 20 lg f)
    UMi     LOS   32.4 + 21 lg d3 + 20 lg f           NLOS  max(LOS, 22.4 + 35.3 lg d3 + 21.3 lg f)
    indoor  LOS   32.4 + 17.3 lg d3 + 20 lg f         NLOS  max(LOS, 17.3 + 38.3 lg d3 + 24.9 lg f)

Beyond d_BP' the slope of LOS in UMa and UMi is 40 dB a decade (the table's PL_2 is exactly that: the two
branches meet at d_BP'). RMa is in :func:`_rma`. With r = 18 / d, and D = 63 m in UMa, 36 m in UMi:

    P(LOS)  UMa, UMi  r + exp(-d / D) (1 - r), 1 up to 18 m        RMa  exp(-(d - 10) / 1000), 1 up to 10 m
            indoor    exp(-(d - 5) / 70.8) from 5 m on, 0.54 exp(-(d - 49) / 211.7) from 49 m on (open office)

Source: TR 38.901, version 19.2 (earlier versions have less loss through coated glass). Units: d in m, along
the ground; f in GHz; c = 3e8 m/s as the TR has it. Departures: the heights are the defaults of the TR's
tables; distances under 10 m cost what 10 m cost; those beyond the TR's validity (5 km; 150 m indoors) are
extrapolated; the alternative of 20 dB for every wall below 6 GHz (Table 7.4.3-3) is left out, and so is the
shadowing of its own that the TR gives to links through walls.

Whatever depends on the distance keeps its type: float32 in, float32 out, with no float64 in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", np.float32, np.float64)
Line = tuple[float, float, float]  # dB at 1 m and 1 GHz; dB a decade of distance; dB a decade of frequency

NEAREST_M = 10.0
STREET_M, BUILDING_M = 20.0, 5.0  # RMa: width of streets, height of buildings


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One column of the TR's tables."""

    name: str
    bs_height_m: float
    device_height_m: float
    std_los_db: float  # of the shadowing
    std_far_db: float  # of LOS beyond the breakpoint
    std_nlos_db: float
    correlation_los_m: float  # distance over which shadowing falls to e^-1
    correlation_nlos_m: float
    depth_m: float  # largest way from an outer wall to a device inside; 0: nobody is behind a wall
    los: Line = (math.nan,) * 3  # RMa's depend on the heights
    nlos: Line = (math.nan,) * 3
    light_m_s: float = 3.0e8

    @property
    def drop_m(self) -> float:
        """Height of the base station over a device [m]."""
        return self.bs_height_m - self.device_height_m


SCENARIOS = {
    site.name: site
    for site in (
        Scenario(
            name="uma",
            bs_height_m=25.0,
            device_height_m=1.5,
            std_los_db=4.0,
            std_far_db=4.0,
            std_nlos_db=6.0,
            correlation_los_m=37.0,
            correlation_nlos_m=50.0,
            depth_m=25.0,
            los=(28.0, 22.0, 20.0),
            nlos=(13.54, 39.08, 20.0),
        ),
        Scenario(
            name="umi",
            bs_height_m=10.0,
            device_height_m=1.5,
            std_los_db=4.0,
            std_far_db=4.0,
            std_nlos_db=7.82,
            correlation_los_m=10.0,
            correlation_nlos_m=13.0,
            depth_m=25.0,
            los=(32.4, 21.0, 20.0),
            nlos=(22.4, 35.3, 21.3),
        ),
        Scenario(
            name="rma",
            bs_height_m=35.0,
            device_height_m=1.5,
            std_los_db=4.0,
            std_far_db=6.0,
            std_nlos_db=8.0,
            correlation_los_m=37.0,
            correlation_nlos_m=120.0,
            depth_m=10.0,
        ),
        Scenario(
            name="indoor",
            bs_height_m=3.0,
            device_height_m=1.0,
            std_los_db=3.0,
            std_far_db=3.0,
            std_nlos_db=8.03,
            correlation_los_m=10.0,
            correlation_nlos_m=6.0,
            depth_m=0.0,
            los=(32.4, 17.3, 20.0),
            nlos=(17.3, 38.3, 24.9),
        ),
    )
}


def scenario_of(scenario: Scenario | str) -> Scenario:
    """Return the scenario of a name; ValueError where there is none. A scenario is returned as it is."""
    if isinstance(scenario, Scenario):
        return scenario
    if scenario not in SCENARIOS:
        raise ValueError(f"wireless.scenario = '{scenario}' must be one of {', '.join(SCENARIOS)}")
    return SCENARIOS[scenario]


def los_probability(scenario: Scenario | str, distance_m: NDArray[Real]) -> NDArray[Real]:
    """Return P(LOS) of outdoor devices (indoor: of all) at ``distance_m``, any shape; Table 7.4.2-1."""
    name = scenario_of(scenario).name
    if name == "rma":
        return np.exp((10.0 - np.maximum(distance_m, 10.0)) / 1000.0)
    if name == "indoor":
        near = np.exp((5.0 - np.maximum(distance_m, 5.0)) / 70.8)
        return np.where(distance_m > 49.0, 0.54 * np.exp((49.0 - distance_m) / 211.7), near)
    distance = np.maximum(distance_m, 18.0)
    ratio = np.divide(18.0, distance)
    return np.add(ratio, np.exp(distance / (-63.0 if name == "uma" else -36.0)) * np.subtract(1.0, ratio))


def breakpoint_m(scenario: Scenario | str, carrier_ghz: float) -> float:
    """Return the ground distance [m] beyond which LOS loses 40 dB a decade; infinite indoors."""
    site = scenario_of(scenario)
    if not 0.5 <= carrier_ghz <= 100.0:
        raise ValueError(f"wireless.carrier-ghz = {carrier_ghz} must be between 0.5 and 100")
    waves = carrier_ghz * 1e9 / site.light_m_s  # per metre
    if site.name == "indoor":
        return math.inf
    if site.name == "rma":
        return 2.0 * math.pi * site.bs_height_m * site.device_height_m * waves
    return 4.0 * (site.bs_height_m - 1.0) * (site.device_height_m - 1.0) * waves


def pathloss_los_db(scenario: Scenario | str, distance_m: NDArray[Real], carrier_ghz: float) -> NDArray[Real]:
    """Return the path loss [dB] of line of sight at ``distance_m``, any shape; Table 7.4.1-1."""
    site = scenario_of(scenario)
    square, decades = _slant(site, distance_m)
    return _los(site, square, decades, carrier_ghz)


def pathloss_nlos_db(
    scenario: Scenario | str, distance_m: NDArray[Real], carrier_ghz: float
) -> NDArray[Real]:
    """Return the path loss [dB] without line of sight, never below that with it; Table 7.4.1-1."""
    site = scenario_of(scenario)
    square, decades = _slant(site, distance_m)
    return np.maximum(_los(site, square, decades, carrier_ghz), _nlos(site, decades, carrier_ghz))


def pathloss_db(
    scenario: Scenario | str, distance_m: NDArray[Real], carrier_ghz: float, los: NDArray[np.bool_]
) -> NDArray[Real]:
    """Return the path loss [dB] at ``distance_m`` of devices in the state ``los``, of the same shape."""
    site = scenario_of(scenario)
    square, decades = _slant(site, distance_m)
    sight = _los(site, square, decades, carrier_ghz)
    return np.where(los, sight, np.maximum(sight, _nlos(site, decades, carrier_ghz)))


def indoor_depth_m(scenario: Scenario | str, count: int, draw: np.random.Generator) -> NDArray[np.float32]:
    """Return ways (count,) [m] from the wall to the device: the smaller of two uniform draws (7.4.3.1)."""
    ways = draw.random((2, count), dtype=np.float32) * np.float32(scenario_of(scenario).depth_m)
    return ways.min(0)


def penetration_db(
    scenario: Scenario | str,
    model: Literal["low", "high"],
    carrier_ghz: float,
    depth_m: NDArray[Real],
    normal: NDArray[Real],
) -> NDArray[Real]:
    """Return the loss [dB] from outdoors to devices ``depth_m`` behind a wall, of any shape; 7.4.3.1.

    ``normal`` are standard normal draws of that shape. Zero in the scenario ``indoor``, where base station
    and devices share the building. ValueError for an unknown model.
    """
    if model not in ("low", "high"):
        raise ValueError(f"wireless.penetration = '{model}' must be low or high")
    if scenario_of(scenario).depth_m == 0.0:
        return np.zeros_like(depth_m)
    concrete_db = 5.0 + 4.0 * carrier_ghz
    glass_db, glass, std_db = 2.0 + 0.2 * carrier_ghz, 0.3, 4.4
    if model == "high":
        glass_db, glass, std_db = 25.4 + 0.11 * carrier_ghz, 0.7, 6.5
    passed = glass * 10.0 ** (-glass_db / 10.0) + (1.0 - glass) * 10.0 ** (-concrete_db / 10.0)
    return (5.0 - 10.0 * math.log10(passed)) + 0.5 * depth_m + std_db * normal


def _slant(site: Scenario, distance_m: NDArray[Real]) -> tuple[NDArray[Real], NDArray[Real]]:
    """Return d3^2 [m^2] and lg d3."""
    ground = np.maximum(distance_m, NEAREST_M)
    square = np.add(np.square(ground), site.drop_m**2)
    # The natural logarithm is vectorised in NumPy, for float32 too; log10 is not.
    return square, np.multiply(np.log(square), 0.5 / math.log(10.0))


def _los(site: Scenario, square: NDArray[Real], decades: NDArray[Real], carrier_ghz: float) -> NDArray[Real]:
    bend_m = breakpoint_m(site, carrier_ghz)
    if site.name == "rma":
        return _rma(site, square, decades, carrier_ghz, bend_m)
    start, slope, per_decade = site.los
    loss = slope * decades + (start + per_decade * math.log10(carrier_ghz))
    if math.isinf(bend_m):
        return loss
    bend = math.log10(math.hypot(bend_m, site.drop_m))
    return loss + (40.0 - slope) * np.maximum(decades - bend, 0.0)


def _nlos(site: Scenario, decades: NDArray[Real], carrier_ghz: float) -> NDArray[Real]:
    """Return the second argument of the table's maximum."""
    start, slope, per_decade = site.nlos
    if site.name == "rma":
        high = math.log10(site.bs_height_m)
        start = 161.04 - 7.1 * math.log10(STREET_M) + 7.5 * math.log10(BUILDING_M)
        start -= (24.37 - 3.7 * (BUILDING_M / site.bs_height_m) ** 2) * high
        start -= 3.2 * math.log10(11.75 * site.device_height_m) ** 2 - 4.97
        slope, per_decade = 43.42 - 3.1 * high, 20.0
        start -= 3.0 * slope
    return slope * decades + (start + per_decade * math.log10(carrier_ghz))


def _rma(
    site: Scenario, square: NDArray[Real], decades: NDArray[Real], carrier_ghz: float, bend_m: float
) -> NDArray[Real]:
    """Return RMa's LOS: PL_1 = 20 lg(40 pi d3 f / 3) + k lg d3 - l + 0.002 lg(h) d3, and beyond d_BP PL_2 =
    PL_1(d_BP) + 40 lg(d3 / d_BP), with k = min(0.03 h^1.72, 10), l = min(0.044 h^1.72, 14.77), h the
    buildings' height and d_BP = 2 pi h_BS h_UT f / c."""
    slope = 20.0 + min(0.03 * BUILDING_M**1.72, 10.0)
    start = 20.0 * math.log10(40.0 * math.pi * carrier_ghz / 3.0) - min(0.044 * BUILDING_M**1.72, 14.77)
    per_m = 0.002 * math.log10(BUILDING_M)
    near = slope * decades + start + per_m * np.sqrt(square)
    bend = math.log10(bend_m)
    far = 40.0 * decades + (slope * bend + start + per_m * bend_m - 40.0 * bend)
    return np.where(square < bend_m**2 + site.drop_m**2, near, far)
