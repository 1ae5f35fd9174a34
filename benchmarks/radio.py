"""The radio against its references: TR 38.901 vectors, Sionna, closed forms, and the SNRs of scenario S1.

Path loss and LOS probability are compared with numbers computed apart, and with Sionna at 0.7, 3.5 and 28 GHz
from 10 m to 5 km (indoors to 150 m), with Sionna's speed of light: the TR's 3e8 m/s makes a difference beyond
the breakpoint alone, which is a figure of its own. Everything else is drawn:

    shadowing   1e5 devices over one correlation distance, per scenario and state
    fading      1e6 draws at -10 to 50 dB against e^{1/s} E1(1/s) / ln 2
    packets     1e6 draws at A = 0.001 to 1 against 1 - 2 sqrt(A) K1(2 sqrt(A))
    S1          200,000 devices in a disc of 289 m, UMa, 3.5 GHz, 23 dBm over 1 MHz, noise figure 5 dB, 0 dBi

Times are CPU seconds of one thread, medians, for float32 in blocks of 8,192.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import constants

from benchmarks.record import Figure, write_result
from benchmarks.timing import cpu_s
from fedlam_app.base.keys import rng
from fedlam_app.config import parse
from fedlam_app.wireless.errors import rayleigh_error
from fedlam_app.wireless.fading import block_fading, ergodic_rate
from fedlam_app.wireless.power import gain_hz, noise_dbm_hz
from fedlam_app.wireless.rates import CQI_EFFICIENCY, cqi_efficiency, link_of, rate_bps
from fedlam_app.wireless.shadowing import correlation_m, evolve, std_db
from fedlam_app.wireless.tr38901 import (
    SCENARIOS,
    los_probability,
    pathloss_db,
    pathloss_los_db,
    pathloss_nlos_db,
)

SEED, CARRIER, BLOCK = 2025, 3.5, 8192
FARTHEST_M = {"uma": 5000.0, "umi": 5000.0, "rma": 5000.0, "indoor": 150.0}  # of the TR's validity
VECTORS = {  # at CARRIER: (m, LOS dB, NLOS dB, P(LOS))
    "uma": (
        (50, 77.2122, 92.5108, 0.6494),
        (100, 83.1382, 103.0375, 0.3477),
        (200, 89.5695, 114.4620, 0.1280),
        (1000, 109.4119, 141.6660, 0.0180),
    ),
    "umi": (
        (50, 79.0896, 94.1807, 0.5196),
        (100, 85.3142, 104.6438, 0.2310),
        (200, 91.6112, 115.2288, 0.0935),
        (500, 107.1138, 129.2645, 0.0360),
    ),
}
CQI_BITS, CQI_MODULATIONS = (2, 4, 6), (6, 3, 6)  # bits a symbol, and CQIs that use them
CQI_CODE = (78, 120, 193, 308, 449, 602, 378, 490, 616, 466, 567, 666, 772, 873, 948)  # rate x 1024
CQI_FROM_DB = (-6.7, -4.7, -2.3, 0.2, 2.4, 4.3, 5.9, 8.1, 10.3, 11.7, 14.1, 16.3, 18.7, 21.0, 22.7)
Doubles = NDArray[np.float64]


def off(found: NDArray[Any], wanted: NDArray[Any] | float) -> float:
    """Return the largest difference."""
    return float(np.abs(found - wanted).max())


def vectors() -> list[Figure]:
    """Return how far path loss and LOS probability are from the reference vectors, in float32."""
    loss, chance = 0.0, 0.0
    for name, rows in VECTORS.items():
        at, los, nlos, probability = np.array(rows).T
        near = at.astype(np.float32)
        loss = max(loss, off(pathloss_los_db(name, near, CARRIER), los))
        loss = max(loss, off(pathloss_nlos_db(name, near, CARRIER), nlos))
        chance = max(chance, off(los_probability(name, near), probability))
    return [
        Figure("wireless", "path loss, off the reference vectors", loss, "dB", "<= 0.001"),
        Figure("wireless", "LOS probability, off the reference vectors", chance, "", "<= 0.0001"),
    ]


def sionna(name: str, distance_m: Doubles, carrier_ghz: float, los: bool) -> tuple[Doubles, Doubles]:
    """Return Sionna's path loss [dB] and LOS probability, (N,) each: N cells of one device."""
    import torch
    from sionna.phy.channel import tr38901

    site, count = SCENARIOS[name], len(distance_m)
    panel: dict[str, Any] = {"polarization": "single", "polarization_type": "V", "antenna_pattern": "omni"}
    array = tr38901.PanelArray(1, 1, carrier_frequency=carrier_ghz * 1e9, precision="double", **panel)
    kind, options = {
        "uma": (tr38901.UMa, {"o2i_model": "low"}),
        "umi": (tr38901.UMi, {"o2i_model": "low"}),
        "rma": (tr38901.RMa, {}),
        "indoor": (tr38901.InH, {"indoor_scenario": "open"}),
    }[name]
    model = kind(
        carrier_frequency=carrier_ghz * 1e9,
        ut_array=array,
        bs_array=array,
        direction="uplink",
        precision="double",
        **options,
    )
    zeros = torch.zeros(count, 1, 3, dtype=torch.float64)
    device, base = zeros.clone(), zeros.clone()
    device[:, 0, 0], device[:, 0, 2] = torch.from_numpy(distance_m), site.device_height_m
    base[:, 0, 2] = site.bs_height_m
    inside = torch.full((count, 1), name == "indoor")
    cars = {"in_car": inside} if name == "rma" else {}  # by default everybody outdoors sits in one
    model.set_topology(device, base, zeros, zeros, zeros, inside, los=los, **cars)
    # Path loss and LOS probability by themselves are private.
    scenario = model._scenario
    return scenario.basic_pathloss.numpy().ravel(), scenario.los_probability.numpy().ravel()


