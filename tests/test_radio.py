"""The radio: TR 38.901 against its vectors and Sionna's, shadowing, fading, rates, losses and power."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import constants, integrate

from benchmarks.radio import FARTHEST_M, VECTORS, sionna
from fedlam_app.base.keys import rng
from fedlam_app.config import Scalar, parse
from fedlam_app.tables.wireless import WirelessConfig
from fedlam_app.wireless import errors, fading, power, rates, shadowing, tr38901

NAMES = tuple(tr38901.SCENARIOS)
MODELS = ("shannon", "truncated", "cqi")
CARRIER = 3.5  # GHz


def radio(**keys: Scalar) -> WirelessConfig:
    return parse({f"wireless.{key.replace('_', '-')}": value for key, value in keys.items()}).wireless


def mean_over_fading(of: Callable[[float], float]) -> float:
    """Return E of(x) over x ~ Exp(1); in u = ln x, so that what happens at small x is resolved."""

    def inner(u: float) -> float:
        return of(math.exp(u)) * math.exp(u - math.exp(u))

    return float(integrate.quad(inner, -60, 5, limit=400, epsabs=0.0, epsrel=1e-11)[0])


# --- path loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_path_loss_meets_its_vectors(name: str, kind: Any) -> None:
    for distance, los, nlos, probability in VECTORS[name]:
        at: NDArray[Any] = np.array([distance], kind)
        assert tr38901.pathloss_los_db(name, at, CARRIER) == pytest.approx(los, abs=1e-3)
        assert tr38901.pathloss_nlos_db(name, at, CARRIER) == pytest.approx(nlos, abs=1e-3)
        assert tr38901.los_probability(name, at) == pytest.approx(probability, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("carrier", [0.7, 3.5, 28.0])
def test_path_loss_is_sionnas(name: str, carrier: float) -> None:
    """With Sionna's speed of light: with the TR's 3e8 LOS differs by up to 0.006 dB beyond the breakpoint."""
    distance = np.geomspace(10.0, FARTHEST_M[name], 60)
    site = replace(tr38901.SCENARIOS[name], light_m_s=constants.speed_of_light)
    for los in (True, False):
        loss, probability = sionna(name, distance, carrier, los)
        ours = tr38901.pathloss_db(site, distance, carrier, np.full(60, los))
        np.testing.assert_allclose(ours, loss, atol=1e-9)
        np.testing.assert_allclose(tr38901.los_probability(site, distance), probability, atol=1e-12)
        stated = tr38901.pathloss_db(name, distance, carrier, np.full(60, los))
        assert np.abs(stated - loss).max() <= 0.006


@pytest.mark.parametrize("name", NAMES)
def test_types_are_kept(name: str) -> None:
    for kind in (np.float32, np.float64):
        at: NDArray[Any] = np.linspace(1, 400, 50).astype(kind)
        los = at < 100
        found = (
            tr38901.los_probability(name, at),
            tr38901.pathloss_los_db(name, at, CARRIER),
            tr38901.pathloss_nlos_db(name, at, CARRIER),
            tr38901.pathloss_db(name, at, CARRIER, los),
            tr38901.penetration_db(name, "low", CARRIER, at, at),
            power.gain_hz(23.0, at, -169.0),
            power.watts(at),
            power.dbm(at),
            power.radio_energy_j(0.2, at),
            power.transmit_power_dbm(radio(power_control="full"), at, 1e6),
            power.transmit_power_dbm(radio(power_control="fractional"), at, 1e6),
            rates.rate_bps(rates.link_of(radio()), at, 1e6),
        )
        assert {array.dtype for array in found} == {np.dtype(kind)}
    at32 = np.linspace(1, 400, 50, dtype=np.float32)
    assert shadowing.std_db(name, at32, CARRIER, at32 < 100).dtype == np.float32
    assert shadowing.correlation_m(name, at32 < 100).dtype == np.float32


@given(
    st.sampled_from(NAMES),
    st.floats(0.5, 30.0),
    st.lists(st.floats(0.0, 9000.0, width=32), min_size=2, max_size=20),
)
def test_farther_is_never_louder_nor_more_in_sight(name: str, carrier: float, places: list[float]) -> None:
    at = np.sort(np.array(places, np.float32))
    los = tr38901.pathloss_los_db(name, at, carrier)
    nlos = tr38901.pathloss_nlos_db(name, at, carrier)
    chance = tr38901.los_probability(name, at)
    # RMa's table itself steps down, by under 0.01 dB, where its second branch takes over.
    assert (np.diff(los) >= -0.02).all() and (np.diff(nlos) >= -0.02).all()
    assert (nlos >= los).all()
    assert (np.diff(chance) <= 1e-6).all() and (chance >= 0).all() and (chance <= 1).all()
    assert los[0] == tr38901.pathloss_los_db(name, np.maximum(at[:1], 10), carrier)[0]


def test_a_wall_costs_what_glass_and_concrete_let_through() -> None:
    """Low at 3.5 GHz: glass 2.7 dB on 30 %, concrete 19 dB on 70 %; high: coated glass 25.785 dB on 70 %."""
    depth, normal = np.array([0.0, 10.0]), np.array([0.0, 1.0])
    low = 5.0 - 10.0 * math.log10(0.3 * 10**-0.27 + 0.7 * 10**-1.9)
    high = 5.0 - 10.0 * math.log10(0.7 * 10**-2.5785 + 0.3 * 10**-1.9)
    assert low == pytest.approx(12.697, abs=1e-3)
    found = tr38901.penetration_db("uma", "low", CARRIER, depth, normal)
    np.testing.assert_allclose(found, [low, low + 5.0 + 4.4], rtol=1e-12)
    found = tr38901.penetration_db("rma", "high", CARRIER, depth, normal)
    np.testing.assert_allclose(found, [high, high + 5.0 + 6.5], rtol=1e-12)
    assert (tr38901.penetration_db("indoor", "high", CARRIER, depth, normal) == 0.0).all()


def test_the_way_inside_is_the_shorter_of_two() -> None:
    """E min(U, U') = depth / 3, with a standard deviation of depth / sqrt(18)."""
    for name, most in (("uma", 25.0), ("rma", 10.0)):
        depth = tr38901.indoor_depth_m(name, 40_000, rng(1, "depth"))
        assert depth.shape == (40_000,) and depth.min() >= 0.0 and depth.max() <= most
        assert abs(depth.mean() - most / 3) < 4 * most / math.sqrt(18 * 40_000)


def test_bad_input_is_told_in_a_sentence() -> None:
    at = np.array([10.0])
    with pytest.raises(ValueError, match=r"wireless\.scenario = 'moon' must be one of uma, umi, rma, indoor"):
        tr38901.los_probability("moon", at)
    with pytest.raises(ValueError, match=r"wireless\.carrier-ghz = 0\.1 must be between 0\.5 and 100"):
        tr38901.pathloss_los_db("uma", at, 0.1)
    with pytest.raises(ValueError, match=r"wireless\.penetration = 'paper' must be low or high"):
        tr38901.penetration_db("uma", "paper", 3.5, at, at)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="antennas = 0 must be at least 1"):
        fading.block_fading(3, rng(1, "fade"), antennas=0)
    with pytest.raises(ValueError, match="antennas = 0 must be at least 1"):
        fading.snr_factor(0)


