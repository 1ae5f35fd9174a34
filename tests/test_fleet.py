"""The fleet: laws of its devices, sessions, batteries, ways and links; exact resumption; files it reads."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest, spearmanr

from fedlam_app.base.keys import rng
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.wireless.availability import Diurnal, Sessions
from fedlam_app.wireless.battery import Batteries
from fedlam_app.wireless.compute import TRAINED_BYTES, compute_s, feasible_cut, feasible_rank
from fedlam_app.wireless.fleet import Fleet, Load, View
from fedlam_app.wireless.geometry import drop_m, sites_m
from fedlam_app.wireless.measured import MeasuredLinks, Recorded
from fedlam_app.wireless.mobility import Movers, reflected
from fedlam_app.wireless.profiles import CORRELATION, PROFILES, draw_devices
from fedlam_app.wireless.radio import Radio
from fedlam_app.wireless.traces import deal, read_behaviour, read_capacity, read_speeds

LOAD = Load(flops=128 * 0.9e9, bits_up=1.6e6 * 8, bits_down=1.6e6 * 8)
GB = 1e9


def config(**keys: Scalar) -> RunConfig:
    flat: dict[str, Scalar] = {"fleet.profiles": "lognormal"}
    return parse(
        {"job": "train"}
        | flat
        | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    )


def fleet(devices: int = 2000, seed: int = 7, /, **keys: Scalar) -> Fleet:
    run = config(**keys)
    return Fleet(run.fleet, run.wireless, devices, seed, np.ones(devices))


def behaviour_file(folder: Path) -> str:
    path = folder / "behaviour.json"
    traces = {
        "1": {"active": [0, 500, 900], "inactive": [200, 700, 1000], "finish_time": 1000, "model": "a"},
        "2": {"active": [300], "inactive": [450.5], "finish_time": 700, "model": "b"},
        "3": {"active": [], "inactive": [], "finish_time": 100, "model": "c"},
        "4": {"active": [10, 20, 40], "inactive": [20, 30, 40], "finish_time": 50, "model": "d"},
    }
    path.write_text(json.dumps(traces))
    return str(path)


def speed_file(folder: Path) -> str:
    path = folder / "speeds.json"
    users = {
        "a": {"down_u": 5000.0, "down_sigma": 2000.0, "up_u": 3000.0, "up_sigma": 1200.0},
        "b": {"down_u": 900.0, "down_sigma": 0.0, "up_u": 400.0, "up_sigma": 0.0},
    }
    path.write_text(json.dumps(users))
    return str(path)


def capacity_file(folder: Path) -> str:
    path = folder / "capacity.pkl"
    devices = {
        1: {"computation": 20.0, "communication": 8000},
        2: {"computation": 80.0, "communication": 500},
    }
    path.write_bytes(pickle.dumps(devices))
    return str(path)


# --- devices ------------------------------------------------------------------------------------------------


def test_throughputs_are_lognormal_around_their_median() -> None:
    run = config(fleet__gflops=6.0, fleet__spread=1.0)
    logs = np.log(draw_devices(run.fleet, 40_000, rng(1)).throughput.astype(np.float64))
    assert abs(np.median(logs) - np.log(6e9)) < 4 * 1.2533 / 200
    assert abs(logs.std() - 1.0) < 4 / np.sqrt(2 * 40_000)
    assert kstest((logs - np.log(6e9)), "norm").pvalue > 1e-3


def test_power_memory_and_bandwidth_rise_together() -> None:
    devices = draw_devices(config(fleet__spread=0.5).fleet, 40_000, rng(2))
    logs = np.log(np.stack([devices.throughput, devices.memory]).astype(np.float64))
    assert abs(np.corrcoef(logs)[0, 1] - CORRELATION[0, 2]) < 0.02
    # Spearman's rho of a Gaussian copula is 6 / pi asin(r / 2); RAM comes in few sizes, which takes some off.
    whole = 6 / np.pi * np.arcsin(CORRELATION[0, 1] / 2)
    assert whole - 0.06 < spearmanr(devices.throughput, devices.ram).statistic < whole


@pytest.mark.parametrize("mix", ["phones", "edge", "mixed"])
def test_a_mix_holds_real_devices_in_their_shares(mix: str) -> None:
    devices = draw_devices(config(fleet__profiles=mix).fleet, 20_000, rng(3))
    for place, profile in enumerate(PROFILES):
        mine = devices.kind == place
        if mine.any():
            rate = np.median(devices.throughput[mine]) / (profile.gflops * profile.efficiency * GB)
            assert abs(np.log(rate)) < 4 * 0.25 * 1.2533 / np.sqrt(mine.sum())
            assert set(np.unique(devices.ram[mine])) <= {np.float32(size * GB) for size in profile.ram_gb}
            assert (np.isinf(devices.capacity_j[mine]) == (profile.battery_mah == 0)).all()
    assert (mix == "phones") == np.isfinite(devices.capacity_j).all()


def test_no_fleet_is_no_fleet() -> None:
    with pytest.raises(ValueError, match="'none' has no devices"):
        fleet(fleet__profiles="none")


# --- work and memory ----------------------------------------------------------------------------------------


def test_the_roofline_has_two_sides() -> None:
    times = compute_s(2e9, 8e9, np.array([1e9, 1e9]), np.array([1e9, 1e12]))
    np.testing.assert_allclose(times, [8.1, 2.1])


@given(
    ram=st.lists(st.floats(0.1, 64), min_size=2, max_size=8),
    params=st.floats(0, 1e10),
    rank=st.floats(1e3, 1e8),
    activations=st.floats(0, 1e10),
)
def test_the_memory_gate_gives_the_largest_rank_that_fits(
    ram: list[float], params: float, rank: float, activations: float
) -> None:
    sizes = np.sort(np.array(ram, np.float32)) * np.float32(GB)

    def ranks(params: float) -> NDArray[np.int32]:
        return feasible_rank(
            sizes, params=params, param_bytes=2, params_per_rank=rank, activation_bytes=activations, most=64
        )

    found = ranks(params)
    assert (np.diff(found) >= 0).all() and (ranks(params * 1.5 + 1e6) <= found).all()
    half = sizes.astype(np.float64) / 2
    used = params * 2 + activations + found * rank * TRAINED_BYTES
    assert (used[found >= 0] <= half[found >= 0] * (1 + 1e-12)).all()
    more = params * 2 + activations + (found + 1) * rank * TRAINED_BYTES
    assert (more[found < 64] > half[found < 64] * (1 - 1e-12)).all()


def test_a_larger_device_holds_a_deeper_cut() -> None:
    cut = feasible_cut(
        np.array([0.1, 1, 2, 8], np.float32) * np.float32(GB),
        params=5e7,
        params_per_block=1e8,
        trained_per_block=1e6,
        param_bytes=2,
        activation_bytes_per_block=4e7,
        blocks=12,
    )
    assert cut.tolist() == [-1, 1, 3, 12]
    with pytest.raises(ValueError, match="params = -1 must not be negative"):
        feasible_rank(
            np.ones(1, np.float32), params=-1, param_bytes=2, params_per_rank=1, activation_bytes=0, most=1
        )


def test_scenario_s1_computes_for_nineteen_seconds() -> None:
    view = fleet(20_000, fleet__spread=1.0, fleet__diurnal=0.0, wireless__interference_db=0.0).look(
        1, 20, LOAD
    )
    assert abs(np.median(view.compute_s) - 19.3) < 0.8


def test_scenario_s1_has_the_snr_of_the_reference() -> None:
    """Within 1 dB of 6, 20 and 52 dB over 1 MHz, as measured over 200,000 drops."""
    world = fleet(
        100_000,
        fleet__on_share=1.0,
        fleet__moving=0.0,
        fleet__battery_floor=0.0,
        wireless__interference_db=0.0,
    )
    view = world.look(1, 1000, LOAD)  # over 20 kHz nobody is in outage
    snr = np.percentile(10 * np.log10(view.gain_hz / 1e6), [5, 50, 95])
    np.testing.assert_allclose(snr, [6, 20, 52], atol=1.0)


# --- sessions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [2.0, 15.0, 60.0])
def test_the_share_that_is_on_follows_the_hour(minutes: float) -> None:
    """P(on | local hour) from the first second on, over steps of any length: within 4.5 sigma."""
    devices = 40_000
    zone = np.repeat(np.array([0, 6, 12, 18], np.uint8), devices // 4)
    run = config(fleet__on_share=0.3, fleet__diurnal=0.6, fleet__on_minutes=minutes)
    draw = rng(5, "on", int(minutes))
    sessions = Sessions(Diurnal(run.fleet, zone), draw)
    for at_h in (0.0, 0.1, 0.5, 3.0, 4.0, 9.0, 11.0, 30.0, 31.0, 40.0):
        sessions.advance(at_h * 3600.0, draw)
        for hour in (0, 6, 12, 18):
            wanted = 0.3 * (1 + 0.6 * np.cos(2 * np.pi * (at_h + hour - 3) / 24))
            found = sessions.on[zone == hour].mean()
            assert abs(found - wanted) < 4.5 * np.sqrt(wanted * (1 - wanted) / (devices // 4)), (at_h, hour)


def test_sessions_too_long_for_the_day_weaken_its_swing_and_keep_its_mean() -> None:
    zone = np.repeat(np.array([0, 6, 12, 18], np.uint8), 5000)
    law = Diurnal(config(fleet__on_share=0.3, fleet__diurnal=1.0, fleet__on_minutes=600.0).fleet, zone)
    assert abs(law.share[1:].mean() - 0.3) < 1e-9 and 0.1 < np.ptp(law.share) < 0.5
    draw = rng(14)
    sessions = Sessions(law, draw)
    for at_h in (0.0, 7.0, 30.0):
        sessions.advance(at_h * 3600.0, draw)
        for hour in (0, 6, 12, 18):
            wanted = np.interp((at_h + hour) % 24.0, law.hours, law.share)
            assert abs(sessions.on[zone == hour].mean() - wanted) < 4.5 * np.sqrt(0.25 / 5000)


def test_sessions_are_lognormal() -> None:
    draw = rng(6)
    law = Diurnal(config(fleet__on_minutes=15.0).fleet, np.zeros(20_000, np.uint8))
    stay = law.until(np.arange(20_000), np.ones(20_000, np.bool_), np.zeros(20_000), draw)
    assert kstest(np.log(stay / 900.0) / 1.2, "norm").pvalue > 1e-3


@pytest.mark.parametrize("after_s", [1.0, 60.0, 3600.0])
def test_the_rest_of_a_session_is_known(after_s: float) -> None:
    world = fleet(5000, fleet__moving=0.0, fleet__battery_floor=0.0)
    world.advance(1234.5)
    view = world.look(1, 20, LOAD)
    until = world.sessions.until_s[view.ids].copy()
    np.testing.assert_allclose(view.session_s, until - 1234.5, rtol=1e-6)
    world.advance(1234.5 + after_s)
    stays = until > world.now_s
    assert world.sessions.on[view.ids[stays]].all()
    np.testing.assert_array_equal(world.sessions.until_s[view.ids[stays]], until[stays])
    assert (world.sessions.until_s[view.ids[~stays]] > world.now_s).all() and (~stays).any()


def test_who_is_always_on_never_leaves() -> None:
    world = fleet(200, fleet__on_share=1.0, fleet__battery_floor=0.0)
    world.advance(1e6)
    assert np.isinf(world.look(1, 20, LOAD).session_s).all() and world.sessions.on.all()


# --- batteries ----------------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.tuples(st.floats(0, 2e5), st.floats(0, 1e5)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_a_battery_is_never_negative_and_never_over_full(steps: list[tuple[float, float]], seed: int) -> None:
    capacity = np.array([100.0, 7e4, np.inf], np.float32)
    batteries, now = Batteries(capacity, np.array([0, 6, 12], np.uint8), rng(seed)), 0.0
    for dt_s, energy in steps:
        batteries.advance(now, now + dt_s)
        batteries.spend(np.array([0, 1, 2]), np.full(3, energy))
        now += dt_s
        assert (batteries.level >= 0).all() and (batteries.level <= 1).all()
    assert batteries.level[2] == 1.0 and batteries.ready(now, 1.0)[2]


def test_batteries_idle_by_day_and_charge_by_night() -> None:
    batteries = Batteries(np.full(4000, 7e4, np.float32), np.zeros(4000, np.uint8), rng(8))
    batteries.advance(0.0, 11 * 3600.0)  # past everybody's night
    morning = batteries.level.copy()
    batteries.advance(11 * 3600.0, 15 * 3600.0)
    idle = ~batteries.charging(15 * 3600.0)
    np.testing.assert_allclose(batteries.level[idle], morning[idle] - 0.04, atol=1e-4)
    assert idle.mean() > 0.99
    batteries.advance(15 * 3600.0, 27 * 3600.0)
    assert (batteries.level > 0.9).mean() > 0.95


def test_whoever_is_empty_takes_part_only_while_it_charges() -> None:
    world = fleet(3000, fleet__on_share=1.0, fleet__battery_floor=0.2)
    everybody = np.arange(3000)
    world.spend(everybody, np.full(3000, 1e6))
    assert (world.batteries.level == 0).all()
    charging = np.flatnonzero(world.batteries.charging(0.0))
    view = world.look(1, 2000, LOAD)
    assert 0 < len(view.ids) <= len(charging) and np.isin(view.ids, charging).all()


# --- ways ---------------------------------------------------------------------------------------------------


def test_devices_stay_in_their_disc_and_fill_it_evenly() -> None:
    draw = rng(9)
    x, y = drop_m(8000, 289.0, draw)
    movers = Movers(draw.permutation(8000), x, y, 289.0)
    movers.begin(draw)
    for dt_s in [5.0, 20.0, 130.0] * 20 + [1e4, 20.0]:
        for part, speed in movers.blocks():
            movers.move(part, speed, dt_s, draw)
        assert (movers.x**2 + movers.y**2 <= 289.0**2).all()
    for part in (slice(0, movers.walkers), slice(movers.walkers, None)):
        area = (movers.x[part] ** 2 + movers.y[part] ** 2).astype(np.float64) / 289.0**2
        assert kstest(area, "uniform").pvalue > 1e-3
    speeds = np.hypot(movers.vx, movers.vy)
    np.testing.assert_allclose(speeds[: movers.walkers], 0.83, rtol=1e-4)
    np.testing.assert_allclose(speeds[movers.walkers :], 8.3, rtol=1e-4)


@given(st.floats(0, 0.999), st.floats(0, 6.28), st.floats(0, 6.28), st.floats(0.05, 0.99))
def test_reflection_keeps_speed_and_disc(reach: float, at: float, towards: float, way: float) -> None:
    x, y = np.array([reach * np.cos(at)]), np.array([reach * np.sin(at)])
    vx, vy = np.array([way * np.cos(towards)]), np.array([way * np.sin(towards)])
    if (x + vx) ** 2 + (y + vy) ** 2 > 1.0:
        px, py, ux, uy = reflected(x + vx, y + vy, vx, vy, 1.0)
        assert np.hypot(px, py) <= 1.0 and np.isclose(np.hypot(ux, uy), way, rtol=1e-5)
        # The distance of a straight way from the middle is what a round wall keeps.
        np.testing.assert_allclose(np.abs(px * uy - py * ux), np.abs(x * vy - y * vx), atol=1e-4)


@pytest.mark.parametrize(("cells", "ring"), [(1, 0), (7, 6), (19, 6)])
def test_sites_stand_on_a_hexagonal_grid(cells: int, ring: int) -> None:
    sites = sites_m(cells, 289.0)
    assert sites.shape == (cells, 2) and not sites[0].any()
    apart = np.linalg.norm(sites[:, None] - sites[None], axis=2)
    assert (np.isclose(apart[0], 289.0 * np.sqrt(3.0), rtol=1e-5)).sum() == ring
    assert cells == 1 or np.isclose(apart[apart > 0].min(), 289.0 * np.sqrt(3.0), rtol=1e-5)


# --- links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dt_s", [0.5, 20.0, 1e5])
def test_shadowing_keeps_its_variance(dt_s: float) -> None:
    run = config()
    draw = rng(10)
    radio = Radio(run.wireless, 12_000, 1.0, draw)
    for _ in range(40):
        radio.advance(dt_s, draw)
    assert abs(radio.shadow.std() - 1.0) < 0.03 and abs(radio.shadow.mean()) < 0.04


def test_who_stands_keeps_its_loss_and_who_moves_does_not() -> None:
    world = fleet(3000)
    assert isinstance(world.links, Radio)
    before, places = world.links.loss_db.copy(), world.links.positions_m()
    world.advance(60.0)
    moves = np.zeros(3000, np.bool_)
    moves[world.links.movers.ids] = True
    assert moves.sum() == 1200
    np.testing.assert_array_equal(world.links.loss_db[~moves], before[~moves])
    assert (world.links.loss_db[moves] != before[moves]).all()
    gone = np.linalg.norm(world.links.positions_m() - places, axis=1)
    assert (gone[~moves] == 0).all() and (gone[moves] > 0).all()
    assert (gone[world.links.movers.ids[:900]] <= 0.83 * 60 + 0.1).all() and gone.max() <= 8.3 * 60 + 0.1


def test_the_link_budget() -> None:
    """23 dBm less the loss over -174 dBm/Hz + 5 + 3 dB up; 46 dBm over 20 MHz against -174 + 9 + 3 down."""
    world = fleet(2000, fleet__on_share=1.0, fleet__battery_floor=0.0, wireless__interference_db=3.0)
    assert isinstance(world.links, Radio)
    view = world.look(1, 20, LOAD)
    loss = world.links.loss_db[view.ids].astype(np.float64)
    np.testing.assert_allclose(10 * np.log10(view.gain_hz), 23 - loss + 174 - 8, atol=1e-3)
    np.testing.assert_allclose(view.power_w, 10 ** (-0.7), rtol=1e-5)
    snr = 10 ** ((46 - loss + 174 - 12) / 10) / 20e6
    rate = 1e6 * np.minimum(0.75 * np.log2(1 + np.exp(-np.euler_gamma) * snr), 5.55)
    np.testing.assert_allclose(view.down_s, 1.6e6 * 8 / rate, rtol=1e-3)
    np.testing.assert_allclose(view.compute_j, view.compute_s * 3.0, rtol=1e-5)
    every = np.sort(view.ids)
    np.testing.assert_array_equal(view.ids, every)
    out = np.setdiff1d(np.arange(2000), every)
    assert len(out) and (10 * np.log10(1e6) - 6.7 > 23 - world.links.loss_db[out] + 174 - 8).all()


def test_a_broadcast_uses_the_whole_band() -> None:
    unicast = fleet().look(1, 20, LOAD)
    broadcast = fleet().look(1, 20, Load(flops=1.0, bits_up=1.0, bits_down=LOAD.bits_down, broadcast=True))
    np.testing.assert_array_equal(unicast.ids, broadcast.ids)
    np.testing.assert_allclose(unicast.down_s, broadcast.down_s * 20, rtol=1e-4)


def test_other_cells_interfere_and_may_be_nearer() -> None:
    run = config(wireless__cells=7, fleet__moving=0.5, wireless__indoor_share=0.3)
    alone = config(wireless__cells=1, fleet__moving=0.5, wireless__indoor_share=0.3)
    draw = rng(11)
    many, one = Radio(run.wireless, 4000, 0.5, draw), Radio(alone.wireless, 4000, 0.5, draw)
    many.advance(20.0, draw)
    assert np.median(many.loss_db) < np.median(one.loss_db) - 1.0
    own = 10 ** (-many.loss_db.astype(np.float64) / 10)
    assert (many.others > 0).all() and (many.others <= own * 6 * (1 + 1e-5)).all()
    ids = np.arange(4000)
    _, with_others, _ = many.look(ids, 1e6, 1e6, draw)
    many.others[:] = 0
    _, without, _ = many.look(ids, 1e6, 1e6, draw)
    assert (with_others <= without * (1 + 1e-6)).all() and np.median(with_others) < 0.8 * np.median(without)


def test_block_fading_is_one_draw_a_round_for_both_ways() -> None:
    keys: dict[str, Scalar] = {
        "fleet__on_share": 1.0,
        "fleet__battery_floor": 0.0,
        "wireless__band_mhz": 0.02,
    }
    mean = fleet(4000, **keys).look(1, 1, LOAD)
    faded = fleet(4000, **keys, wireless__fading="block").look(1, 1, LOAD)
    ids = np.intersect1d(mean.ids, faded.ids)
    ratio = faded.gain_hz[np.isin(faded.ids, ids)] / mean.gain_hz[np.isin(mean.ids, ids)]
    assert len(ids) > 3900 and kstest(ratio, "expon").pvalue > 1e-3


def test_power_control_lowers_the_power_of_the_near() -> None:
    near = fleet(4000, wireless__power_control="fractional").look(1, 20, LOAD)
    far = near.gain_hz < np.percentile(near.gain_hz, 20)
    assert near.power_w.max() <= 10 ** (-0.7) * (1 + 1e-5)
    assert near.power_w[~far].mean() < 0.5 * near.power_w[far].mean()


# --- the whole ----------------------------------------------------------------------------------------------


def same(first: View, second: View) -> bool:
    names = [field.name for field in fields(View)]
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def worlds(folder: Path) -> dict[str, dict[str, Scalar]]:
    return {
        "default": {"fleet__profiles": "mixed"},
        "cells": {"wireless__cells": 7, "wireless__fading": "block", "wireless__indoor_share": 0.5},
        "files": {
            "fleet__behaviour": behaviour_file(folder),
            "fleet__speeds": speed_file(folder),
            "fleet__capacity": capacity_file(folder),
        },
    }


@pytest.mark.parametrize("kind", ["default", "cells", "files"])
def test_a_resumed_fleet_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    keys = worlds(tmp_path)[kind]
    whole, first = fleet(**keys), fleet(**keys)
    for number in range(1, 5):
        whole.advance(200.0 * number)
        first.advance(200.0 * number)
        view = first.look(number, 20, LOAD)
        assert same(view, whole.look(number, 20, LOAD)), "two fleets of one seed"
        for world in (whole, first):
            world.spend(view.ids, np.full(len(view.ids), 30.0))
    saved = first.state()
    first.advance(5000.0)  # what was saved must not follow
    resumed = fleet(**keys)
    resumed.load(saved)
    for number in range(5, 8):
        whole.advance(200.0 * number)
        resumed.advance(200.0 * number)
        assert same(whole.look(number, 20, LOAD), resumed.look(number, 20, LOAD))
    assert all(np.array_equal(array, whole.state()[name]) for name, array in resumed.state().items())


def test_another_seed_is_another_fleet_and_another_round_another_jitter() -> None:
    world, other = fleet(), fleet(2000, 8)
    first = world.look(1, 20, LOAD)
    assert not same(first, other.look(1, 20, LOAD)) and same(first, world.look(1, 20, LOAD))
    second = world.look(2, 20, LOAD)
    assert np.array_equal(first.gain_hz, second.gain_hz) and (first.compute_s != second.compute_s).all()


def test_a_load_may_differ_from_device_to_device() -> None:
    flops = np.arange(1, 2001) * 1e9
    view = fleet(fleet__jitter=0.0).look(1, 20, Load(flops=flops, bits_up=1.0, bits_down=1.0))
    even = fleet(fleet__jitter=0.0).look(1, 20, Load(flops=1e9, bits_up=1.0, bits_down=1.0))
    np.testing.assert_allclose(view.compute_s - 0.1, (even.compute_s - 0.1) * (view.ids + 1), rtol=1e-3)
    places = np.array([3, 1])
    assert view.at(places).ids.tolist() == view.ids[places].tolist()


@pytest.mark.parametrize("cells", [1, 7, 19])
def test_a_device_takes_at_most_200_bytes(cells: int) -> None:
    assert 40 < fleet(5000, wireless__cells=cells).nbytes / 5000 <= 200


def test_time_does_not_run_backwards() -> None:
    world = fleet(50)
    world.advance(10.0)
    world.advance(10.0)
    with pytest.raises(ValueError, match=r"to_s = 9.0 must be finite, and not before the fleet's 10.0 s"):
        world.advance(9.0)
    run = config()
    with pytest.raises(ValueError, match="examples has shape"):
        Fleet(run.fleet, run.wireless, 50, 1, np.ones(49))


# --- files --------------------------------------------------------------------------------------------------


def test_sessions_on_record_are_those_of_the_file(tmp_path: Path) -> None:
    behaviour = read_behaviour(behaviour_file(tmp_path))
    assert behaviour.edges_s.tolist() == [0, 200, 500, 700, 900, 1000, 300, 450.5, 10, 30]
    law = Recorded(behaviour, deal(40, 4, rng(12)))
    assert np.bincount(law.trace).tolist() == [10] * 4
    sessions = Sessions(law, rng(12))
    spans: dict[int, list[tuple[float, float]]] = {
        0: [(0, 200), (500, 700), (900, 1000)],
        1: [(300, 450.5)],
        2: [],
        3: [(10, 30)],
    }
    for now in [0.0, 1.0, 15.0, 30.0, 299.0, 301.0, 950.0, 1000.0, 1100.0, 7654.25, 1e6 + 17.0]:
        sessions.advance(now, rng(12))
        phase = now % behaviour.finish_s
        wanted = [any(a <= phase[t] < b for a, b in spans[t]) for t in law.trace.tolist()]
        assert sessions.on.tolist() == wanted, now
    assert (sessions.until_s > 1e6 + 17.0).all() and np.isinf(sessions.until_s[law.trace == 2]).all()


def test_measured_rates_replace_the_radio(tmp_path: Path) -> None:
    mean, std = read_speeds(speed_file(tmp_path))
    assert mean.tolist() == [[24e6, 40e6], [3.2e6, 7.2e6]] and std.tolist() == [[9.6e6, 16e6], [0, 0]]
    count = 40_000
    links = MeasuredLinks(np.tile(mean[:1], (count, 1)), np.tile(std[:1], (count, 1)), 0.2)
    gain, down, _ = links.look(np.arange(count), 1e6, 1e6, rng(13))
    up = 1e6 * np.log2(1 + gain.astype(np.float64) / 1e6)
    for found, which in ((up, 0), (down, 1)):
        assert abs(found.mean() / mean[0, which] - 1) < 0.01
        assert abs(found.std() / std[0, which] - 1) < 0.03
    world = fleet(fleet__speeds=speed_file(tmp_path), fleet__on_share=1.0, fleet__battery_floor=0.0)
    view = world.look(1, 20, LOAD)
    assert len(view.ids) == 2000 and np.isinf(world.link.cap) and world.link.efficiency == 1.0
    steady = np.isclose(view.down_s, LOAD.bits_down / 7.2e6, rtol=1e-4)
    assert steady.sum() >= 1000
    rate = 1e6 * np.log2(1 + view.gain_hz[steady] / 1e6)
    assert np.isclose(rate, 3.2e6, rtol=1e-4).sum() >= 1000


def test_a_capacity_file_gives_throughput_and_bandwidth(tmp_path: Path) -> None:
    ms, kbps = read_capacity(capacity_file(tmp_path))
    assert ms.tolist() == [20, 80] and kbps.tolist() == [8000, 500]
    keys: dict[str, Scalar] = {
        "fleet__capacity": capacity_file(tmp_path),
        "fleet__jitter": 0.0,
        "fleet__on_share": 1.0,
        "fleet__battery_floor": 0.0,
    }
    view = fleet(100, **keys, fleet__flops_per_sample=0.9e9).look(1, 20, LOAD)
    times, counts = np.unique(np.round(view.compute_s, 3), return_counts=True)
    np.testing.assert_allclose(times, [3 * 0.02 * 128 + 0.1, 3 * 0.08 * 128 + 0.1], atol=2e-3)
    assert counts.tolist() == [50, 50]
    rates = np.unique(np.round(LOAD.bits_down / view.down_s, -2))
    np.testing.assert_allclose(rates, [5e5, 8e6], rtol=1e-3)
    relative = fleet(100, **keys).devices.throughput
    np.testing.assert_allclose(np.unique(relative), [6e9 * 50 / 80, 6e9 * 50 / 20], rtol=1e-6)


class Hostile:
    """Unpickled by a careless reader, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def test_a_hostile_pickle_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "capacity.pkl", tmp_path / "mark"
    for content in ({"1": Hostile(mark)}, Hostile(mark), {"1": {"computation": np.float64(1.0)}}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(
            ValueError, match=r"fleet\.capacity = .* neither JSON nor a pickle of plain containers"
        ):
            read_capacity(str(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "neither JSON nor a pickle"),
        (b"{", "neither JSON nor a pickle"),
        (b"\x80\x04}q\x00.trailing"[:3], "neither JSON nor a pickle"),
        (b"[1]", "must hold a dictionary of at least one id"),
        (b"{}", "must hold a dictionary of at least one id"),
        (b'{"1": {"computation": 3}}', "'communication' is None"),
        (b'{"1": {"computation": "3", "communication": 1}}', "'computation' is '3'"),
        (b'{"1": {"computation": 0, "communication": 1}}', "the number 0 where it must be above 0"),
        (b'{"1": {"computation": NaN, "communication": 1}}', "'computation' is nan"),
    ],
)
def test_a_bad_capacity_file_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_capacity(str(path))
    with pytest.raises(ValueError, match=r"fleet\.capacity = .* cannot be read"):
        read_capacity(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("trace", "sentence"),
    [
        ({"active": [5], "inactive": [1], "finish_time": 10}, "not in order"),
        ({"active": [5, 1], "inactive": [6, 2], "finish_time": 10}, "not in order"),
        ({"active": [5], "inactive": [], "finish_time": 10}, "not in order"),
        ({"active": [5], "inactive": [11], "finish_time": 10}, "not in order"),
        ({"active": [], "inactive": [], "finish_time": 0}, "not in order"),
        ({"active": 5, "inactive": [6], "finish_time": 10}, "must be a list"),
        ({"active": ["a"], "inactive": [6], "finish_time": 10}, "no number"),
        ({"active": [], "inactive": []}, "'finish_time' is None"),
    ],
)
def test_a_bad_behaviour_file_is_one_sentence(
    trace: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"1": trace}))
    with pytest.raises(ValueError, match=f"fleet.behaviour = .*{sentence}"):
        read_behaviour(str(path))


def test_a_bad_speed_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"a": {"down_u": 1, "down_sigma": -1, "up_u": 1, "up_sigma": 1}}))
    with pytest.raises(ValueError, match=r"fleet\.speeds = .* negative standard deviation"):
        read_speeds(str(path))
