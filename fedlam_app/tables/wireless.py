"""The wireless fleet: what the devices are, the radio between them and the edge, and who is chosen when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlam_app.tables.base import Natural, Positive, Share, Table

_Db = Annotated[float, Field(ge=-200, le=200)]
_AboveZero = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]


class FleetConfig(Table):
    """What the devices are: their computers, their batteries, when they are there, how they move."""

    profiles: Literal["none", "lognormal", "phones", "edge", "mixed"]
    """The devices: ``none`` is no fleet (no radio, no clock, a cohort by plain draw); ``lognormal`` draws
    throughputs around ``fleet.gflops``; the others mix real device profiles (Raspberry Pi to AGX Orin)."""
    gflops: _AboveZero
    """Median training throughput of ``lognormal`` devices [GFLOP/s]."""
    spread: _NotNegative
    """Standard deviation of ln(throughput): over all ``lognormal`` devices, or within a profile."""
    jitter: _NotNegative
    """Standard deviation of ln(throughput) from round to round (heat, other work)."""
    capacity: str
    """Absolute path of a FedScale device-capacity file, whose devices are dealt to ours; empty: none."""
    behaviour: str
    """Absolute path of a FedScale behaviour file: when devices are there; empty: the model below."""
    speeds: str
    """Absolute path of a FLASH speed file: links by WiFi, as measured, instead of the radio; empty: none."""
    on_share: Annotated[float, Field(gt=0, le=1)]
    """Mean share of the devices that can be reached (idle, charging, unmetered); 1 is always all."""
    on_minutes: _AboveZero
    """Median time that a device stays reachable [min]."""
    diurnal: Share
    """Amplitude A of the day: P(on | hour h) = on-share (1 + A cos(2 pi (h - 3) / 24)), capped at 1."""
    moving: Share
    """Share of the devices that move: three quarters of them walk (3 km/h), a quarter drives (30 km/h)."""
    flops_per_sample: _NotNegative
    """Device work for one training sample [FLOP]; 0 is the task's own ``cost()``."""
    update_mb: _NotNegative
    """Payload of one upload and one download [MB]; 0 is what the messages really carry."""
    server_gflops: _AboveZero
    """Throughput of the edge server that runs the backbone of a split [GFLOP/s]."""
    battery_floor: Share
    """State of charge below which a device that does not charge takes no part."""


class WirelessConfig(Table):
    """The radio: TR 38.901 large scale, fading, rates, losses, and how the band is shared."""

    scenario: Literal["uma", "umi", "rma", "indoor"]
    """TR 38.901 scenario of every cell."""
    carrier_ghz: Annotated[float, Field(ge=0.5, le=100)]
    """Carrier frequency [GHz]."""
    band_mhz: _AboveZero
    """Band of the federation's slice, each way [MHz]."""
    radius_m: Annotated[float, Field(ge=10, le=10000)]
    """Radius of the disc, around a base station, in which devices live [m]."""
    cells: Literal[1, 7, 19]
    """Base stations; with more than one, devices join the strongest, and the others interfere."""
    indoor_share: Share
    """Share of the devices that are inside a building (O2I penetration loss)."""
    penetration: Literal["low", "high"]
    """TR 38.901 building penetration model of those."""
    interference_db: Annotated[float, Field(ge=0, le=40)]
    """Interference over thermal on the uplink [dB] (with ``wireless.cells = 1`` on the downlink too)."""
    tx_power_dbm: _Db
    """Largest transmit power of a device [dBm]."""
    bs_power_dbm: _Db
    """Transmit power of the base station over the band [dBm]."""
    antenna_gain_db: _Db
    """Sum of both ends' antenna gains [dB]."""
    bs_noise_db: Annotated[float, Field(ge=0, le=40)]
    """Noise figure of the base station [dB]."""
    ue_noise_db: Annotated[float, Field(ge=0, le=40)]
    """Noise figure of a device [dB]."""
    power_control: Literal["full", "fractional"]
    """Uplink: every device at its largest power, or min(P_max, P0 + 10 lg M + 0.8 PL) of TS 38.213."""
    fading: Literal["ergodic", "block"]
    """Rayleigh fading: averaged over the upload (longer than the channel's memory), or one draw a round."""
    rate: Literal["shannon", "truncated", "cqi"]
    """Link to rate: 0.75 log2(1 + SNR) up to 5.55 b/s/Hz; TR 36.942's truncated Shannon; TS 38.214's CQI
    table."""
    loss: Literal["none", "rayleigh", "harq"]
    """Lost uploads: none; by a Rayleigh packet error rate; HARQ, which mends all but 0.1 %."""
    transport: Literal["ofdma", "air", "analog"]
    """How updates come in: coded, each on a band of its own; summed over the air (rules that average alone);
    or uncoded, as the numbers that they are, each on a band of its own, with the receiver's noise."""
    air: Literal["least-error", "truncated", "inversion"]
    """Power rule over the air: least mean squared error; inversion with silence in deep fades; inversion."""
    air_threshold: _AboveZero
    """``truncated``: fading, over its mean, below which a device is silent."""
    allocation: Literal["min-max", "equal", "resource-blocks", "min-energy", "hungarian"]
    """How the chosen share the band: all finish together; equally; by whole resource blocks; least energy by
    the deadline; one resource block each by the Hungarian method on packet error."""


class SelectionConfig(Table):
    """Who takes part, and what a round waits for."""

    policy: Annotated[str, Field(min_length=1)]
    """A name in ``strategies/selection`` (`fedlam ls`); ``train.cohort`` devices are wanted."""
    mode: Literal["synchronous", "deadline", "over-selection", "asynchronous"]
    """A round waits for everybody; until ``selection.deadline-s``, with as many local steps as fit; for the
    first of more than wanted; or for nobody (a buffer of ``fedbuff.buffer``, ``train.cohort`` at work)."""
    deadline_s: _AboveZero
    """Longest round [s]: mode ``deadline``, ``fedcs``, and ``min-energy``."""
    over: Annotated[float, Field(ge=1)]
    """Devices asked over devices wanted, in mode ``over-selection``."""
    candidates: Annotated[float, Field(ge=1)]
    """Devices polled over devices wanted, for policies that poll (``fedcs``, ``power-of-choice``), and cut
    by channel first (``update-aware``)."""
    v: _NotNegative
    """Lyapunov's V. ``lyapunov``: how many medians of the reachable devices' times a unit of utility or queue
    is worth; ``fedft``: the objective against the latency queue."""
    eta: _NotNegative
    """``lyapunov``: weight of the participation queues."""
    participation: Share
    """``lyapunov``: guaranteed share of rounds for each device, over that of a uniform draw, K / N."""
    energy_budget_j: _NotNegative
    """``lyapunov``: longest-run average of a device's energy a round [J]; 0 is no budget."""
    latency_budget_s: _NotNegative
    """``fedft``: long-run average of a round's latency [s]; 0 takes ``selection.deadline-s``."""
    penalty: _NotNegative
    """``oort``: exponent alpha of its penalty on slow devices."""
    tiers: Positive
    """``tifl``: tiers of equal size, by latency."""
    rho: Annotated[float, Field(ge=0, le=1)]
    """``importance``: weight of time against variance."""
    memory: Positive
    """Rounds that moving averages remember (``proportional-fair``, ``tifl``)."""
    fairness: _NotNegative
    """``age``: exponent of alpha-fairness; 1 is the logarithm."""
    reprofile: Natural
    """``tifl``: rounds between two profiles of the devices' latencies; 0 is never again."""