# --- shadowing and fading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sight", [True, False])
def test_shadowing_has_its_spread_and_its_memory(name: str, sight: bool) -> None:
    site, draw, count = tr38901.SCENARIOS[name], rng(7, "shadow", name), 100_000
    los = np.full(count, sight)
    sigma = shadowing.std_db(name, np.full(count, 100, np.float32), CARRIER, los)
    distance = shadowing.correlation_m(name, los)
    assert sigma[0] == np.float32(site.std_los_db if sight else site.std_nlos_db)
    start = draw.standard_normal(count, dtype=np.float32)
    shadow = start.copy()
    for _ in range(10):  # ten steps that make one correlation distance
        shadowing.evolve(shadow, distance / 10, distance, draw)
    assert np.std(sigma * shadow) == pytest.approx(float(sigma[0]), rel=0.01)
    assert np.corrcoef(start, shadow)[0, 1] == pytest.approx(math.exp(-1), abs=0.02)


def test_who_stands_still_keeps_its_shadow() -> None:
    shadow = rng(7, "still").standard_normal(50, dtype=np.float32)
    before = shadow.copy()
    moved = np.array([0.0, 5.0] * 25, np.float32)
    shadowing.evolve(shadow, moved, 37.0, rng(7, "step"))
    assert ((shadow == before) == (moved == 0.0)).all()