def against_sionna() -> list[Figure]:
    """Return the largest differences from Sionna in every scenario, with and without sight."""
    loss, chance, light = 0.0, 0.0, 0.0
    for name in SCENARIOS:
        distance = np.geomspace(10.0, FARTHEST_M[name], 400)
        site = replace(SCENARIOS[name], light_m_s=constants.speed_of_light)
        for carrier in (0.7, CARRIER, 28.0):
            for los in (True, False):
                theirs, probability = sionna(name, distance, carrier, los)
                state = np.full(len(distance), los)
                loss = max(loss, off(pathloss_db(site, distance, carrier, state), theirs))
                light = max(light, off(pathloss_db(name, distance, carrier, state), theirs))
                chance = max(chance, off(los_probability(name, distance), probability))
    return [
        Figure("wireless", "path loss, off Sionna's, its speed of light", loss, "dB", "<= 0.001"),
        Figure("wireless", "path loss, off Sionna's, the TR's 3e8 m/s", light, "dB"),
        Figure("wireless", "LOS probability, off Sionna's", chance, "", "<= 0.001"),
    ]


def shadow() -> list[Figure]:
    """Return the largest errors of shadowing's spread and memory over all scenarios and states."""
    count, steps = 100_000, 10
    spread, memory = 0.0, 0.0
    for name, site in SCENARIOS.items():
        for sight in (True, False):
            draw = rng(SEED, "shadow", name, int(sight))
            los = np.full(count, sight)
            sigma = std_db(name, np.full(count, 100, np.float32), CARRIER, los)
            distance = correlation_m(name, los)
            start = draw.standard_normal(count, dtype=np.float32)
            now = start.copy()
            for _ in range(steps):
                evolve(now, distance / steps, distance, draw)
            stated = site.std_los_db if sight else site.std_nlos_db
            spread = max(spread, abs(float(np.std(sigma * now)) / stated - 1.0))
            memory = max(memory, abs(float(np.corrcoef(start, now)[0, 1]) - math.exp(-1.0)))
    return [
        Figure("wireless", "shadowing, relative error of the standard deviation", spread, "", "<= 0.01"),
        Figure("wireless", "shadowing at d_corr, correlation off e^-1", memory, "", "<= 0.02"),
    ]


