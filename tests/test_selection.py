"""Selection policies: equal to their plain references, unbiased where they say so, fair, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlam_app.config import Scalar, parse
from fedlam_app.tables.wireless import SelectionConfig
from strategies.selection import POLICIES
from strategies.selection.age import worth
from strategies.selection.base import Outcome, RoundState
from strategies.selection.fedcs import FedCs, queued, rivals
from strategies.selection.importance import Importance, inclusions, shares, systematic
from strategies.selection.oort import Oort
from strategies.selection.picks import evenly, nth, race, top
from strategies.selection.power_of_choice import PowerOfChoice
from strategies.selection.tifl import Tifl
from tests.selection_reference import REFERENCES, agree, case, largest, outcome

MEMORIES = ("proportional-fair", "tifl", "oort")


def table(**keys: Scalar) -> SelectionConfig:
    return parse({f"selection.{key.replace('_', '-')}": value for key, value in keys.items()}).selection


CONFIGS = (
    table(candidates=1.5, deadline_s=40.0, reprofile=2),
    table(candidates=1.0, penalty=0.5, tiers=2, rho=0.9, fairness=0.0, reprofile=0),
    table(candidates=3.0, penalty=1.0, tiers=9, rho=0.0, fairness=2.0, memory=1, deadline_s=5.0),
    table(candidates=2.0, penalty=0.0, tiers=1, rho=1.0, fairness=0.5, memory=3, deadline_s=1e5),
)


def crowd(count: int, wanted: int, seed: int = 1, number: int = 30) -> RoundState:
    """Many devices, half of them heard before; rates have a cap, so that many upload equally fast."""
    draw = np.random.default_rng(seed)
    gain = 10.0 ** draw.uniform(5.0, 9.0, count)
    share = 20e6 / wanted
    rate = share * np.minimum(0.75 * np.log2(1.0 + gain / share), 5.55)
    heard = draw.random(count) < 0.5
    last = np.where(heard, draw.integers(1, number, count), 0)
    return RoundState(
        number=number,
        now_s=0.0,
        devices=count,
        wanted=wanted,
        band_hz=20e6,
        ids=np.arange(count),
        gain_hz=gain.astype(np.float32),
        fixed_s=draw.lognormal(3.0, 1.0, count).astype(np.float32),
        upload_s=(1.28e7 / rate).astype(np.float32),
        bits=np.full(count, 1.28e7, np.float32),
        energy_j=np.ones(count, np.float32),
        examples=draw.integers(10, 900, count).astype(np.float32),
        loss=np.where(heard, draw.exponential(1.0, count), np.inf).astype(np.float32),
        norm=np.where(heard, draw.exponential(1.0, count), np.inf).astype(np.float32),
        last=last.astype(np.int32),
        count=heard.astype(np.int32),
    )


# --- every policy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_a_policy_chooses_as_its_plain_reference(name: str) -> None:
    wrong = [seed for seed in range(200) if not agree(name, CONFIGS[seed % len(CONFIGS)], seed)]
    assert not wrong


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), which=st.integers(0, len(CONFIGS) - 1), number=st.integers(1, 60))
def test_a_choice_has_each_place_once_and_at_most_the_wanted(
    name: str, seed: int, which: int, number: int
) -> None:
    state = case(seed, number)
    policy = POLICIES[name](CONFIGS[which], state.devices, 0)
    choice = policy.select(state, np.random.default_rng(seed))
    places = choice.places
    assert places.dtype == np.intp
    assert len(set(places.tolist())) == len(places) <= state.wanted
    assert all(0 <= place < len(state) for place in places)
    if name not in ("fedcs", "importance"):  # these leave out who cannot finish
        assert len(places) == min(state.wanted, len(state))
    assert policy.unbiased == (choice.weights is not None)
    if choice.weights is not None:
        assert choice.weights.shape == places.shape
        assert (choice.weights >= 1.0 / state.devices * (1.0 - 1e-6)).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_resumed_policy_goes_on_bit_for_bit(name: str) -> None:
    def play(policy: object, first: int, last: int) -> list[list[int]]:
        chosen = []
        for number in range(first, last):
            state = case(7, number)
            places = policy.select(state, np.random.default_rng(number)).places  # type: ignore[attr-defined]
            policy.feedback(outcome(state, places, np.random.default_rng(number)))  # type: ignore[attr-defined]
            chosen.append(places.tolist())
        return chosen

    config = table(reprofile=3)
    one = POLICIES[name](config, 24, 0)
    play(one, 1, 45)
    saved = one.state()
    kept = {key: array.copy() for key, array in saved.items()}
    other = POLICIES[name](config, 24, 0)
    other.load(saved)
    assert play(one, 45, 60) == play(other, 45, 60)
    for key, array in one.state().items():
        assert array.dtype == other.state()[key].dtype
        np.testing.assert_array_equal(array, other.state()[key])
        np.testing.assert_array_equal(saved[key], kept[key])  # what was saved is a copy
    assert bool(saved) == (name in MEMORIES)


# --- picks -------------------------------------------------------------------------------------------------

ARRAYS = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, math.inf])
)


@given(ARRAYS, st.integers(0, 70))
def test_top_is_the_head_of_a_stable_sort(values: np.ndarray, count: int) -> None:
    assert top(values, count).tolist() == largest(values.tolist(), count)
    place = min(count, len(values) - 1)
    assert nth(values, place) == sorted(values.tolist())[place]


def test_a_race_is_won_in_proportion_to_the_weights() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0, 0.0], np.float32)
    draw = np.random.default_rng(0)
    wins = np.bincount([race(weights, 1, draw)[0] for _ in range(20_000)], minlength=5) / 20_000
    assert wins[4] == 0.0
    error = np.sqrt(weights / 10.0 * (1.0 - weights / 10.0) / 20_000)
    assert (np.abs(wins - weights / 10.0) <= 4.0 * error).all()


def test_an_even_draw_takes_everybody_as_often() -> None:
    draw = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([evenly(10, 3, draw) for _ in range(10_000)]), minlength=10)
    assert np.abs(counts - 3_000).max() <= 4.0 * math.sqrt(10_000 * 0.3 * 0.7)


# --- importance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(10))
def test_shares_satisfy_the_stationarity_of_the_problem(rho: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    size, time_s = draw.lognormal(0.0, 2.0, 300), draw.lognormal(3.0, 1.5, 300)
    p = shares(size, time_s, rho)
    u, t = size / size.sum(), time_s / time_s.mean()
    slopes = rho * t - (1.0 - rho) * (u / p) ** 2  # d/dp of the objective: -lambda, for everybody
    assert np.ptp(slopes) <= 1e-8 * max(np.abs(slopes).max(), 1.0)
    assert abs(p.sum() - 1.0) <= 1e-10


def test_shares_from_a_sample_are_nearly_the_optimum() -> None:
    draw = np.random.default_rng(0)
    size, time_s = draw.lognormal(0.0, 1.0, 50_000), draw.lognormal(3.0, 1.0, 50_000)

    def cost(p: np.ndarray) -> float:
        p = p / p.sum()
        return float(p @ time_s / time_s.mean() + ((size / size.sum()) ** 2 / p).sum())

    exact, sampled = shares(size, time_s, 0.5), shares(size, time_s, 0.5, 2048)
    assert cost(exact) <= cost(sampled) <= cost(exact) * (1.0 + 1e-4)
    assert not np.array_equal(exact, sampled)


@pytest.mark.parametrize("wanted", [1, 3, 8])
def test_inclusions_are_proportional_up_to_certainty(wanted: int) -> None:
    p = np.array([0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.005, 0.004, 0.001])
    chance = inclusions(p.copy(), wanted)
    assert chance.sum() == pytest.approx(wanted, abs=1e-12)
    free = chance < 1.0
    assert np.ptp(chance[free] / p[free]) <= 1e-9 * (chance[free] / p[free]).max()
    assert chance.max() <= 1.0


def test_a_systematic_draw_has_its_chances() -> None:
    draw = np.random.default_rng(0)
    chance = inclusions(draw.lognormal(0.0, 1.5, 200), 20)
    taken = np.zeros(200)
    for _ in range(5_000):
        places = systematic(chance, 20, draw)
        assert len(set(places.tolist())) == 20
        taken[places] += 1.0
    error = np.sqrt(np.maximum(chance * (1.0 - chance), 1e-4) / 5_000)
    assert (np.abs(taken / 5_000 - chance) <= 4.5 * error).all()


@pytest.mark.parametrize("count", [30, 5_000])
def test_the_weighted_sum_is_everybodys_on_average(count: int) -> None:
    """Within 3 standard errors over 2,000 draws; without the weights it is far off."""
    state = replace(crowd(count, 10), devices=2 * count)
    policy = Importance(table(rho=0.5), 2 * count, 0)
    # What devices report goes with their speed, so that who is drawn matters.
    x = 1.0 / state.time_s.astype(np.float64)
    truth = float((state.examples * x).sum()) / (2 * count)
    draw = np.random.default_rng(4)
    weighted, plain = [], []
    for _ in range(2_000):
        choice = policy.select(state, draw)
        assert choice.weights is not None
        values = state.examples[choice.places] * x[choice.places]
        weighted.append(float(choice.weights @ values))
        plain.append(float(values.mean()) * count / (2 * count))

    def off(values: list[float]) -> float:
        return abs(np.mean(values) - truth) / (np.std(values) / math.sqrt(len(values)))

    assert off(weighted) <= 3.0
    assert off(plain) > 10.0


# --- FedCS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_rivals_hold_all_whom_the_greedy_takes(seed: int) -> None:
    state = replace(crowd(2_000, 10, seed), loss=np.zeros(2_000, np.float32))
    config = table(deadline_s=60.0)
    found = FedCs(config, 2_000, 0).select(state, np.random.default_rng(0)).places
    wanted, _ = REFERENCES["fedcs"](config, state, np.random.default_rng(0), {}, 2_000)
    assert sorted(found.tolist()) == wanted
    upload = np.minimum(state.upload_s, np.median(state.upload_s))  # half of them equal
    near = rivals(upload, upload + state.fixed_s, 10)
    assert len(near) < 500
    every = np.argsort(upload + state.fixed_s, kind="stable")
    theta, picked, left = 0.0, [], upload[every].astype(np.float64)
    total = (upload + state.fixed_s)[every].astype(np.float64)
    for _ in range(10):
        cost = np.maximum(left, total - theta)
        best = int(np.argmin(cost))
        theta += float(cost[best])
        left[best] = np.inf
        picked.append(int(every[best]))
    assert queued(upload, upload + state.fixed_s, 10, 1e9).tolist() == picked


def test_fedcs_takes_one_where_none_fits() -> None:
    state = crowd(50, 5)
    places = FedCs(table(deadline_s=1e-3), 50, 0).select(state, np.random.default_rng(0)).places
    assert len(places) == 1
    asked = FedCs(table(candidates=2.5), 50, 0).candidates(state, np.random.default_rng(0))
    assert len(asked) == 13


# --- what policies are for ---------------------------------------------------------------------------------


def jain(name: str, fading: Callable[[int], np.ndarray], rounds: int = 200) -> float:
    state, counts = crowd(60, 6), np.zeros(60)
    policy = POLICIES[name](table(memory=20), 60, 0)
    for number in range(1, rounds + 1):
        gain = state.gain_hz * fading(number)
        rate = 2e6 * np.log2(1.0 + gain / 2e6)
        now = replace(
            state,
            number=number,
            gain_hz=gain.astype(np.float32),
            upload_s=(state.bits / rate).astype(np.float32),
        )
        counts[policy.select(now, np.random.default_rng(number)).places] += 1.0
    return float(counts.sum() ** 2 / (60 * (counts**2).sum()))


def test_proportional_fair_is_fairer_than_the_best_channel() -> None:
    def rayleigh(number: int) -> np.ndarray:
        return np.random.default_rng([5, number]).exponential(1.0, 60)

    def still(_: int) -> np.ndarray:
        return np.ones(60)

    assert jain("proportional-fair", rayleigh) > 0.5 > 0.35 > jain("best-channel", rayleigh)
    assert jain("proportional-fair", still) > 0.9
    assert jain("best-channel", still) == pytest.approx(0.1)


def test_age_alone_goes_round() -> None:
    state = replace(crowd(30, 5), upload_s=np.ones(30, np.float32), last=np.zeros(30, np.int32))
    last, policy = np.zeros(30, np.int32), POLICIES["age"](table(fairness=1.0), 30, 0)
    for number in range(1, 7):
        now = replace(state, number=number, last=last.copy())
        last[policy.select(now, np.random.default_rng(0)).places] = number
    assert np.bincount(last, minlength=7).tolist() == [0, 5, 5, 5, 5, 5, 5]


@given(st.floats(0.0, 5.0), st.integers(0, 1000))
def test_the_worth_of_age_grows_from_zero(alpha: float, age: int) -> None:
    values = worth(np.array([0, age, age + 1]), alpha)
    assert values[0] == 0.0
    assert values[0] <= values[1] <= values[2]


def test_power_of_choice_polls_in_proportion_to_examples() -> None:
    state = replace(crowd(10, 1), examples=np.arange(1, 11, dtype=np.float32))
    policy = PowerOfChoice(table(candidates=1.0), 10, 0)
    draw = np.random.default_rng(0)
    asked = np.bincount([policy.candidates(state, draw)[0] for _ in range(20_000)], minlength=10)
    share = np.arange(1, 11) / 55.0
    assert (np.abs(asked / 20_000 - share) <= 4.0 * np.sqrt(share * (1.0 - share) / 20_000)).all()
    assert policy.polls == "loss"
    assert POLICIES["power-of-choice-stale"].polls == ""
    assert FedCs.polls == "status"


# --- Oort and TiFL remember --------------------------------------------------------------------------------


def told(number: int, ids: list[int], loss: list[float], time_s: float = 10.0) -> Outcome:
    count = len(ids)
    return Outcome(
        number=number,
        ids=np.array(ids, np.int64),
        arrived=np.ones(count, np.bool_),
        time_s=np.full(count, time_s),
        energy_j=np.ones(count),
        loss=np.array(loss),
        norm=np.ones(count),
        examples=np.full(count, 10.0),
        round_s=time_s,
    )


@pytest.mark.parametrize(("later", "percentile"), [(1.0, 35.0), (1.09, 35.0), (2.0, 30.0), (7.0, 25.0)])
def test_oorts_pacer_follows_the_utility(later: float, percentile: float) -> None:
    policy = Oort(table(), 4, 0)
    for number in range(1, 41):
        policy.feedback(told(number, [0, 1], [1.0 if number <= 20 else later] * 2))
    assert policy.percentile == percentile
    assert policy.duration_s.tolist() == [10.0, 10.0, 0.0, 0.0]


def test_oort_prefers_who_was_fast() -> None:
    state = replace(crowd(40, 5), loss=np.ones(40, np.float32), examples=np.ones(40, np.float32))
    state = replace(state, last=np.full(40, 5, np.int32))
    policy = Oort(table(penalty=4.0), 40, 0)
    policy.feedback(told(1, list(range(20)), [1.0] * 20, 1.0))
    policy.feedback(told(2, list(range(20, 40)), [1.0] * 20, 50.0))
    for seed in range(20):
        assert policy.select(state, np.random.default_rng(seed)).places.max() < 20


def test_tifl_draws_from_one_tier_and_spends_credits_by_speed() -> None:
    state = crowd(100, 5)
    policy = Tifl(table(tiers=5, reprofile=0), 100, 0)
    drawn = []
    for number in range(1, 400):
        places = policy.select(replace(state, number=number), np.random.default_rng(number)).places
        tiers = policy.tier[places]
        assert len(set(tiers.tolist())) == 1
        drawn.append(int(tiers[0]))
    assert np.bincount(policy.tier).tolist() == [20] * 5
    slowest = [state.time_s[policy.tier == tier].max() for tier in range(5)]
    quickest = [state.time_s[policy.tier == tier].min() for tier in range(5)]
    assert all(slow <= quick for slow, quick in zip(slowest[:-1], quickest[1:], strict=True))
    turns = np.bincount(drawn, minlength=5)
    assert (np.diff(turns) < 0).all()
    assert turns[4] > 0


def test_tifl_goes_where_the_loss_is_high_and_does_not_fall() -> None:
    state = crowd(100, 5)
    policy = Tifl(table(tiers=4), 100, 0)
    policy.select(state, np.random.default_rng(0))
    ids = [int(np.flatnonzero(policy.tier == tier)[0]) for tier in range(4)]
    for number in range(1, 21):
        policy.feedback(told(number, ids, [3.0, 1.0, 4.0, 2.0]))
    # At the first look nothing is known of before, and nothing has fallen below infinity but what was heard.
    assert policy.chances.tolist() == [0.25] * 4
    for number in range(21, 41):
        policy.feedback(told(number, ids, [3.0, 1.0, 4.0, 2.0]))
    assert policy.chances.tolist() == pytest.approx([0.3, 0.1, 0.4, 0.2])


def test_tifl_profiles_anew() -> None:
    state = replace(crowd(100, 5), upload_s=np.full(100, 1e-3, np.float32))
    policy = Tifl(table(tiers=2, reprofile=10, memory=1), 100, 0)
    policy.select(replace(state, number=1), np.random.default_rng(0))
    before = policy.tier.copy()
    turned = replace(state, fixed_s=(1e3 / state.fixed_s).astype(np.float32))
    policy.select(replace(turned, number=10), np.random.default_rng(0))
    np.testing.assert_array_equal(policy.tier, before)
    policy.select(replace(turned, number=11), np.random.default_rng(0))
    assert (policy.tier != before).all()