def test_line_of_sight_in_the_country_scatters_more_when_far() -> None:
    at = np.array([3000.0, 5000.0, 5000.0], np.float32)  # d_BP = 3,848 m
    found = shadowing.std_db("rma", at, CARRIER, np.array([True, True, False]))
    np.testing.assert_array_equal(found, [4.0, 6.0, 8.0])


@pytest.mark.parametrize("antennas", [1, 4])
def test_power_gains_are_gamma(antennas: int) -> None:
    gain = fading.block_fading(100_000, rng(3, "fade"), antennas)
    assert gain.dtype == np.float32
    assert gain.mean() == pytest.approx(antennas, rel=0.015) and gain.var() == pytest.approx(
        antennas, rel=0.05
    )
    bound = fading.ergodic_bound(np.array([10.0, 1e4]), antennas)
    mean = np.log2(1 + np.multiply.outer([10.0, 1e4], gain)).mean(1)
    assert (bound <= mean + 0.02).all() and bound[1] == pytest.approx(mean[1], rel=0.002)


@pytest.mark.parametrize("snr", [0.01, 0.1, 1.0, 10.0, 100.0, 1e5])
@pytest.mark.parametrize("cap", [math.inf, 7.4, 0.3])
def test_the_mean_rate_is_the_mean_of_rates(snr: float, cap: float) -> None:
    h = fading.block_fading(400_000, rng(5, "ergodic"))
    drawn = np.minimum(np.log2(1 + snr * h.astype(np.float64)), cap).mean()
    assert fading.ergodic_rate(np.array(snr), cap) == pytest.approx(drawn, rel=0.01)


def test_the_mean_rate_is_its_integral_at_every_snr() -> None:
    """Between 1e-12, where e^{1/s} alone would overflow, and 1e12."""
    for snr in (10.0**power_of_ten for power_of_ten in range(-12, 13)):
        exact = mean_over_fading(functools.partial(lambda s, x: math.log1p(s * x), snr))
        assert float(fading.ergodic_rate(np.array(snr))) * math.log(2) == pytest.approx(exact, rel=1e-9)
    assert fading.ergodic_rate(np.array([0.0, 10.0, 100.0])).round(2).tolist() == [0.0, 2.91, 5.88]
    assert fading.ergodic_bound(np.array([10.0, 100.0])).round(2).tolist() == [2.73, 5.84]


@given(st.floats(0.0, 1e12), st.floats(0.01, 20.0))
def test_fading_never_adds_and_the_bound_never_exceeds(snr: float, cap: float) -> None:
    s = np.array(snr)
    mean, slack = fading.ergodic_rate(s), 1 + 1e-12
    assert fading.ergodic_bound(s) <= mean * slack + 1e-15 and mean <= np.log2(1 + s) * slack + 1e-15
    capped = fading.ergodic_rate(s, cap)
    assert 0.0 <= capped <= np.minimum(mean, cap) * slack + 1e-12


# --- rates --------------------------------------------------------------------------------------------------


def test_the_cqi_table_is_the_standards() -> None:
    """Efficiency = bits of the modulation x code rate / 1024, printed with four digits."""
    bits = np.repeat([2, 4, 6], [6, 3, 6])
    code = np.array([78, 120, 193, 308, 449, 602, 378, 490, 616, 466, 567, 666, 772, 873, 948])
    np.testing.assert_array_equal(rates.CQI_EFFICIENCY, np.floor(1e4 * bits * code / 1024 + 0.5) / 1e4)
    levels = [0.0, *rates.CQI_EFFICIENCY.tolist()]
    for place, threshold in enumerate(rates.CQI_THRESHOLD_DB.tolist()):
        at = 10 ** (np.array([threshold - 1e-9, threshold + 1e-9]) / 10)
        assert rates.cqi_efficiency(at).tolist() == levels[place : place + 2]


