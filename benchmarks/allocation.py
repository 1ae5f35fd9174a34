"""Sharing the band: how exact, how early, and how fast; and the closed forms of over-the-air aggregation.

1,000 random instances for minimum latency: K log-uniform in 2..10,000 devices, a log-uniform in 1e4..1e9 Hz,
payloads over three decades, fixed times up to 10 s (none in every third), a band over five decades, and a cap
of 0.3 to 10 bit/s/Hz in every second. The largest relative error counts; time is CPU time of one thread, the
median of many calls. Least energy is measured on the same instances, at 1 to 4 times the earliest deadline,
by how far apart the prices -dE/db of the devices with a free choice are. Whole blocks: 20 devices on 20 MHz
by blocks of 180 kHz, at SNRs of 6 to 52 dB over 1 MHz.

Over the air, a trial draws the Rayleigh fading of 20 devices. Closed forms are compared with the trials' mean
in standard errors of that mean, with payload, noise and silence as ``received`` has them; 10,000 trials.
"""

from __future__ import annotations

import functools
import math
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported

import numpy as np

from benchmarks.record import Figure, write_result
from benchmarks.timing import cpu_s
from fedlam_app.base.keys import rng
from fedlam_app.wireless.air import least_error, participation, received, truncated_inversion
from fedlam_app.wireless.allocate import LN2, equal, finish_s, min_max
from fedlam_app.wireless.allocate_energy import min_energy
from fedlam_app.wireless.assign import assign
from fedlam_app.wireless.demand import Demand, Reals
from fedlam_app.wireless.resource_blocks import whole_blocks

SEED, INSTANCES, TRIALS = 2025, 1_000, 10_000
KNOWN = (8e6, [1e6, 5e6, 2e7, 1e8], [1.0, 2.0, 0.5, 4.0], 4e6)
KNOWN_BAND = (3159593.965, 393551.422, 168348.845, 278505.767)


def instance(number: int, most: float = 1e4) -> Demand:
    """Return one random problem."""
    draw = rng(SEED, "allocation", number)
    count = round(math.exp(draw.uniform(math.log(2), math.log(most))))
    return Demand(
        bits=10 ** draw.uniform(5, 8, count),
        gain_hz=10 ** draw.uniform(4, 9, count),
        fixed_s=draw.uniform(0, 10, count) * (number % 3 > 0),
        band_hz=10 ** draw.uniform(5, 10),
        cap=np.full(count, math.inf if number % 2 else 10 ** draw.uniform(-0.5, 1)),
        power_w=10 ** draw.uniform(-2, 0, count),
    )


def minimum_latency() -> list[Figure]:
    """Return the figures of min-max bandwidth."""
    spread = residual = above = 0.0
    for number in range(INSTANCES):
        d = instance(number)
        band, last = min_max(d.bits, d.gain_hz, d.fixed_s, d.band_hz, d.cap)
        times = finish_s(d.bits, d.gain_hz, d.fixed_s, band, d.cap)
        spread = max(spread, float(np.abs(times / last - 1).max()))
        residual = max(residual, abs(float(band.sum()) / d.band_hz - 1))
        above = max(above, last / equal(d.bits, d.gain_hz, d.fixed_s, d.band_hz, d.cap)[1])
    band, last = min_max(*KNOWN)
    off = max(abs(last / 7.382526689 - 1), float(np.abs(band / KNOWN_BAND - 1).max()))
    name = "min-max bandwidth"
    figures = [
        Figure("wireless", f"{name}, largest |T_k / T - 1|", spread, "", "<= 1e-6"),
        Figure("wireless", f"{name}, largest |sum b / B - 1|", residual, "", "<= 1e-8"),
        Figure("wireless", f"{name}, largest T over that of equal shares", above, "", "<= 1"),
        Figure("wireless", f"{name}, error on the test vector", off, "", "<= 1e-8"),
    ]
    draw = rng(SEED, "timing")
    for count in (20, 1_000, 10_000):
        a, t0, s = (
            10 ** draw.uniform(4, 9, count),
            draw.uniform(0, 10, count),
            10 ** draw.uniform(5, 8, count),
        )
        took = 1e3 * cpu_s(functools.partial(min_max, s, a, t0, 1e6 * count, 5.55), 101)
        bound = "<= 5" if count == 1_000 else ""
        figures.append(Figure("wireless", f"{name}, K = {count:,}, CPU", took, "ms", bound))
    return figures


def minimum_energy() -> list[Figure]:
    """Return the figures of least energy at a deadline."""
    spread = residual = 0.0
    for number in range(INSTANCES):
        d = instance(number, most=2e3)
        earliest = min_max(d.bits, d.gain_hz, d.fixed_s, d.band_hz, d.cap)[1]
        deadline = earliest * float(rng(SEED, "deadline", number).uniform(1.0, 4.0))
        found = min_energy(d.bits, d.gain_hz, d.power_w, d.fixed_s, d.band_hz, deadline, d.cap)
        tau = deadline - d.fixed_s
        y = d.bits * LN2 / (tau * found.band_hz)
        # (y - 1) e^y + 1, by its series where it would cancel
        phi = np.where(
            y < 1e-2, y**2 * (0.5 + y / 3 + y**2 / 8 + y**3 / 30 + y**4 / 144), y * np.exp(y) - np.expm1(y)
        )
        prices = (tau * d.power_w / d.gain_hz * phi)[~found.held]
        if len(prices):
            spread = max(spread, float(prices.max() / prices.min()) - 1)
        residual = max(residual, abs(float(found.band_hz.sum()) / d.band_hz - 1))
    return [
        Figure("wireless", "least energy, largest KKT spread of prices", spread, "", "<= 1e-8"),
        Figure("wireless", "least energy, largest |sum b / B - 1|", residual, "", "<= 1e-8"),
    ]


