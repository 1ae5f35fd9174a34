"""Who the devices are: profiles of real devices, their mixes, and how unlike devices of one kind are.

    throughput = efficiency peak exp(spread z_1)      memory bandwidth = nominal exp(spread z_3)
    RAM        = quantile Phi(z_2) of the profile's sizes
    z ~ N(0, C)        C = ((1, 0.7, 0.5), (0.7, 1, 0.5), (0.5, 0.5, 1))

so that computing power, memory and its bandwidth rise and fall together (a Gaussian copula). ``lognormal``
devices are one kind of median throughput ``fleet.gflops``, whose RAM follows the phones in AI-Benchmark's
list.

Sources: RAM of phones and Jetsons, and powers of Jetsons, are those of vendors' pages and of the AI-Benchmark
list (A. Ignatov et al., "AI Benchmark: All About Deep Learning on Smartphones in 2019", arXiv:1910.06663).
Peaks (FP32), bandwidths and other powers are vendors' data recalled, not re-read. Efficiencies in training
(0.3 of a GPU's peak, 0.5 of a CPU's), batteries, the mixes, the correlations and the medians of ``lognormal``
devices beside their throughput are assumptions of this project. Units: GFLOP/s, GB = 1e9 bytes, W, J, mAh at
3.85 V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from fedlam_app.tables.wireless import FleetConfig

Floats = NDArray[np.float32]

CORRELATION = np.array([[1.0, 0.7, 0.5], [0.7, 1.0, 0.5], [0.5, 0.5, 1.0]])  # throughput, RAM, bandwidth
CELL_V = 3.85  # of a lithium cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A kind of device."""

    name: str
    gflops: float  # peak, FP32
    efficiency: float  # share of it that training reaches
    ram_gb: tuple[float, ...]  # ascending
    ram_share: tuple[float, ...] = ()  # of these sizes; empty: equal
    memory_gbs: float
    power_w: float  # at work
    battery_mah: float  # 0: on the mains

    @property
    def capacity_j(self) -> float:
        """Energy [J] of a full battery; infinite on the mains."""
        return self.battery_mah * 3.6 * CELL_V if self.battery_mah else math.inf


PROFILES = tuple(
    Profile(
        name=name, gflops=peak, efficiency=share, ram_gb=ram, memory_gbs=gbs, power_w=power, battery_mah=mah
    )
    for name, peak, share, ram, gbs, power, mah in (
        ("Raspberry Pi 4B", 13.5, 0.5, (4.0, 8.0), 6.0, 6.4, 0.0),
        ("phone, low (Helio P22)", 45.0, 0.3, (2.0,), 7.0, 2.0, 4000.0),
        ("phone, middle (Snapdragon 675)", 220.0, 0.3, (4.0,), 15.0, 3.0, 4000.0),
        ("phone, high (Snapdragon 855)", 950.0, 0.3, (6.0,), 34.0, 4.5, 2800.0),
        ("phone, flagship (Snapdragon 8 Gen 2)", 2500.0, 0.3, (8.0, 12.0), 67.0, 6.0, 5000.0),
        ("Jetson Nano", 236.0, 0.3, (4.0,), 25.6, 10.0, 0.0),
        ("Jetson Xavier NX", 850.0, 0.3, (8.0,), 59.7, 15.0, 0.0),
        ("Jetson Orin Nano", 1280.0, 0.3, (8.0,), 68.0, 15.0, 0.0),
        ("Jetson Orin NX", 1900.0, 0.3, (16.0,), 102.0, 25.0, 0.0),
        ("Jetson AGX Orin", 5300.0, 0.3, (64.0,), 205.0, 60.0, 0.0),
    )
)
_PHONES = np.array([0.0, 0.30, 0.40, 0.25, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0])
_EDGE = np.array([0.15, 0.10, 0.20, 0.15, 0.05, 0.15, 0.10, 0.04, 0.04, 0.02])
MIXES = {"phones": _PHONES, "edge": _EDGE, "mixed": (_PHONES + _EDGE) / 2.0}


def typical(gflops: float) -> Profile:
    """Return the one kind of ``lognormal`` devices, of this median throughput [GFLOP/s]."""
    return Profile(
        name="lognormal",
        gflops=gflops,
        efficiency=1.0,
        ram_gb=(0.75, 2.0, 4.0, 6.0, 8.0, 12.0),
        ram_share=(0.16, 0.11, 0.30, 0.23, 0.17, 0.03),
        memory_gbs=15.0,
        power_w=3.0,
        battery_mah=5000.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """N devices, (N,) each."""

    kind: NDArray[np.uint8]  # place in the list of profiles they were drawn from
    throughput: Floats  # of training [FLOP/s]
    memory: Floats  # bandwidth of the memory [B/s]
    ram: Floats  # [B]
    power_w: Floats  # at work
    capacity_j: Floats  # of a full battery; infinite on the mains


def draw_devices(config: FleetConfig, count: int, draw: np.random.Generator) -> Devices:
    """Return ``count`` devices of the mix ``fleet.profiles``; ValueError where that is none."""
    if config.profiles == "lognormal":
        profiles: tuple[Profile, ...] = (typical(config.gflops),)
        shares = np.ones(1)
    elif config.profiles in MIXES:
        profiles, shares = PROFILES, MIXES[config.profiles]
    else:
        raise ValueError(
            f"fleet.profiles = '{config.profiles}' has no devices;"
            f" it must be one of lognormal, {', '.join(MIXES)}"
        )
    kind = draw.choice(len(profiles), count, p=shares).astype(np.uint8)
    factor = np.linalg.cholesky(CORRELATION).astype(np.float32)
    z = factor @ draw.standard_normal((3, count), dtype=np.float32)  # (3, N)

    def of(values: list[float]) -> Floats:
        return np.array(values, np.float32)[kind]

    ram = np.empty(count, np.float32)
    for place, profile in enumerate(profiles):
        mine = np.flatnonzero(kind == place)
        sizes = np.array(profile.ram_gb, np.float32)
        share = np.array(profile.ram_share) if profile.ram_share else np.full(len(sizes), 1.0 / len(sizes))
        step = np.searchsorted(np.cumsum(share)[:-1], ndtr(z[1, mine]), side="right")
        ram[mine] = sizes[step] * 1e9
    spread = np.float32(config.spread)
    return Devices(
        kind=kind,
        throughput=of([p.gflops * p.efficiency * 1e9 for p in profiles]) * np.exp(spread * z[0]),
        memory=of([p.memory_gbs * 1e9 for p in profiles]) * np.exp(spread * z[2]),
        ram=ram,
        power_w=of([p.power_w for p in profiles]),
        capacity_j=of([p.capacity_j for p in profiles]),
    )
