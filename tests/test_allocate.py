"""Sharing the uplink band: exact inverses, optimality against slow references, and laws that must hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from fedlam_app.base.keys import rng
from fedlam_app.tables.wireless import WirelessConfig
from fedlam_app.wireless.allocate import equal, finish_s, link_rate_bps, log_snr, min_max, minimum_band_hz
from fedlam_app.wireless.allocate_energy import min_energy
from fedlam_app.wireless.assign import assign, block_error, limited_power
from fedlam_app.wireless.demand import Demand
from fedlam_app.wireless.errors import WATERFALL
from fedlam_app.wireless.resource_blocks import whole_blocks
from fedlam_app.wireless.shares import ALLOCATORS, allocate

LN2 = math.log(2.0)


@st.composite
def demands(draw: st.DrawFn, most: int = 40) -> Demand:
    """Devices over five decades of gain, three of bits, with and without a cap and fixed times."""
    count, seed = draw(st.integers(1, most)), draw(st.integers(0, 2**31))
    known = rng(seed, "demand")
    return Demand(
        bits=10 ** known.uniform(5, 8, count),
        gain_hz=10 ** known.uniform(4, 9, count),
        fixed_s=known.uniform(0, 10, count) * draw(st.sampled_from((0.0, 1.0, 100.0))),
        band_hz=10 ** draw(st.floats(4, 10)),
        cap=draw(st.sampled_from((math.inf, 1.0, 5.55))),
        power_w=10 ** known.uniform(-2, 0, count),
    )


def solved(d: Demand, band_hz: float | None = None) -> tuple[np.ndarray, float]:
    return min_max(d.bits, d.gain_hz, d.fixed_s, band_hz or d.band_hz, d.cap)


def slow_minimum_band(rate: float, gain: float, cap: float) -> float:
    """The band of a rate, by bisection in its logarithm."""
    low, high = -40.0, 80.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        band = math.exp(middle)
        if band * min(math.log1p(gain / band) / LN2, cap) < rate:
            low = middle
        else:
            high = middle
    return math.exp(high)


def slow_min_max(d: Demand) -> float:
    """The earliest time by which bands of enough rate add up to the band, by bisection on bisections."""
    low = float((d.fixed_s + d.bits * LN2 / d.gain_hz).max())
    high = equal(d.bits, d.gain_hz, d.fixed_s, d.band_hz, d.cap)[1]
    rows = list(zip(d.bits.tolist(), d.gain_hz.tolist(), d.fixed_s.tolist(), d.cap.tolist(), strict=True))
    for _ in range(60):
        middle = 0.5 * (low + high)
        rates = [s / (middle - t0) for s, _, t0, _ in rows]
        can = all(r * LN2 < a for r, (_, a, _, _) in zip(rates, rows, strict=True))
        if (
            can
            and sum(slow_minimum_band(r, a, e) for r, (_, a, _, e) in zip(rates, rows, strict=True))
            <= d.band_hz
        ):
            high = middle
        else:
            low = middle
    return high


def test_the_known_case() -> None:
    arrays = (8e6, [1e6, 5e6, 2e7, 1e8], [1.0, 2.0, 0.5, 4.0], 4e6)
    band, last = min_max(*arrays)
    assert last == pytest.approx(7.382526689, rel=1e-9)
    np.testing.assert_allclose(band, [3159593.965, 393551.422, 168348.845, 278505.767], rtol=1e-8)
    assert equal(*arrays)[1] == pytest.approx(9.0, rel=1e-12)


@given(demands())
def test_all_finish_together_on_the_whole_band_and_never_later_than_by_equal_shares(d: Demand) -> None:
    band, last = solved(d)
    assert (band > 0).all()
    np.testing.assert_allclose(finish_s(d.bits, d.gain_hz, d.fixed_s, band, d.cap), last, rtol=1e-10)
    assert band.sum() == pytest.approx(d.band_hz, rel=1e-10)
    assert last <= equal(d.bits, d.gain_hz, d.fixed_s, d.band_hz, d.cap)[1] * (1 + 1e-14)


@settings(max_examples=25)
@given(demands(most=6))
def test_it_is_the_optimum_that_slow_bisection_finds(d: Demand) -> None:
    assert solved(d)[1] == pytest.approx(slow_min_max(d), rel=1e-9)


@given(demands(), st.floats(1.0, 100.0))
def test_more_band_is_never_later(d: Demand, more: float) -> None:
    assert solved(d, d.band_hz * more)[1] <= solved(d)[1] * (1 + 1e-12)


@given(demands())
def test_the_order_of_devices_does_not_matter(d: Demand) -> None:
    order = rng(len(d), "order").permutation(len(d))
    band, last = solved(d)
    other, again = solved(d.at(order))
    assert again == pytest.approx(last, rel=1e-12)
    np.testing.assert_allclose(other, band[order], rtol=1e-8)


@given(demands(), st.floats(1e-3, 1e3))
def test_units_do_not_matter(d: Demand, c: float) -> None:
    """c times bits and fixed times is c times the time; c times bits, gains and band changes no time."""
    band, last = solved(d)
    slower, later = min_max(c * d.bits, d.gain_hz, c * d.fixed_s, d.band_hz, d.cap)
    assert later == pytest.approx(c * last, rel=1e-11)
    np.testing.assert_allclose(slower, band, rtol=1e-7)
    wider, same = min_max(c * d.bits, c * d.gain_hz, d.fixed_s, c * d.band_hz, d.cap)
    assert same == pytest.approx(last, rel=1e-11)
    np.testing.assert_allclose(wider, c * band, rtol=1e-7)


def test_log_snr_is_exact_from_no_band_to_all() -> None:
    """(e^y - 1) / y - 1 by its series where it would cancel."""
    y = np.geomspace(1e-12, 600.0, 20_001)
    series = y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8))))))
    slack = np.where(y < 0.05, series, np.expm1(y) / y - 1)
    np.testing.assert_allclose(log_snr(slack), y, rtol=5e-14)


@given(st.floats(1e3, 1e10), st.floats(1e-6, 1 - 1e-9), st.sampled_from((math.inf, 0.5, 5.55)))
def test_the_least_band_carries_the_rate_and_no_less_does(gain: float, share: float, cap: float) -> None:
    rate = share * gain / LN2
    band = minimum_band_hz(rate, gain, cap)
    assert link_rate_bps(band, np.float64(gain), cap) == pytest.approx(rate, rel=1e-12)
    assert link_rate_bps(band * (1 - 1e-3), np.float64(gain), cap) < rate
    if share < 0.9:
        assert band == pytest.approx(slow_minimum_band(rate, gain, cap), rel=1e-11)


def test_a_rate_beyond_the_power_needs_more_than_any_band_and_none_needs_none() -> None:
    assert minimum_band_hz([1e6, 1e6, 0.0], [1e6 * LN2, 0.6e6, 1e6]).tolist() == [math.inf, math.inf, 0.0]
    assert minimum_band_hz(np.inf, 1e6) == math.inf
    assert finish_s(1e6, 1e6, 3.0, np.zeros(1)) == math.inf


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"band_hz": 0.0}, "band_hz = 0 must be above 0"),
        ({"gain_hz": [1e6, 0.0]}, "gain_hz = 0 must be above 0"),
        ({"bits": [1e6, -1.0]}, "bits = -1 must be above 0"),
        ({"fixed_s": math.nan}, "fixed_s = nan must be a finite number"),
        ({"bits": [1.0, 2.0, 3.0]}, "bits has shape"),
        ({"gain_hz": []}, "gain_hz is empty"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {"bits": 1e6, "gain_hz": [1e6, 2e6], "fixed_s": 0.0, "band_hz": 1e6}
    with pytest.raises(ValueError, match=sentence):
        min_max(**(arguments | change))  # type: ignore[arg-type]


@given(demands(), st.floats(1.001, 20.0))
def test_least_energy_has_one_price_and_beats_other_bands(d: Demand, patience: float) -> None:
    deadline = solved(d)[1] * patience
    least = min_energy(d.bits, d.gain_hz, d.power_w, d.fixed_s, d.band_hz, deadline, d.cap)
    assert least.band_hz.sum() == pytest.approx(d.band_hz, rel=1e-10)
    assert (least.power_w <= d.power_w * (1 + 1e-9)).all()
    tau, per_watt = deadline - d.fixed_s, d.gain_hz / d.power_w
    gain = d.gain_hz * least.power_w / d.power_w
    np.testing.assert_allclose(finish_s(d.bits, gain, d.fixed_s, least.band_hz), deadline, rtol=1e-9)
    y = d.bits * LN2 / (tau * least.band_hz)
    prices = tau / per_watt * (y * np.exp(y) - np.expm1(y))
    np.testing.assert_allclose(prices[~least.held], least.price_j_hz, rtol=1e-8)
    # Who is held would be worth more than its band's price: less than least is not allowed.
    assert (prices[least.held] <= least.price_j_hz * (1 + 1e-8)).all()
    band = solved(d)[0]
    other = tau * band / per_watt * np.expm1(d.bits * LN2 / (tau * band))
    assert least.energy_j.sum() <= other.sum() * (1 + 1e-9)


def test_least_energy_of_two_devices_is_what_a_search_finds() -> None:
    s, a, p, t0, band, deadline = (
        np.array([3e6, 1e6]),
        np.array([2e6, 9e7]),
        0.2,
        np.array([1.0, 0.0]),
        2e6,
        9.0,
    )

    def spent(first: float) -> float:
        bands = np.array([first, band - first])
        tau = deadline - t0
        return float((tau * bands * p / a * np.expm1(s * LN2 / (bands * tau))).sum())

    found = minimize_scalar(spent, bounds=(1e4, band - 1e4), method="bounded", options={"xatol": 1e-3})
    least = min_energy(s, a, p, t0, band, deadline)
    assert not least.held.any()
    assert least.energy_j.sum() == pytest.approx(found.fun, rel=1e-10)
    assert least.band_hz[0] == pytest.approx(found.x, rel=1e-4)


def test_at_the_earliest_deadline_all_send_at_their_largest_powers() -> None:
    arrays = (8e6, [1e6, 5e6, 2e7], 0.2, 1.0, 4e6)
    band, last = min_max(8e6, [1e6, 5e6, 2e7], 1.0, 4e6)
    least = min_energy(*arrays, last)
    np.testing.assert_allclose(least.power_w, 0.2, rtol=1e-9)
    np.testing.assert_allclose(least.band_hz, band, rtol=1e-9)


def test_a_deadline_that_cannot_be_met_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"cannot be met by 1 of 2 devices at any band \(places 1\)"):
        min_energy(1e6, [1e6, 1e6], 0.2, [1.0, 5.0], 1e6, 5.0)
    with pytest.raises(ValueError, match="at the largest powers, and band_hz is 1e"):
        min_energy(8e6, [1e7, 1e7], 0.2, 0.0, 1e6, 2.0)


def test_whole_blocks_are_the_optimum_of_all_ways_to_give_them() -> None:
    block = 180e3
    for trial in range(60):
        known = rng(trial, "blocks")
        count = int(known.integers(1, 5))
        blocks = int(known.integers(count, count + 6))
        s, a, t0 = (
            10 ** known.uniform(5, 7, count),
            10 ** known.uniform(4, 8, count),
            known.uniform(0, 3, count),
        )
        found = whole_blocks(s, a, t0, blocks * block, block, 5.0)
        ways = (way for way in itertools.product(range(1, blocks + 1), repeat=count) if sum(way) == blocks)
        best = min(finish_s(s, a, t0, np.array(way) * block, 5.0).max() for way in ways)
        assert found.count.sum() == blocks
        assert found.time_s.max() == pytest.approx(best, rel=1e-12)


@given(demands(), st.integers(0, 500))
def test_whole_blocks_cost_no_more_than_a_block_of_the_smallest_band(d: Demand, spare: int) -> None:
    block = 180e3
    total = (len(d) + spare) * block
    found = whole_blocks(d.bits, d.gain_hz, d.fixed_s, total, block, d.cap)
    assert found.count.sum() * block <= total * (1 + 1e-12)
    assert found.count.min() >= 1
    assert found.gap >= -1e-12
    smallest = solved(d, total)[0].min()
    if smallest > block:
        assert found.gap <= 1 / (1 - block / smallest) - 1 + 1e-12


def test_with_fewer_blocks_than_devices_the_last_get_none() -> None:
    found = whole_blocks(1e6, [1e6, 1e7, 1e8], 0.0, 2.5 * 180e3, 180e3)
    assert found.count.tolist() == [1, 1, 0]
    assert found.time_s[2] == math.inf
    assert found.gap == math.inf
    with pytest.raises(ValueError, match="holds no block"):
        whole_blocks(1e6, 1e6, 0.0, 1e5, 180e3)


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1, 1.0, 20.0])
def test_the_packet_error_rate_is_the_mean_over_rayleigh_fading(ratio: float) -> None:
    wanted, _ = quad(lambda h: -math.expm1(-ratio / h) * math.exp(-h), 0, math.inf, epsabs=1e-13, limit=500)
    block = 180e3
    assert block_error(WATERFALL * block / ratio, block) == pytest.approx(wanted, abs=1e-9)
    assert block_error(WATERFALL * block * 3 / ratio, block, interference=2.0) == pytest.approx(
        wanted, abs=1e-9
    )


def test_no_link_loses_every_packet_and_a_perfect_one_none() -> None:
    assert block_error([0.0, 1e300], 180e3).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)


@given(st.floats(1e5, 1e9), st.floats(1e-6, 1.0), st.sampled_from((math.inf, 1.0)))
def test_a_limited_power_spends_the_limit_or_is_the_largest(gain: float, limit: float, cap: float) -> None:
    s, most, band = 1e6, 0.2, 180e3
    power = float(limited_power(s, gain, most, limit, band, cap))
    if power == 0.0:
        assert s * LN2 * most / gain >= limit * (1 - 1e-12)  # what it costs over an infinite band
        return
    spent = power * s / link_rate_bps(np.float64(band), np.float64(gain * power / most), cap)
    assert spent <= limit * (1 + 1e-9)
    assert power == most or spent == pytest.approx(limit, rel=1e-9)


def test_the_assignment_is_the_best_of_all() -> None:
    for trial in range(20):
        known = rng(trial, "assign")
        devices, blocks = 4, 3
        n, q = known.integers(1, 100, devices), known.random((devices, blocks))
        may = known.random((devices, blocks)) < 0.7
        found = assign(n, q, may)
        taken = found[found >= 0]
        assert len(set(taken.tolist())) == len(taken)
        assert all(may[device, block] for device, block in enumerate(found) if block >= 0)
        value = sum(n[device] * (1 - q[device, block]) for device, block in enumerate(found) if block >= 0)
        best = max(
            sum(n[who] * (1 - q[who, block]) * may[who, block] for block, who in enumerate(way))
            for way in itertools.permutations(range(devices), blocks)
        )
        assert value == pytest.approx(best, rel=1e-12)
    with pytest.raises(ValueError, match=r"must be \(devices, blocks\)"):
        assign(1.0, np.zeros((2, 3)), np.ones((3, 2)))


def test_every_allocation_of_the_configuration_has_its_allocator() -> None:
    assert set(ALLOCATORS) == set(get_args(WirelessConfig.model_fields["allocation"].annotation))


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_keeps_to_the_band_and_leaves_out_who_has_no_link(name: str) -> None:
    known = rng(9, "shares")
    gain = 10 ** known.uniform(5, 9, 12)
    gain[[2, 7]] = 0.0
    demand = Demand(
        bits=1e5, gain_hz=gain, band_hz=1.8e6, fixed_s=1.0, cap=5.55, power_w=0.2, deadline_s=60.0
    )
    share = allocate(name, demand)
    assert share.band_hz.sum() <= demand.band_hz * (1 + 1e-10)
    for array, nothing in ((share.band_hz, 0.0), (share.time_s, math.inf), (share.power_w, 0.0)):
        assert array[[2, 7]].tolist() == [nothing, nothing]
    got = share.band_hz > 0
    assert got.sum() == 10
    assert (share.power_w <= 0.2 * (1 + 1e-9)).all()
    at_power = gain[got] * share.power_w[got] / 0.2
    np.testing.assert_allclose(
        finish_s(demand.bits[got], at_power, 1.0, share.band_hz[got], demand.cap[got]),
        share.time_s[got],
        rtol=1e-9,
    )


def test_hungarian_serves_those_who_matter_most_within_the_limits() -> None:
    demand = Demand(
        bits=1e5,
        gain_hz=[1e7] * 4,
        band_hz=370e3,
        examples=[5, 50, 500, 20],
        fixed_s=[0, 0, 1e4, 0],
        deadline_s=30.0,
    )
    assert (allocate("hungarian", demand).band_hz > 0).tolist() == [False, True, False, True]


def test_least_energy_falls_back_on_the_earliest_finish_and_nobody_is_no_demand() -> None:
    demand = Demand(bits=8e6, gain_hz=[1e6, 5e6], band_hz=1e6, deadline_s=1.0)
    np.testing.assert_array_equal(allocate("min-energy", demand).time_s, allocate("min-max", demand).time_s)
    patient = allocate("min-energy", replace(demand, deadline_s=60.0))
    assert (patient.time_s > 59.99).all() and (patient.time_s.astype(np.float32) < 60.0).all()
    assert len(allocate("equal", Demand(bits=1.0, gain_hz=[], band_hz=1e6)).band_hz) == 0
    with pytest.raises(ValueError, match="unknown allocator 'min-mex'; did you mean 'min-max'"):
        allocate("min-mex", demand)
    with pytest.raises(ValueError, match="deadline_s = 0 must be above 0"):
        Demand(bits=1.0, gain_hz=[1.0], band_hz=1e6, deadline_s=0.0)
