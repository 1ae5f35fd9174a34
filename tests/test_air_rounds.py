"""Rounds whose updates are summed over the air: against the digital mean, its noise, and who is silent."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlam_app import checks
from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.wireless.fleet import Load
from fedlam_app.wireless.radio import Radio
from strategies.algorithm import Plan
from strategies.fedavg_lora import FedAvgLora
from strategies.over_air import OverAir, on_air
from strategies.participation import Heard, Turn
from strategies.wireless import Wireless
from tests.fleet_runs import Flat, fleet_of, run
from tests.tiny import tiny_text_run

AIR: Flat = {
    "job": "train",
    "fleet.profiles": "mixed",
    "fleet.on-share": 1.0,
    "wireless.transport": "air",
    "selection.policy": "random",
    "train.devices": 8,
    "train.cohort": 4,
    "federation.supernodes": 1,
}
RULES = ("least-error", "truncated", "inversion")
SHAPES = [("l.lora_A.x", (2, 3)), ("l.lora_B.x", (3, 2)), ("head", (5,))]
K, P = 6, 17


def configured(**keys: Scalar) -> RunConfig:
    return parse({**AIR, **{key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}})


class Fixed(FedAvgLora):
    """FedAvg of which devices return some parts alone."""

    def plan(self, number: int) -> Plan:
        return Plan(returns="b+other" if number == 2 else "a+b+other")


def rule(config: RunConfig) -> Fixed:
    algorithm = Fixed(config)
    vector = np.random.default_rng(1).standard_normal(P).astype(np.float32)
    algorithm.init(vector, list(range(K)), Layout.of(SHAPES))
    return algorithm


def results(start: Vector, number: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    draw = np.random.default_rng(number)
    vectors = start + 0.1 * draw.standard_normal((K, P)) + 0.05
    return vectors.astype(np.float32), draw.integers(1, 50, K).astype(float)


def received(
    config: RunConfig, snr: NDArray[np.float64], number: int = 1, base: float = 0.0
) -> tuple[Fixed, Vector, NDArray[np.float32], NDArray[np.float64]]:
    """One turn over the air; returns the rule after its step, its start, and what devices sent."""
    algorithm = rule(config)
    start = algorithm.models()[0].copy()
    vectors, weights = results(start)
    if number == 2:
        vectors[:, algorithm.layout.part("a")] = start[algorithm.layout.part("a")]
    air = OverAir(algorithm, config.wireless, config.seed)
    ids = list(range(K))
    ones = [1.0] * K
    turn = Turn(ids=ids, steps=[1] * K, factors=ones, base=base, snr=snr.tolist(), mean_snr=snr.tolist())
    air.begin(turn)
    for k in ids:
        air.fold(k, vectors[k], float(weights[k]))
    air.end(number)
    algorithm.step()
    return algorithm, start, vectors, weights


@pytest.mark.parametrize("power", RULES)
def test_without_noise_the_air_gives_the_digital_mean(power: str) -> None:
    snr = np.linspace(1.0, 3.0, K) * 1e14
    algorithm, _, vectors, weights = received(configured(wireless__air=power), snr)
    expected = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(algorithm.models()[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", RULES)
def test_what_does_not_travel_is_not_touched_by_noise(power: str) -> None:
    algorithm, start, _, _ = received(configured(wireless__air=power), np.full(K, 0.01), number=2)
    still = algorithm.layout.part("a")
    np.testing.assert_array_equal(algorithm.models()[0][still], start[still])
    assert (algorithm.models()[0][~still] != start[~still]).all()


def test_the_base_divides_what_was_heard() -> None:
    snr = np.full(K, 1e14)
    algorithm, start, vectors, weights = received(configured(wireless__air="inversion"), snr, base=400.0)
    expected = start + weights @ (vectors.astype(np.float64) - start) / 400.0
    np.testing.assert_allclose(algorithm.models()[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", RULES)
def test_noise_has_the_mean_and_variance_of_the_formula(power: str) -> None:
    """2,000 rounds, one noise each: at these SNRs nobody is cut off, so inversions are unbiased."""
    config = configured(wireless__air=power)
    algorithm = rule(config)
    start = algorithm.models()[0].copy()
    vectors, weights = results(start)
    snr = np.linspace(0.5, 4.0, K)
    air = OverAir(algorithm, config.wireless, config.seed)
    law = on_air(config.wireless, snr, snr, weights)
    turn = Turn(ids=list(range(K)), steps=[1] * K, factors=[1.0] * K, snr=snr.tolist(), mean_snr=snr.tolist())
    found = []
    for number in range(10, 2010):
        algorithm.vector = start.copy()
        air.begin(turn)
        for k in range(K):
            air.fold(k, vectors[k], float(weights[k]))
        air.end(number)
        algorithm.step()
        found.append(algorithm.models()[0].astype(np.float64))
    updates = (vectors - start).astype(np.float64)
    std = np.sqrt(np.average(updates.var(axis=1), weights=weights))
    variance = law.noise_variance * std**2
    means = updates.mean(axis=1, keepdims=True)
    heard = law.theta[:, None] * updates + (1.0 - law.theta[:, None]) * means
    expected = start + np.average(heard, axis=0, weights=weights)
    noise = np.array(found) - expected  # (rounds, P)
    count = noise.size
    assert abs(noise.mean()) < 3.0 * np.sqrt(variance / count)
    assert abs((noise**2).mean() / variance - 1.0) < 3.0 * np.sqrt(2.0 / count)
    if power != "least-error":
        plain = np.average(vectors.astype(np.float64), axis=0, weights=weights)
        assert (np.abs(np.mean(found, axis=0) - plain) < 4.0 * np.sqrt(variance / len(found))).all()


# --- the clock --------------------------------------------------------------------------------------------

BITS = 32e6  # a million entries
LOAD = Load(flops=2e9, bits_up=BITS, bits_down=BITS, broadcast=True)


def fleet(devices: int = 60, **keys: Scalar) -> Wireless:
    config = configured(task="mixture", train__devices=devices, train__cohort=devices // 2, **keys)
    return Wireless(config, 1, np.full(devices, 20.0, np.float32))


def test_everybody_sends_for_d_over_b_seconds_whatever_their_number() -> None:
    for devices in (20, 200):
        world = fleet(devices, wireless__air="inversion")
        world.turn(1, lambda: LOAD, None)
        assert world._pending is not None
        course = world._pending.air.course
        np.testing.assert_allclose(course.up_s, 1e6 / 20e6, rtol=1e-6)
        assert world._pending.ending.arrived.all()


@pytest.mark.parametrize("fading", ["ergodic", "block"])
def test_silent_devices_are_late_and_their_share_is_that_of_rayleigh_fading(fading: str) -> None:
    world = fleet(
        200,
        wireless__air="truncated",
        wireless__air_threshold=0.5,
        wireless__fading=fading,
        wireless__radius_m=50.0,
        fleet__moving=0.0,
    )
    ratio, sent, chosen = [], 0, 0
    for number in range(1, 41):
        turn = world.turn(number, lambda: LOAD, None)
        assert world._pending is not None
        air, ending = world._pending.air, world._pending.ending
        silent = air.snr < 0.5 * air.mean_snr
        np.testing.assert_array_equal(ending.late, silent)
        assert turn.ids == air.ids[~silent].tolist() and len(turn.snr) == len(turn.mean_snr) == len(turn.ids)
        np.testing.assert_array_equal(turn.snr, air.snr[~silent])
        assert isinstance(world.fleet.links, Radio)
        np.testing.assert_array_equal(air.energy_j(ending, 1)[silent], 0.0)
        ratio += (air.snr / air.mean_snr).tolist()
        sent, chosen = sent + len(turn.ids), chosen + len(silent)
        world.settle(Heard(loss=dict.fromkeys(turn.ids, 1.0), norm=dict.fromkeys(turn.ids, 1.0)))
    share = np.exp(-0.5)
    assert abs(sent / chosen - share) < 3.0 * np.sqrt(share * (1.0 - share) / chosen)
    assert abs(np.mean(ratio) - 1.0) < 3.0 / np.sqrt(len(ratio))  # Exp(1), faded once
    assert abs(np.var(ratio) - 1.0) < 3.0 * np.sqrt(8.0 / len(ratio))
    said = world.summary()
    assert said["late"] == chosen - sent and said["trained"] == said["arrived"] == sent


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    return tiny_text_run(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("power", RULES)
@pytest.mark.parametrize("strategy", ["fedavg-lora", "ffa-lora", "rolora", "fedsa-lora", "fedsgd-lora"])
def test_rules_that_average_run_over_the_air(texts: Flat, strategy: str, power: str) -> None:
    flat = {**texts, **AIR, "strategy": strategy, "wireless.air": power, "wireless.air-threshold": 0.7}
    mode: Flat = {"selection.mode": "deadline"} if strategy == "rolora" else {}
    checks.check(parse({**flat, **mode}))
    federation, _ = run({**flat, **mode, "selection.policy": "importance"}, None, 2)
    assert (fleet_of(federation).summary()["late"] > 0) == (power == "truncated")


def test_at_a_huge_power_a_run_over_the_air_is_the_digital_run(texts: Flat) -> None:
    flat = {**texts, **AIR, "strategy": "fedavg-lora", "wireless.air": "inversion"}
    loud: Flat = {"wireless.tx-power-dbm": 180.0, "train.cohort": 8}
    by_air, _ = run({**flat, **loud}, None, 2)
    digital, _ = run({**flat, **loud, "wireless.transport": "ofdma"}, None, 2)
    found, expected = by_air.algorithm.models()[0], digital.algorithm.models()[0]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
