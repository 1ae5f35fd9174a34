"""What a policy is told of the devices, and what becomes of those it chose: bands, times, joules, losses.

    r_k(b) = min(e b log2(1 + f a_k / b), c b)        ``wireless/rates.py``: e, f, c of the rate model
    T_k    = download + computation + server + s_k / r_k(b_k)
    E_k    = P_active t_cmp + (P_tx / eta + P_circuit) t_up

Policies and allocators see gains f a_k and payloads s_k / e, so that for them r(b) = b log2(1 + a / b).

Where a round ends before its slowest device does (a deadline, over-selection), that device's own computation
must not decide how the band is shared: whoever cannot be in time at an equal share is planned for the moment
at which the round will end.

Over the air (``wireless.transport = air``) all send at once, each over the whole band, one entry a symbol:

    T_up = d / B for all,      SNR_k = a_k |h_k|^2 / B a symbol,  |h_k|^2 ~ Exp(1), one draw a round

with a_k the gain without fading. Who is silent (``over_air.heard``) knows it before it starts, and is late.
Departures: energy is charged at the device's power for all of T_up, whatever the power rule makes of it; the
fade of the upload is that at which a device decides to take part.

Uncoded on bands of their own (``analog``), T_up = d_k / b_k at equal bands b_k and SNR_k = a_k |h_k|^2 / b_k:
noise comes with the numbers (``analog.py``), and nobody is silent or lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlam_app.config import RunConfig
from fedlam_app.wireless.air import airtime_s, participation
from fedlam_app.wireless.demand import Demand
from fedlam_app.wireless.errors import packet_error
from fedlam_app.wireless.fading import block_fading
from fedlam_app.wireless.fleet import Fleet, Load, View
from fedlam_app.wireless.power import dbm, noise_dbm_hz, radio_energy_j
from fedlam_app.wireless.power import gain_hz as gain_of
from fedlam_app.wireless.radio import Radio
from fedlam_app.wireless.rates import BLOCK_HZ, Link, rate_bps
from fedlam_app.wireless.shares import allocate
from strategies.endings import Course, Ending
from strategies.history import History
from strategies.over_air import heard
from strategies.selection.base import Floats, RoundState

Doubles = NDArray[np.float64]

ENTRY_BITS = 32.0  # of a payload, which are one symbol over the air


@dataclass(frozen=True, slots=True, kw_only=True)
class Airtime:
    """The k chosen devices on their bands, (k,) each."""

    ids: NDArray[np.int64]
    course: Course
    download_s: Doubles  # of the course's down_s, what the downlink takes
    rate_bps: Doubles  # uplink
    bits_up: Doubles
    bits_down: Doubles
    error: Doubles  # chance that the packet is lost; over the air, that a device is silent
    compute_j: Doubles
    power_w: Doubles  # transmitted
    snr: Doubles = field(default_factory=lambda: np.zeros(0))  # a symbol, faded; of uncoded links alone
    mean_snr: Doubles = field(default_factory=lambda: np.zeros(0))

    def energy_j(self, ending: Ending, steps: int) -> Doubles:
        """Return what each spent until it was done, gone or stopped."""
        sent_s = np.where(np.isfinite(self.course.up_s), self.course.up_s, 0.0)
        whole = self.compute_j * ending.steps / steps + radio_energy_j(self.power_w, sent_s)
        share = ending.worked_s / np.maximum(ending.time_s, 1e-12)
        return np.where(np.isfinite(ending.time_s), whole * np.clip(share, 0.0, 1.0), 0.0)


def known(
    number: int,
    now_s: float,
    wanted: int,
    band_hz: float,
    link: Link,
    view: View,
    load: Load,
    history: History,
    examples: Floats,
    places: int = 0,
) -> RoundState:
    """Return what an edge server knows of the devices in ``view``; ``examples`` is (N,).

    The band is shared by ``places`` devices, or by those that are wanted.
    """
    bits = each(load.bits_up, view.ids) / np.float32(link.efficiency)
    gain = view.gain_hz * np.float32(link.snr_factor)
    share = np.float32(band_hz / max(places or wanted, 1))
    efficiency = np.minimum(np.log2(1.0 + gain / share), np.float32(link.cap / link.efficiency))
    upload_s = bits / (share * efficiency)
    everyone = len(view.ids) == len(examples)
    pick = slice(None) if everyone else view.ids
    return RoundState(
        number=number,
        now_s=now_s,
        devices=len(examples),
        wanted=wanted,
        band_hz=band_hz,
        sharers=places,
        ids=view.ids,
        gain_hz=gain,
        fixed_s=view.down_s + view.compute_s + np.float32(load.server_s),
        upload_s=upload_s,
        bits=bits,
        energy_j=view.compute_j + radio_energy_j(view.power_w, upload_s),
        examples=examples[pick],
        loss=history.loss[pick],
        norm=history.norm[pick],
        last=history.last[pick],
        count=history.count[pick],
    )


def share(
    config: RunConfig,
    fleet: Fleet,
    view: View,
    state: RoundState,
    load: Load,
    ends_s: float,
    draw: np.random.Generator,
    places: int = 0,
) -> Airtime:
    """Share the band among the k devices of ``view`` and ``state``, in a round that ends by ``ends_s``.

    With ``places``, each gets an equal share of that many instead. ``draw`` decides on lost packets and, over
    the air, on fades.
    """
    if config.wireless.transport != "ofdma":
        return _uncoded(config, fleet, view, state, load, draw)
    fixed_s, band_hz, link = state.fixed_s.astype(np.float64), state.band_hz, fleet.link
    if places:
        got_hz = np.full(len(state), band_hz / places)
        power_w = view.power_w.astype(np.float64)
    else:
        given = allocate(
            config.wireless.allocation,
            Demand(
                bits=state.bits.astype(np.float64),
                gain_hz=state.gain_hz.astype(np.float64),
                band_hz=band_hz,
                fixed_s=np.minimum(fixed_s, np.maximum(ends_s - state.upload_s, 0.0)),
                cap=np.full(len(state), link.cap / link.efficiency),
                power_w=view.power_w.astype(np.float64),
                examples=state.examples.astype(np.float64),
                deadline_s=config.selection.deadline_s,
                block_hz=BLOCK_HZ,
            ),
        )
        got_hz, power_w = given.band_hz, given.power_w
    # A radio that whispers below the link's floor is not heard: it speaks up, as far as it can.
    full_hz, full_w = view.gain_hz.astype(np.float64), view.power_w.astype(np.float64)
    heard_hz = np.minimum(link.floor * np.maximum(got_hz, BLOCK_HZ), full_hz)
    gain_hz = np.where(power_w > 0.0, np.maximum(full_hz * power_w / full_w, heard_hz), 0.0)
    power_w = full_w * gain_hz / np.maximum(full_hz, 1e-30)
    # What was planned by is what happens; but modulation comes in steps, which no plan can invert.
    steps = config.wireless.rate == "cqi" and isinstance(fleet.links, Radio)
    law = config.wireless if steps else link
    rate = np.where(got_hz > 0.0, rate_bps(law, gain_hz, np.maximum(got_hz, 1.0)), 0.0)
    bits_up = each(load.bits_up, view.ids).astype(np.float64)
    up_s = np.where(rate > 0.0, bits_up / np.maximum(rate, 1e-9), np.inf)
    error = np.broadcast_to(packet_error(config.wireless, gain_hz, np.maximum(got_hz, 1.0)), rate.shape)
    course = Course(
        down_s=view.down_s.astype(np.float64) + load.server_s,
        compute_s=view.compute_s.astype(np.float64),
        up_s=up_s,
        session_s=view.session_s.astype(np.float64),
        intact=draw.random(len(state)) >= error,
    )
    return Airtime(
        ids=view.ids,
        course=course,
        download_s=view.down_s.astype(np.float64),
        rate_bps=rate,
        bits_up=bits_up,
        bits_down=each(load.bits_down, view.ids).astype(np.float64),
        error=error,
        compute_j=view.compute_j.astype(np.float64),
        power_w=power_w,
    )


def _uncoded(
    config: RunConfig, fleet: Fleet, view: View, state: RoundState, load: Load, draw: np.random.Generator
) -> Airtime:
    """Return what becomes of devices that send numbers as they are, at once or each on its own band."""
    wireless, alone = config.wireless, config.wireless.transport == "analog"
    band_hz = state.band_hz / max(len(state), 1) if alone else state.band_hz
    mean_snr = _unfaded_hz(config, fleet, view) / band_hz
    faded = wireless.fading == "block" and isinstance(fleet.links, Radio)
    snr = view.gain_hz.astype(np.float64) / band_hz
    if not faded:
        snr = mean_snr * block_fading(len(state), draw)
    sends = snr > 0.0 if alone else heard(wireless, snr, mean_snr)
    bits_up = each(load.bits_up, view.ids).astype(np.float64)
    up_s = airtime_s(1, band_hz) * (bits_up if alone else bits_up.max(initial=0.0)) / ENTRY_BITS
    quiet = wireless.air == "truncated" and not alone
    silent = 1.0 - participation(wireless.air_threshold) if quiet else 0.0
    return Airtime(
        ids=view.ids,
        download_s=view.down_s.astype(np.float64),
        course=Course(
            down_s=view.down_s.astype(np.float64) + load.server_s,
            compute_s=view.compute_s.astype(np.float64),
            up_s=np.where(sends, up_s, np.inf),
            session_s=view.session_s.astype(np.float64),
            intact=np.ones(len(state), bool),
        ),
        rate_bps=np.full(len(state), ENTRY_BITS * band_hz),
        bits_up=bits_up,
        bits_down=each(load.bits_down, view.ids).astype(np.float64),
        error=np.full(len(state), silent),
        compute_j=view.compute_j.astype(np.float64),
        power_w=view.power_w.astype(np.float64),
        snr=snr,
        mean_snr=mean_snr,
    )


def _unfaded_hz(config: RunConfig, fleet: Fleet, view: View) -> Doubles:
    """Return gains (k,) without fading: the view's own, unless they have a round's draw in them."""
    wireless = config.wireless
    if wireless.fading == "ergodic" or not isinstance(fleet.links, Radio):
        return view.gain_hz.astype(np.float64)
    noise = noise_dbm_hz(wireless.bs_noise_db, wireless.interference_db)
    return gain_of(dbm(view.power_w), fleet.links.loss_db[view.ids], noise).astype(np.float64)


def ends_by(config: RunConfig, state: RoundState, wanted: int) -> float:
    """Return by when a round with these k devices will have ended, at equal shares; inf: with the slowest."""
    if config.selection.mode == "deadline":
        return config.selection.deadline_s
    if config.selection.mode == "over-selection" and len(state) > wanted:
        return float(np.partition(state.time_s, wanted - 1)[wanted - 1])
    return np.inf


def each(values: float | NDArray[np.floating], ids: NDArray[np.int64]) -> Floats:
    """Return each device's own of what is one number for all, or (N,)."""
    return (
        np.full(len(ids), values, np.float32) if np.ndim(values) == 0 else np.asarray(values, np.float32)[ids]
    )
