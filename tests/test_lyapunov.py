"""Lyapunov schedulers: exact choices against slow references, laws of the queues, and resumption."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.config import Scalar, parse
from fedlam_app.tables.wireless import SelectionConfig
from fedlam_app.wireless.allocate import finish_s, min_max
from strategies.selection.base import Outcome, Places, Policy, RoundState
from strategies.selection.fedft import FedFt, earliest, schedule
from strategies.selection.lyapunov import Lyapunov, fast_and_heavy, utility

UNUSED = rng(0, "a policy that draws nothing")


def config(**keys: Scalar) -> SelectionConfig:
    return parse({f"selection.{key.replace('_', '-')}": value for key, value in keys.items()}).selection


def reached(ids: NDArray[np.int64], devices: int, wanted: int, seed: int) -> RoundState:
    """A round of these devices: times and energies over two decades, half of the losses unknown."""
    draw, count = rng(seed, "state"), len(ids)

    def spread(low: float, high: float) -> NDArray[np.float32]:
        return (10 ** draw.uniform(low, high, count)).astype(np.float32)

    loss = np.where(draw.random(count) < 0.5, np.inf, spread(-1, 0.5)).astype(np.float32)
    return RoundState(
        number=1 + seed % 100,
        now_s=0.0,
        devices=devices,
        wanted=wanted,
        band_hz=1e7,
        ids=ids,
        gain_hz=spread(6, 9),
        fixed_s=spread(-1, 1),
        upload_s=spread(-1, 1),
        bits=spread(5, 7),
        energy_j=spread(-1, 1),
        examples=spread(1, 3),
        loss=loss,
        norm=loss,
        last=np.zeros(count, np.int32),
        count=np.zeros(count, np.int32),
    )


def became(state: RoundState, places: Places, seed: int = 0, arrive: float = 1.0) -> Outcome:
    draw, count = rng(seed, "outcome"), len(places)
    return Outcome(
        number=state.number,
        ids=state.ids[places],
        arrived=draw.random(count) < arrive,
        time_s=state.time_s[places].astype(np.float64),
        energy_j=state.energy_j[places] * draw.uniform(0.5, 2.0, count),
        loss=np.full(count, np.nan),
        norm=np.full(count, np.nan),
        examples=state.examples[places].astype(np.float64),
        round_s=float(draw.uniform(0.0, 2.0)),
    )


def slow_weights(policy: Lyapunov, state: RoundState) -> list[float]:
    """What devices are worth, one at a time, in float64."""
    known = sorted(float(loss) for loss in state.loss if math.isfinite(loss))
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else 1.0
    losses = [float(loss) if math.isfinite(loss) else middle for loss in state.loss]
    worth = [float(n) * loss for n, loss in zip(state.examples, losses, strict=True)]
    scale = float(np.median(worth))
    return [
        math.sqrt(u / scale)
        + policy.config.eta * policy.participation[device]
        - policy.energy[device] * float(e)
        for u, device, e in zip(worth, state.ids.tolist(), state.energy_j, strict=True)
    ]


def slow_choice(time_s: NDArray[np.float32], weight: list[float], most: int, v: float) -> set[int]:
    """The best set, by trying every latency at which a device is done."""
    able = [place for place, w in enumerate(weight) if w >= 0]
    if len(able) <= most:
        return set(able)
    best, chosen = math.inf, set()
    for latest in sorted(float(time_s[place]) for place in able):
        done = [place for place in able if time_s[place] <= latest]
        if len(done) >= most:
            heaviest = sorted(done, key=lambda place: -weight[place])[:most]
            value = float(max(time_s[heaviest])) - v * math.fsum(weight[place] for place in heaviest)
            if value < best:
                best, chosen = value, set(heaviest)
    return chosen


@pytest.mark.parametrize("part", range(4))
def test_the_choice_is_that_of_a_slow_reference(part: int) -> None:
    """200 random cases, with and without energy, fewer devices than wanted included."""
    negative = 0
    for case in range(50 * part, 50 * part + 50):
        draw = rng(case, "reference")
        devices = int(draw.integers(1, 120))
        budget = float(draw.choice([0.0, 0.5]))
        policy = Lyapunov(config(v=10 ** draw.uniform(-2, 2), energy_budget_j=budget), devices, 0)
        policy.participation = draw.exponential(0.5, devices)
        if budget:
            policy.energy = draw.exponential(0.5, devices) * (draw.random(devices) < 0.7)
        ids = np.sort(draw.choice(devices, int(draw.integers(1, devices + 1)), replace=False))
        state = reached(ids, devices, int(draw.integers(1, 30)), case)
        weight = slow_weights(policy, state)
        np.testing.assert_allclose(policy.weights(state), weight, rtol=1e-5, atol=1e-5)
        places = policy.select(state, UNUSED).places
        assert set(places.tolist()) == slow_choice(
            state.time_s, weight, state.wanted, policy.config.v * float(np.median(state.time_s))
        )
        assert (np.diff(places) > 0).all()
        negative += min(weight) < 0
    assert negative > 5


@pytest.mark.parametrize("slope", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("v", [0.0, 0.02, 0.3, 5.0])
def test_large_fleets_are_exact_too(slope: float, v: float) -> None:
    """Beyond the cut, whatever weight has to do with time: as good as a walk over every prefix."""
    draw, count, most = rng(4, "large", round(10 * v)), 12_000, 40
    time_s = draw.lognormal(3, 1, count).astype(np.float32)
    weight = (time_s**slope * draw.lognormal(0, 0.3, count) - 0.05).astype(np.float32)
    places = fast_and_heavy(time_s, weight, most, v)
    order = np.argsort(time_s[weight >= 0])
    times, weights = time_s[weight >= 0][order], weight[weight >= 0][order].astype(np.float64)
    top, best = np.sort(weights[:most]), math.inf
    for end in range(most, len(weights) + 1):
        if end > most and weights[end - 1] > top[0]:
            top = np.sort(np.append(top[1:], weights[end - 1]))
        elif end > most:
            continue
        best = min(best, float(times[end - 1]) - v * float(top.sum()))
    found = float(time_s[places].max()) - v * float(weight[places].sum(dtype=np.float64))
    assert found == pytest.approx(best, rel=1e-9)
    assert len(set(places.tolist())) == most


def test_no_tie_is_left_open() -> None:
    """Equal devices: the first are taken, so that machines agree."""
    ones = np.ones(5000, np.float32)
    assert fast_and_heavy(ones, ones, 7, 1.0).tolist() == list(range(7))
    late = np.where(np.arange(5000) < 4000, np.float32(9), np.float32(2))
    assert fast_and_heavy(late, ones, 3, 1.0).tolist() == [4000, 4001, 4002]


def test_a_device_of_negative_weight_is_not_taken() -> None:
    time_s, weight = np.arange(1, 5, dtype=np.float32), np.array([-1, 2, -0.1, 3], np.float32)
    assert fast_and_heavy(time_s, weight, 3, 1.0).tolist() == [1, 3]
    assert fast_and_heavy(time_s, -np.abs(weight), 3, 1.0).tolist() == []


@given(seed=st.integers(0, 10**6), low=st.floats(0, 3), factor=st.floats(1, 50))
def test_more_v_is_slower_and_heavier(seed: int, low: float, factor: float) -> None:
    draw = rng(seed, "rising v")
    time_s = draw.lognormal(1, 1, 60).astype(np.float32)
    weight = draw.lognormal(0, 1, 60).astype(np.float32)
    less, more = (fast_and_heavy(time_s, weight, 8, v) for v in (low, low * factor))
    assert time_s[less].max() <= time_s[more].max()
    assert weight[less].sum(dtype=np.float64) <= weight[more].sum(dtype=np.float64) + 1e-9


def test_without_v_the_fastest_are_taken() -> None:
    state = reached(np.arange(50), 50, 6, 1)
    places = Lyapunov(config(v=0.0), 50, 0).select(state, UNUSED).places
    assert set(places.tolist()) == set(np.argsort(state.time_s)[:6].tolist())


def test_utility_of_the_unknown_is_neither_high_nor_low() -> None:
    loss = np.array([1, 4, np.inf, np.nan, 9], np.float32)
    assert utility(np.ones(5, np.float32), loss) == pytest.approx([0.5, 1, 1, 1, 1.5])
    assert utility(np.array([1, 4, 9], np.float32), np.full(3, np.inf, np.float32)) == pytest.approx(
        [0.5, 1.0, 1.5]
    )
    assert utility(np.ones(3, np.float32), np.zeros(3, np.float32)).tolist() == [1, 1, 1]


def test_a_long_fleet_with_few_known_losses_finds_them() -> None:
    """The one known loss is not among the evenly spaced devices that the median looks at."""
    loss = np.full(5000, np.inf, np.float32)
    loss[1] = 2.5
    assert utility(np.ones(5000, np.float32), loss) == pytest.approx(np.ones(5000))


@given(
    seed=st.integers(0, 10**6),
    devices=st.integers(1, 12),
    wanted=st.integers(1, 6),
    budget=st.sampled_from((0.0, 0.01, 0.5, 20.0)),
    floor=st.floats(0, 1),
    v=st.floats(0, 100),
    arrive=st.sampled_from((0.0, 0.6, 1.0)),
)
@settings(max_examples=40)
def test_the_queue_laws_hold_on_every_run(
    seed: int, devices: int, wanted: int, budget: float, floor: float, v: float, arrive: float
) -> None:
    policy = Lyapunov(config(v=v, energy_budget_j=budget, participation=floor), devices, 0)
    spent, came, rounds = np.zeros(devices), np.zeros(devices), 20
    for number in range(rounds):
        ids = np.flatnonzero(rng(seed, "on", number).random(devices) < 0.7)
        state = reached(ids, devices, wanted, seed + number)
        outcome = became(state, policy.select(state, UNUSED).places, seed + number, arrive)
        policy.feedback(outcome)
        spent[outcome.ids] += outcome.energy_j
        came[outcome.ids] += outcome.arrived
    beta = floor * wanted / devices
    assert (came / rounds >= beta - policy.participation / rounds - 1e-9).all()
    assert (policy.participation >= 0).all()
    if budget:
        assert (spent / rounds <= budget + policy.energy / rounds + 1e-9).all()
        assert (policy.energy >= 0).all()
    else:
        assert not policy.energy.any()


def test_energy_counts_for_everyone_and_participation_for_who_arrived() -> None:
    policy = Lyapunov(config(energy_budget_j=0.5, participation=1.0), 4, 0)
    state = reached(np.arange(4), 4, 2, 3)
    policy.select(state, UNUSED)  # beta = 1 x 2 / 4
    outcome = became(state, np.array([1, 3]), arrive=0.0)
    policy.feedback(outcome)
    assert policy.participation.tolist() == [0.5] * 4
    assert policy.energy == pytest.approx(
        [0, *np.maximum(outcome.energy_j - 0.5, 0)[[0]], 0, policy.energy[3]]
    )
    assert policy.energy[3] == max(outcome.energy_j[1] - 0.5, 0)
    policy.feedback(became(state, np.array([1, 3])))
    assert policy.participation.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_budget_holds_and_starves_nobody_in_the_long_run() -> None:
    """100 devices, of which 8 are wanted, at 10 to 30 times their budget a round."""
    devices, wanted, rounds, budget = 100, 8, 1500, 0.05
    policy = Lyapunov(config(v=1.0, eta=1.0, participation=0.3, energy_budget_j=budget), devices, 0)
    spent, came, draw = np.zeros(devices), np.zeros(devices), rng(2, "long")
    cost = draw.uniform(10, 30, devices).astype(np.float32) * np.float32(budget)
    template = reached(np.arange(devices), devices, wanted, 9)
    for _ in range(rounds):
        fade = np.maximum(draw.standard_exponential(devices), 0.05).astype(np.float32)
        known = {name: getattr(template, name) for name in RoundState.__dataclass_fields__}
        state = RoundState(**known | {"energy_j": cost / fade})
        places = policy.select(state, UNUSED).places
        spent[places] += state.energy_j[places]
        came[places] += 1
        outcome = became(state, places)
        policy.feedback(
            Outcome(
                **{name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
                | {"energy_j": state.energy_j[places].astype(np.float64)}
            )
        )
    assert spent.max() / rounds <= 1.25 * budget
    assert came.min() / rounds >= 0.8 * 0.3 * wanted / devices


@pytest.mark.parametrize("rule", [Lyapunov, FedFt])
def test_a_resumed_policy_chooses_as_the_first_would(rule: type[Policy]) -> None:
    devices = 30
    keys = config(v=0.5, energy_budget_j=1.0, latency_budget_s=0.7)
    first, second = rule(keys, devices, 0), rule(keys, devices, 0)
    for number in range(6):
        state = reached(np.arange(devices), devices, 5, number)
        first.feedback(became(state, first.select(state, UNUSED).places, number, 0.8))
    second.load({name: array.copy() for name, array in first.state().items()})
    for number in range(6, 12):
        state = reached(np.arange(devices), devices, 5, number)
        one, two = first.select(state, UNUSED).places, second.select(state, UNUSED).places
        assert one.tolist() == two.tolist()
        for policy in (first, second):
            policy.feedback(became(state, one, number, 0.8))
    for name, array in first.state().items():
        assert (array == second.state()[name]).all()


def test_queues_of_another_fleet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"saved queue 'energy' has the shape \(3,\).*\(4,\)"):
        Lyapunov(config(), 4, 0).load(Lyapunov(config(), 3, 0).state())


@pytest.mark.parametrize("rule", [Lyapunov, FedFt])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_devices_than_wanted(rule: type[Policy], count: int) -> None:
    """All of them: queues are empty, so that nothing speaks against anyone. Nobody is an answer too."""
    state = reached(np.arange(count), 10, 5, 1)
    policy = rule(config(), 10, 0)
    places = policy.select(state, UNUSED).places
    assert places.tolist() == list(range(count))
    policy.feedback(became(state, places))


def brute_force(
    bits: NDArray[np.float64],
    gain: NDArray[np.float64],
    fixed: NDArray[np.float64],
    band_hz: float,
    most: int,
    v: float,
    queue: float,
) -> tuple[list[int], float]:
    """The best of all sets, and its objective."""
    sets = [list(s) for n in range(1, most + 1) for s in itertools.combinations(range(len(bits)), n)]
    costs = [v / len(s) + queue * min_max(bits[s], gain[s], fixed[s], band_hz)[1] for s in sets]
    place = int(np.argmin(costs))
    return sets[place], costs[place]


@pytest.mark.parametrize("part", range(4))
def test_fedft_is_brute_force(part: int) -> None:
    """100 unlike cells of at most 8 devices."""
    for case in range(25 * part, 25 * part + 25):
        draw = rng(case, "fedft")
        count = int(draw.integers(1, 9))
        bits, gain = 10 ** draw.uniform(5.0, 7.5, count), 10 ** draw.uniform(5.0, 10.0, count)
        fixed = draw.uniform(0.0, 1.0, count) * draw.choice([0.0, 0.1, 1.0])
        band_hz, most = 10 ** draw.uniform(5.0, 8.0), int(draw.integers(1, count + 1))
        v, queue = 10 ** draw.uniform(-2.0, 1.0, 2)
        found, tau = schedule(bits, gain, fixed, band_hz, most, v, queue)
        wanted, cost = brute_force(bits, gain, fixed, band_hz, most, v, queue)
        assert v / len(found) + queue * tau == pytest.approx(cost, rel=1e-9)
        assert found.tolist() == wanted


@given(seed=st.integers(0, 10**6), count=st.integers(1, 40))
@settings(max_examples=40)
def test_min_max_gives_the_chosen_the_same_latency(seed: int, count: int) -> None:
    """Its bands sum to B, all finish by tau, and tau grows with the number of devices."""
    draw = rng(seed, "tau")
    bits, gain = 10 ** draw.uniform(4, 8, count), 10 ** draw.uniform(4, 10, count)
    fixed, band_hz = draw.uniform(0, 5, count) * draw.choice([0, 1]), 10 ** draw.uniform(4, 9)
    numbers = np.arange(1, count + 1)
    taus, sets = earliest(bits, gain, fixed, band_hz, numbers)
    assert (np.diff(taus) > 0).all()
    for tau, chosen in zip(taus, sets, strict=True):
        band, by = min_max(bits[chosen], gain[chosen], fixed[chosen], band_hz)
        assert by == pytest.approx(tau, rel=1e-9)
        assert finish_s(bits[chosen], gain[chosen], fixed[chosen], band).max() == pytest.approx(tau, rel=1e-6)
        left = np.setdiff1d(numbers - 1, chosen)
        outside = finish_s(bits[left], gain[left], fixed[left], band.max())
        assert (outside >= tau * (1 - 1e-6)).all()  # nobody left out would do with the largest band


def test_an_empty_queue_takes_all_and_a_long_one_the_earliest() -> None:
    state = reached(np.arange(30), 30, 12, 5)
    policy = FedFt(config(v=1.0), 30, 0)
    assert len(policy.select(state, UNUSED).places) == 12
    policy.queue = 1e9
    (alone,) = policy.select(state, UNUSED).places
    times = finish_s(state.bits, state.gain_hz, state.fixed_s, state.band_hz)
    assert alone == np.argmin(times)


@given(seed=st.integers(0, 10**6), v=st.floats(0, 10), factor=st.floats(1, 50), queue=st.floats(0, 10))
@settings(max_examples=30)
def test_more_v_takes_no_fewer_devices(seed: int, v: float, factor: float, queue: float) -> None:
    state = reached(np.arange(25), 25, 25, seed)
    numbers = []
    for weight in (v, v * factor):
        policy = FedFt(config(v=weight), 25, 0)
        policy.queue = queue
        numbers.append(len(policy.select(state, UNUSED).places))
    assert numbers[0] <= numbers[1]


def test_the_latency_queue_keeps_its_budget() -> None:
    """The mean round is the budget, within 2 %, and the queue law holds; no budget is the deadline."""
    policy, delays = FedFt(config(v=5.0, latency_budget_s=1.0), 40, 0), []
    for number in range(250):
        state = reached(np.arange(40), 40, 20, number)
        places = policy.select(state, UNUSED).places
        _, delay = min_max(state.bits[places], state.gain_hz[places], state.fixed_s[places], state.band_hz)
        delays.append(delay)
        outcome = became(state, places)
        known = {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
        policy.feedback(Outcome(**known | {"round_s": delay}))
    assert np.mean(delays) <= 1.0 + policy.queue / len(delays) + 1e-9
    assert np.mean(delays) == pytest.approx(1.0, rel=0.02)
    assert FedFt(config(deadline_s=7.0), 40, 0).budget_s == 7.0


def test_the_screen_of_a_large_fleet_loses_little() -> None:
    """At 5,000 devices, 512 of which are looked at, the objective is within 1 % of the exact one."""
    state = reached(np.arange(5000), 5000, 10, 8)
    policy = FedFt(config(v=5.0), 5000, 0)
    policy.queue = 1.0
    places = policy.select(state, UNUSED).places
    _, tau = min_max(state.bits[places], state.gain_hz[places], state.fixed_s[places], state.band_hz)
    exact, best = schedule(state.bits, state.gain_hz, state.fixed_s, state.band_hz, 10, 5.0, 1.0)
    assert 5.0 / len(places) + tau <= 1.01 * (5.0 / len(exact) + best)


def test_fedft_leaves_out_who_has_no_link() -> None:
    state = reached(np.arange(6), 6, 6, 2)
    gain = state.gain_hz.copy()
    gain[2] = 0.0
    known = {name: getattr(state, name) for name in RoundState.__dataclass_fields__}
    places = FedFt(config(), 6, 0).select(RoundState(**known | {"gain_hz": gain}), UNUSED).places
    assert places.tolist() == [0, 1, 3, 4, 5]


def test_bad_input_of_the_solver_is_named() -> None:
    ones = np.ones(3)
    with pytest.raises(ValueError, match=r"numbers = \[4\].*1 to 3"):
        earliest(ones, ones, ones, 1.0, np.array([4]))
    with pytest.raises(ValueError, match="band_hz = 0 must be above 0"):
        earliest(ones, ones, ones, 0.0, np.array([1]))