def test_the_mean_cqi_is_the_mean_of_cqis() -> None:
    h = fading.block_fading(400_000, rng(5, "cqi"))
    for snr in (0.3, 3.0, 30.0, 300.0):
        mean = rates.cqi_efficiency(snr * h).mean()
        assert rates.cqi_ergodic(np.array(snr)) == pytest.approx(mean, rel=0.01)
    assert rates.cqi_ergodic(np.array([0.0]))[0] == 0.0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["ergodic", "block"])
@pytest.mark.parametrize("loss", ["none", "harq"])
def test_what_is_transmitted_is_near_what_is_planned(model: str, mode: str, loss: str) -> None:
    """The invertible form against the model, over the SNRs that one sees."""
    config = radio(rate=model, fading=mode, loss=loss)
    link, band = rates.link_of(config), 1e6
    gain = band * 10 ** np.linspace(0.3, 4.0, 200)
    planned, real = rates.rate_bps(link, gain, band), rates.rate_bps(config, gain, band)
    if (model, mode) == ("shannon", "block") or (model, mode) == ("truncated", "block"):
        np.testing.assert_array_equal(planned, real)
    assert np.abs(planned - real).max() <= 0.6 * band and planned[-1] == pytest.approx(real[-1], rel=0.06)
    lossless = rates.rate_bps(radio(rate=model, fading=mode), gain, band)
    np.testing.assert_allclose(real, lossless * (0.9 if loss == "harq" else 1.0), rtol=1e-9)


def test_rates_by_hand() -> None:
    """15 dB = 31.62 over 2 MHz: 0.75 log2(32.62) = 3.7707; 0.4 log2(32.62) = 2.011, capped at 2; CQI 11."""
    gain, band = np.array([2e6 * 10**1.5]), 2e6
    for model, direction, efficiency in (
        ("shannon", "uplink", 0.75 * math.log2(1 + 10**1.5)),
        ("truncated", "uplink", 2.0),
        ("truncated", "downlink", 0.6 * math.log2(1 + 10**1.5)),
        ("cqi", "uplink", 3.3223),
    ):
        found = rates.rate_bps(radio(rate=model, fading="block"), gain, band, direction)  # type: ignore[arg-type]
        assert found[0] == pytest.approx(efficiency * band, rel=1e-12)
    found = rates.rate_bps(radio(fading="ergodic"), gain, band)
    drawn = np.minimum(0.75 * np.log2(1 + 10**1.5 * fading.block_fading(400_000, rng(2, "hand"))), 5.55)
    assert found[0] == pytest.approx(drawn.mean() * band, rel=0.01)


def test_below_the_floor_a_device_uses_less_of_its_band_or_nothing() -> None:
    floor = 10**-0.67
    config = radio(fading="block")
    gain = np.array([0.5, 0.2, 0.17, 0.0]) * floor * 1e6  # 0.18 MHz is one block
    found = rates.rate_bps(config, gain, 1e6)
    edge = 0.75 * math.log2(1 + floor) * 1e6
    np.testing.assert_allclose(found, [0.5 * edge, 0.2 * edge, 0.0, 0.0], rtol=1e-12)
    assert (rates.rate_bps(config, gain, 0.0) == 0.0).all()


@given(
    st.sampled_from(MODELS),
    st.sampled_from(["ergodic", "block"]),
    st.floats(0.0, 1e10),
    st.floats(1.0, 10.0),
    st.floats(1e3, 1e8),
    st.booleans(),
)
def test_more_gain_is_never_slower(
    model: str, mode: str, gain: float, more: float, band: float, planned: bool
) -> None:
    config = radio(rate=model, fading=mode)
    way = rates.link_of(config) if planned else config
    low, high = rates.rate_bps(way, np.array([gain, gain * more]), band)
    assert 0.0 <= low <= high * (1 + 1e-9)
    assert high <= 5.56 * band