def blocks() -> list[Figure]:
    """Return the figures of whole resource blocks and of the assignment."""
    gaps, shares, block = [], [], 180e3
    for number in range(INSTANCES):
        draw = rng(SEED, "blocks", number)
        s, a = 10 ** draw.uniform(6, 7, 20), 10 ** draw.uniform(6.6, 11.2, 20)
        t0 = draw.uniform(0, 3, 20) * (number % 2)
        smallest = float(min_max(s, a, t0, 20e6, 5.55)[0].min())
        gaps.append(whole_blocks(s, a, t0, 20e6, block, 5.55).gap)
        shares.append((1 + gaps[-1]) / (1 + block / smallest))
    draw = rng(SEED, "thousand blocks")
    s, a = 10 ** draw.uniform(5, 7, 1_000), 10 ** draw.uniform(4, 9, 1_000)
    figures = [
        Figure("wireless", "whole blocks, median T over continuous, less 1", float(np.median(gaps)), ""),
        Figure("wireless", "whole blocks, largest T over continuous, less 1", float(np.max(gaps)), ""),
        Figure(
            "wireless",
            "whole blocks, largest T / (T_c (1 + block / b_min))",
            float(np.max(shares)),
            "",
            "<= 1",
        ),
        Figure(
            "wireless",
            "whole blocks, K = 1,000 on 5,555, CPU",
            1e3 * cpu_s(lambda: whole_blocks(s, a, 0.0, 1e9, block, 5.55), 21),
            "ms",
        ),
    ]
    for devices, count in ((1_000, 100), (2_000, 273)):
        n, q, may = (
            draw.uniform(1, 100, devices),
            draw.random((devices, count)),
            draw.random((devices, count)) < 0.9,
        )
        took = 1e3 * cpu_s(functools.partial(assign, n, q, may), 21)
        figures.append(
            Figure("wireless", f"Hungarian, {devices:,} devices on {count} blocks, CPU", took, "ms")
        )
    return figures


def over_the_air() -> list[Figure]:
    """Return the figures of over-the-air aggregation."""
    devices, entries, noise_w, threshold = 20, 10, 0.1, 0.5
    draw = rng(SEED, "air")
    share = np.empty(TRIALS)
    ratio = np.full(TRIALS, np.nan)
    excess = np.empty(TRIALS)
    for trial in range(TRIALS):
        gain = draw.exponential(size=devices)
        air = truncated_inversion(gain, 1.0, 1.0, noise_w, threshold)
        share[trial] = air.heard.mean()
        if air.total_weight:
            heard = received(np.zeros(entries), air, 0.0, 1.0, draw)
            ratio[trial] = (heard**2).mean() / (noise_w / (air.eta * air.heard.sum() ** 2))
        best = least_error(gain, 1.0, 1.0, noise_w)
        x = draw.standard_normal((devices, entries))
        missed = received(best.theta @ x, best, 0.0, 1.0, draw) - x.mean(0)
        excess[trial] = (missed**2).mean() * devices**2 / best.mse
    known = least_error(np.array([0.2, 0.5, 1.0, 2.0]) ** 2, 1.0, 1.0, noise_w)
    wanted = participation(threshold)
    ratio = ratio[np.isfinite(ratio)]

    def sigmas(values: Reals, mean: float) -> float:
        return abs(float(values.mean()) - mean) / (float(values.std()) / math.sqrt(len(values)))

    name = "over the air"
    return [
        Figure(
            "wireless", f"{name}, error of eta* on the test vector", abs(known.eta - 0.310408), "W", "<= 1e-6"
        ),
        Figure("wireless", f"{name}, error of its MSE", abs(known.mse - 0.743590), "", "<= 1e-6"),
        Figure(
            "wireless", f"{name}, participation", abs(share.mean() / wanted - 1), "relative error", "<= 5e-3"
        ),
        Figure("wireless", f"{name}, noise MSE", abs(ratio.mean() - 1), "relative error", "<= 0.02"),
        Figure("wireless", f"{name}, participation from exp(-g)", sigmas(share, wanted), "sigma", "<= 3"),
        Figure(
            "wireless", f"{name}, noise MSE from sigma^2 / (rho |S|^2)", sigmas(ratio, 1.0), "sigma", "<= 3"
        ),
        Figure(
            "wireless", f"{name}, least error's MSE from its formula", sigmas(excess, 1.0), "sigma", "<= 3"
        ),
    ]


def main() -> int:
    """Measure, write ``results/allocation.json``; 0 where every bound holds."""
    figures = minimum_latency() + minimum_energy() + blocks() + over_the_air()
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    write_result("allocation", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