def closed_forms() -> list[Figure]:
    """Return fading's and packet error's distance from what is drawn, and the CQI table's."""
    count = 1_000_000
    h = block_fading(count, rng(SEED, "fading")).astype(np.float64)
    worst = 0.0
    for snr in 10.0 ** np.arange(-1.0, 6.0):
        worst = max(worst, abs(float(np.log2(1.0 + snr * h).mean()) / float(ergodic_rate(snr)) - 1.0))
    figures = [Figure("wireless", "ergodic rate, relative error", worst, "", "<= 0.01")]
    for a in (0.001, 0.01, 0.1, 1.0):
        draw = rng(SEED, "packets", int(1000 * a))
        lost = float((draw.random(count) < -np.expm1(-a / draw.standard_exponential(count))).mean())
        q = float(rayleigh_error(np.array(a)))
        sigmas = abs(lost - q) / math.sqrt(q * (1.0 - q) / count)
        figures.append(Figure("wireless", f"packet error at A = {a:g}", sigmas, "sigma", "<= 3"))
    stated = np.repeat(CQI_BITS, CQI_MODULATIONS) * np.array(CQI_CODE) / 1024
    table = off(CQI_EFFICIENCY, np.floor(1e4 * stated + 0.5) / 1e4)  # the standard prints four digits
    reached = off(cqi_efficiency(10.0 ** (np.array(CQI_FROM_DB) / 10.0)), CQI_EFFICIENCY)
    figures.append(Figure("wireless", "CQI table, off TS 38.214", table, "b/s/Hz", "== 0"))
    figures.append(Figure("wireless", "CQI at its thresholds, off the table", reached, "b/s/Hz", "== 0"))
    return figures


def scenario() -> list[Figure]:
    """Return the SNRs of scenario S1 over 1 MHz."""
    count, band_hz, draw = 200_000, 1e6, rng(SEED, "s1")
    distance = (289.0 * np.sqrt(draw.random(count))).astype(np.float32)
    los = draw.random(count) < los_probability("uma", distance)
    loss = pathloss_db("uma", distance, CARRIER, los)
    loss += std_db("uma", distance, CARRIER, los) * draw.standard_normal(count, dtype=np.float32)
    snr_db = 10.0 * np.log10(gain_hz(23.0, loss, noise_dbm_hz(5.0)) / band_hz)
    figures = [Figure("wireless", "S1, share of devices in sight", float(los.mean()), "")]
    for percent, wanted in ((5, 6.0), (50, 20.0), (95, 52.0)):
        found, name = float(np.percentile(snr_db, percent)), f"S1, SNR over 1 MHz, p{percent}"
        figures.append(Figure("wireless", name, found, "dB"))
        figures.append(Figure("wireless", f"{name}, off {wanted:g} dB", abs(found - wanted), "dB", "<= 1"))
    return figures


def speed() -> list[Figure]:
    """Return nanoseconds a device."""
    draw = rng(SEED, "speed")
    at = draw.uniform(10, 289, BLOCK).astype(np.float32)
    los, band = at < 80.0, 2e5
    gain = (10.0 ** draw.uniform(5, 9, BLOCK)).astype(np.float32)
    state = draw.standard_normal(BLOCK, dtype=np.float32)
    config = parse({}).wireless
    link = link_of(config)
    jobs: dict[str, Callable[[], object]] = {
        "LOS probability": lambda: los_probability("uma", at),
        "path loss": lambda: pathloss_db("uma", at, CARRIER, los),
        "shadowing step": lambda: evolve(state, 1.0, 50.0, draw),
        "planned rate": lambda: rate_bps(link, gain, band),
        "transmitted rate (ergodic)": lambda: rate_bps(config, gain, band),
        "Rayleigh packet error": lambda: rayleigh_error(at),
    }
    return [
        Figure("wireless", f"{name}, one thread", 1e9 * cpu_s(job, 31) / BLOCK, "ns/device")
        for name, job in jobs.items()
    ]


def main() -> int:
    """Measure, write ``results/radio.json``; 0 where every bound holds."""
    figures = [
        figure
        for part in (vectors, shadow, closed_forms, scenario, speed, against_sionna)
        for figure in part()
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    write_result("radio", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