@given(
    st.sampled_from(MODELS),
    st.sampled_from(["ergodic", "block"]),
    st.floats(1e3, 1e10),
    st.floats(1e3, 1e8),
    st.floats(1.0, 10.0),
)
def test_more_band_is_never_slower(model: str, mode: str, gain: float, band: float, more: float) -> None:
    """Not so of the real CQI table, whose staircase may lose more than the band gains."""
    config = radio(rate=model, fading=mode)
    ways: list[rates.Link | WirelessConfig] = [rates.link_of(config)]
    if model != "cqi":
        ways.append(config)
    for way in ways:
        low, high = rates.rate_bps(way, np.full(2, gain), np.array([band, band * more]))
        assert low <= high * (1 + 1e-9)


# --- losses and power ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.001, 0.01, 0.1, 1.0])
def test_packets_are_lost_as_often_as_drawn(a: float) -> None:
    count = 400_000
    draw = rng(12, "packets", int(a * 1000))
    lost = draw.random(count) < -np.expm1(-a / draw.standard_exponential(count))
    q = float(errors.rayleigh_error(np.array(a)))
    assert abs(lost.mean() - q) <= 3 * math.sqrt(q * (1 - q) / count)


def test_packet_errors_by_their_integral_at_any_gain() -> None:
    known = errors.rayleigh_error(np.array([0.001, 0.01, 0.1, 1.0])).round(4).tolist()
    assert known == [0.0068, 0.0448, 0.2334, 0.7203]
    for a in (1e-9, 1e-5, 0.03, 0.0999999, 0.1, 0.1000001, 3.0, 30.0):
        exact = mean_over_fading(functools.partial(lambda a, x: -math.expm1(-a / x), a))
        assert errors.rayleigh_error(np.array(a)) == pytest.approx(exact, rel=1e-9, abs=0.0)
    assert errors.rayleigh_error(np.array([0.0, 1e9, np.inf])).tolist() == [0.0, 1.0, 1.0]


def test_each_kind_of_loss() -> None:
    gain = np.array([0.0, 1e6, 1e8])
    a = errors.WATERFALL * np.array([np.inf, 1.0, 0.01])
    error = errors.packet_error
    np.testing.assert_allclose(error(radio(loss="rayleigh"), gain, 1e6), errors.rayleigh_error(a))
    block = error(radio(loss="rayleigh", fading="block"), gain, 1e6)
    np.testing.assert_allclose(block, [1.0, 1 - math.exp(-1.08), 1 - math.exp(-0.0108)])
    assert error(radio(loss="none"), gain, 1e6).tolist() == [0.0] * 3
    assert error(radio(loss="harq"), gain, 1e6).tolist() == [1e-3] * 3


@given(st.floats(0.0, 1e3), st.floats(1.0, 3.0))
def test_a_weaker_signal_is_lost_more_often(a: float, more: float) -> None:
    low, high = errors.rayleigh_error(np.array([a, a * more]))
    assert 0.0 <= low <= high * (1 + 1e-12) and high <= 1.0


def test_power_by_hand() -> None:
    """23 dBm = 0.19953 W; P_0 + 10 lg 10 + 0.8 PL = -75 + 0.8 PL over 1.8 MHz, 23 dBm from 122.5 dB on."""
    np.testing.assert_allclose(power.watts(np.array([23.0, 30.0])), [0.1995262315, 1.0], rtol=1e-9)
    np.testing.assert_allclose(power.dbm(np.array([0.1995262315, 0.0])), [23.0, -np.inf], atol=1e-8)
    assert power.noise_dbm_hz(5.0, 3.0) == -166.0
    loss = np.array([80.0, 110.0, 122.5, 150.0])
    fractional = radio(power_control="fractional")
    found = power.transmit_power_dbm(fractional, loss, 1.8e6)
    np.testing.assert_allclose(found, [-11.0, 13.0, 23.0, 23.0], atol=1e-12)
    narrow = power.transmit_power_dbm(fractional, loss[:1], 1e3)
    np.testing.assert_allclose(narrow, [-21.0], atol=1e-12)  # as over one block
    assert (power.transmit_power_dbm(radio(), loss, 1e6) == 23.0).all()
    np.testing.assert_allclose(power.gain_hz(23.0, np.array([129.0]), -166.0), [1e6], rtol=1e-12)
    energy = power.radio_energy_j(np.array([0.35, 0.0]), np.array([2.0, 3.0]))
    np.testing.assert_allclose(energy, [2.2, 0.3], rtol=1e-12)
