"""Device-level privacy: sensitivity, noise, equal weights, ledgers, coins, the clip's quantile, and runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats

from fedlam_app import checks
from fedlam_app.base.layout import Layout
from fedlam_app.client_app import app
from fedlam_app.config import ConfigError, Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy import adaptive_clip
from fedlam_app.privacy.accounting import Ledger, joint
from fedlam_app.privacy.adaptive_clip import clipped, sum_noise
from fedlam_app.tasks import TASKS
from strategies.base import Federation
from strategies.device_dp import DeviceDp
from strategies.fedavg_lora import FedAvgLora
from strategies.participation import Turn
from strategies.rolora import RoLora
from tests.fleet_runs import ordered
from tests.split_runs import text_run, tiny_backbones, with_keys  # noqa: F401  (a fixture)
from tests.tiny import tiny_mixture_run

Flat = dict[str, Scalar]
Vector = NDArray[np.float64]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("FEDLAM_CACHE", str(tmp_path_factory.mktemp("cache")))


def dp_run(**keys: Scalar) -> Flat:
    base: Flat = {"strategy": "fedavg-lora", "privacy.mechanism": "client", "federation.supernodes": 1}
    return with_keys(tiny_mixture_run() | base, **keys)


NOISELESS: Flat = {"privacy.target-epsilon": math.inf, "privacy.clip": 1e9}


def reception(
    kind: type[DeviceDp] = DeviceDp,
    size: int = 6,
    rule: Any = FedAvgLora,
    layout: Layout | None = None,
    **keys: Scalar,
) -> DeviceDp:
    """A reception around a rule whose model is zero, in a world of its own."""
    config = parse(dp_run(**{"train__devices": 8, "privacy__target_epsilon": math.inf, **keys}))
    algorithm = rule(config)
    start = np.zeros(size, np.float32)
    algorithm.init(start, range(config.train.devices), layout or Layout(size, ()))
    return kind(algorithm)


def heard(dp: DeviceDp, updates: Vector, number: int = 1, weights: Any = None, noise: float = 1.0) -> Vector:
    """One step of these updates (K, p); returns how the model moved, times m."""
    ids = list(range(len(updates)))
    before = dp.algorithm.models()[0].astype(np.float64)
    dp.begin(Turn(ids=ids, steps=[1] * len(ids), factors=[1.0] * len(ids), noise=[noise] * len(ids)))
    for k in ids:
        dp.fold(k, before + updates[k], 1.0 if weights is None else weights[k])
    if dp.members or dp.alone:
        dp.end(number)
        dp.algorithm.step()
    return (dp.algorithm.models()[0] - before) * dp.expected


def federation_of(flat: Flat) -> Federation:
    config = parse({**flat, "federation.supernodes": 1})
    task = TASKS[config.task](config)
    return federate(config, "{}", task, task.build_model())


def trained(flat: Flat, resume_after: int = 0) -> tuple[Federation, InProcessGrid]:
    federation = federation_of(flat)
    grid = InProcessGrid(app, 1, flat)
    for number in range(1, parse(flat).train.rounds + 1):
        federation.train_round(grid, number)
        if number == resume_after:
            saved = {key: np.array(value) for key, value in federation.state().items()}
            federation = federation_of(flat)
            federation.load(saved)
    return federation, grid


def spent(federation: Federation) -> dict[int, float]:
    return {k: Ledger.from_json(text).epsilon for k, text in federation.ledgers.items()}


def dp_of(federation: Federation) -> DeviceDp:
    dp = federation.hands.reception
    assert isinstance(dp, DeviceDp)
    return dp


def fails(check: Callable[[type[DeviceDp]], None], mutant: type[DeviceDp]) -> None:
    check(DeviceDp)
    with pytest.raises(AssertionError):
        check(mutant)


# --- mutants: what the checks below must find -------------------------------------------------------------


class ByExamples(DeviceDp):
    """Weights as FedAvg has them."""

    def fold(self, device: int, vector: Any, weight: float) -> None:
        update, _ = clipped(vector.astype(np.float64) - self.start, self.clip)
        self.members.add(device)
        self.count += 1.0
        self.total += weight * update


class TwiceDivided(DeviceDp):
    """Noise that is divided by the cohort before it is added to the sum, and with the sum again."""

    def _sum_noise(self, z: float) -> float:
        return super()._sum_noise(z) / self.expected


class Unclipped(DeviceDp):
    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        self.clip = 1e9


# --- clipping and sensitivity -----------------------------------------------------------------------------

VALUES = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e38, -1e38, 1e-38]))


@given(hnp.arrays(np.float64, 5, elements=VALUES), st.floats(1e-6, 1e6))
def test_what_is_clipped_has_at_most_that_norm_and_its_direction(update: Vector, clip: float) -> None:
    found, norm = clipped(update, clip)
    assert np.linalg.norm(found) <= clip * (1 + 1e-12)
    assert norm == pytest.approx(np.linalg.norm(update), rel=1e-12)
    if norm <= clip:
        np.testing.assert_array_equal(found, update)
    else:
        np.testing.assert_allclose(found * (norm / clip), update, rtol=1e-9, atol=1e-12 * norm)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_what_is_not_finite_counts_nothing_and_is_said(value: float) -> None:
    dp, said = reception(), list[str]()
    dp.tells({}, said.append)
    updates = np.ones((3, 6)) * 0.1
    updates[1, 2] = value
    moved = heard(dp, updates)
    np.testing.assert_allclose(moved, 0.2, rtol=1e-6)
    assert said == ["device 1 was left out: its update is not finite"]
    assert dp.books.open.keys() == {0, 2}


def test_updates_of_zero_survive() -> None:
    np.testing.assert_array_equal(heard(reception(), np.zeros((3, 6))), 0.0)


def bounded(kind: type[DeviceDp]) -> None:
    """Removing any device moves the sum by at most C, whatever it sent and says that it weighs."""

    dp = reception(kind)

    @settings(max_examples=40, phases=[Phase.generate])
    @given(
        hnp.arrays(np.float64, (4, 6), elements=st.floats(-1e3, 1e3)),
        st.lists(st.floats(1e-3, 1e4), min_size=4, max_size=4),
        st.floats(0.01, 10.0),
        st.integers(0, 3),
    )
    def check(updates: Vector, weights: list[float], clip: float, out: int) -> None:
        dp.clip, sums = clip, []
        for kept in (range(4), [k for k in range(4) if k != out]):
            dp.begin(Turn(ids=list(range(4)), steps=[1] * 4, factors=[1.0] * 4))
            for k in kept:
                dp.fold(k, updates[k], weights[k])
            sums.append(dp.total)
        assert np.linalg.norm(sums[0] - sums[1]) <= clip * (1 + 1e-9) + 1e-12

    check()


@pytest.mark.parametrize("mutant", [ByExamples, Unclipped])
def test_a_device_moves_the_sum_by_at_most_c(mutant: type[DeviceDp]) -> None:
    fails(bounded, mutant)


def test_a_device_is_heard_once_and_only_where_it_was_asked() -> None:
    dp = reception()
    dp.begin(Turn(ids=[2], steps=[1], factors=[1.0]))
    dp.fold(2, np.ones(6), 1.0)
    for device in (2, 3):
        with pytest.raises(ValueError, match=f"device {device} is not of this step"):
            dp.fold(device, np.ones(6), 1.0)


def test_what_devices_say_of_weight_does_not_matter() -> None:
    def check(kind: type[DeviceDp]) -> None:
        updates = np.random.default_rng(1).standard_normal((4, 6))
        plain, heavy = (heard(reception(kind), updates, weights=w) for w in (None, [1000.0, 10.0, 1.0, 0.1]))
        np.testing.assert_array_equal(plain, heavy)

    fails(check, ByExamples)


def test_a_sum_of_vectors_that_were_clipped_elsewhere_is_the_same() -> None:
    updates = 0.1 * np.random.default_rng(2).standard_normal((4, 6))
    apart, together = (reception(privacy__quantile=0.5, privacy__clip=0.2) for _ in range(2))
    heard(apart, updates)
    together.begin(Turn(ids=[0, 1, 2, 3], steps=[1] * 4, factors=[1.0] * 4))
    start = together.start
    whole = sum(np.linalg.norm(update) <= 0.2 for update in updates)
    together.fold_sum(sum(start + clipped(update, 0.2)[0] for update in updates), 4.0, inside=float(whole))
    together.end(1)
    together.algorithm.step()
    np.testing.assert_allclose(together.algorithm.models(), apart.algorithm.models(), rtol=1e-6, atol=1e-9)
    assert together.clip == apart.clip != 0.2
    assert together.books.open.keys() == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="a sum of 1 updates more, of 4 devices"):
        together.fold_sum(start, 1.0)


# --- noise ------------------------------------------------------------------------------------------------

BIG = 20_000


def as_charged(kind: type[DeviceDp]) -> None:
    """What the model's recipients see of nothing at all is z C on the sum: as Gaussian as can be told."""
    dp = reception(kind, BIG, privacy__noise_multiplier=1.5, privacy__clip=0.5, privacy__target_epsilon=1e3)
    draws = [heard(dp, np.zeros((2, BIG)), number) / 0.75 for number in (1, 2)]
    for own in draws:
        assert own.std() == pytest.approx(1.0, rel=0.02)
        assert stats.kstest(own, "norm").pvalue > 0.01
    assert abs(np.corrcoef(draws)[0, 1]) < 4 / np.sqrt(BIG)


def test_noise_is_gaussian_and_as_large_as_is_charged() -> None:
    fails(as_charged, TwiceDivided)


def test_the_same_step_gets_the_same_noise_and_any_other_another() -> None:
    updates = np.full((3, 400), 1e-3)
    keys: Flat = {"size": 400, "privacy__noise_multiplier": 1.0, "privacy__target_epsilon": 1e3}  # type: ignore
    first, again = (heard(reception(**keys), updates) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = updates.copy()
    other[0, 0] *= 1.0 + 1e-12
    for moved in (
        heard(reception(**keys), other),
        heard(reception(**keys), updates, number=2),
        heard(reception(**{**keys, "seed": 8}), updates),
        heard(reception(**{**keys, "privacy__randomness": "device"}), updates),
    ):
        assert abs(np.corrcoef(first, moved)[0, 1]) < 0.25


def test_a_secret_of_the_servers_own_outlives_the_process() -> None:
    keys: Flat = {
        "privacy__noise_multiplier": 1.0,
        "privacy__randomness": "device",
        "privacy__target_epsilon": 1e3,
    }
    first, again = (heard(reception(**keys), np.ones((2, 6))) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_schedule_scales_the_noise_and_what_is_charged() -> None:
    dp = reception(size=BIG, privacy__noise_multiplier=1.0, privacy__target_epsilon=1e3)
    assert heard(dp, np.zeros((2, BIG)), noise=1.7).std() == pytest.approx(1.7, rel=0.02)
    assert dp.books.of(0).events == [(1.0, 1.7, 1)]


def test_parts_that_do_not_travel_get_no_noise() -> None:
    layout = Layout.of([("x.lora_A.w", (2, 3)), ("x.lora_B.w", (4, 2)), ("head", (5,))])
    dp = reception(
        size=layout.size,
        rule=RoLora,
        layout=layout,
        privacy__noise_multiplier=1.0,
        privacy__target_epsilon=1e3,
    )
    for number, still in ((1, "a"), (2, "b")):
        moved = heard(dp, np.zeros((2, layout.size)), number)
        np.testing.assert_array_equal(moved != 0.0, ~layout.part(still))


def test_it_is_written_down_before_it_is_released() -> None:
    dp = reception(privacy__noise_multiplier=1.0, privacy__target_epsilon=1e3)
    fold, seen = dp.algorithm.fold, list[float]()

    def watched(device: int, vector: Any, weight: float) -> None:
        seen.append(dp.books.of(1).epsilon)
        fold(device, vector, weight)

    dp.algorithm.fold = watched  # type: ignore[method-assign]
    heard(dp, np.ones((2, 6)))
    assert seen == [pytest.approx(Ledger(1, 1e-5, [(1.0, 1.0, 1)]).epsilon)]


def test_the_ledger_does_not_let_totals_be_tried() -> None:
    names = []
    for secret in (b"one", b"two"):
        dp = reception(privacy__noise_multiplier=1.0)
        dp.__dict__["_secret"] = secret
        heard(dp, np.ones((2, 6)))
        names.append(dp.books.of(0).parts[""])
    assert names[0] != names[1]


# --- the clip that follows a quantile ---------------------------------------------------------------------


@given(st.floats(0.01, 10.0), st.floats(1.01, 100.0))
def test_sum_and_bits_together_have_the_noise_that_is_charged(z: float, more: float) -> None:
    sigma_b = 0.5 * z * more
    assert joint(sum_noise(z, sigma_b), 2.0 * sigma_b) == pytest.approx(z, rel=1e-9)


def test_bits_that_would_tell_too_much_are_refused() -> None:
    with pytest.raises(ValueError, match="tell more by themselves"):
        sum_noise(1.0, 0.5)
    assert sum_noise(0.0, 0.0) == 0.0


def clip_after(rounds: int, start: float, z: float, quantile: float = 0.5, cohort: int = 100) -> float:
    """C after some rounds of lognormal norms around 1, over their quantile."""
    dp = reception(
        size=3,
        train__devices=cohort,
        privacy__clip=start,
        privacy__quantile=quantile,
        privacy__noise_multiplier=z,
        privacy__target_epsilon=1e6 if z else math.inf,
    )
    draw = np.random.default_rng(3)
    directions = draw.standard_normal((cohort, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    for number in range(1, rounds + 1):
        heard(dp, directions * np.exp(0.5 * draw.standard_normal(cohort))[:, None], number)
    return float(dp.clip / np.exp(0.5 * stats.norm.ppf(quantile)))


@pytest.mark.parametrize("z", [0.0, 1.0])
@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_clip_finds_the_quantile(start: float, z: float) -> None:
    assert clip_after(60, start, z) == pytest.approx(1.0, rel=0.1)


def test_the_clip_finds_another_quantile() -> None:
    """It falls by at most eta (1 - gamma) = 0.04 a step: from 10 that takes longer."""
    assert clip_after(120, 10.0, 1.0, quantile=0.8) == pytest.approx(1.0, rel=0.1)


def test_flowers_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(clip: float, share: float, quantile: float, rate: float) -> float:
        return clip * math.exp(-rate * ((1.0 - share) - quantile))

    monkeypatch.setattr("strategies.device_dp.moved", wrong)
    assert clip_after(60, 0.1, 1.0) < 0.01 and clip_after(60, 10.0, 1.0) > 100.0


def test_the_bits_noise_is_there() -> None:
    """Without updates the share is 1/2 and noise: C moves by eta sigma_b / m a step."""
    dp = reception(size=1, privacy__quantile=0.5, privacy__noise_multiplier=0.7, privacy__target_epsilon=1e6)
    dp.z, steps = 0.7, list[float]()
    for number in range(1, 401):
        before = dp.clip
        heard(dp, np.zeros((1, 1)), number)  # one bit, which is whole
        steps.append(-math.log(dp.clip / before) / 0.2 - 0.5 / 8)
    assert np.std(steps) == pytest.approx(adaptive_clip.BIT_SHARE, rel=0.1)
    assert abs(np.mean(steps)) < 4 * adaptive_clip.BIT_SHARE / 20


# --- ledgers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{}, {"privacy__cohort": "poisson", "train__cohort": 2}, {"privacy__delta": 1e-3}]
)
def test_full_participation_spends_the_budget_and_no_more(keys: Flat) -> None:
    federation, _ = trained(dp_run(privacy__target_epsilon=3.0, **keys))
    found = spent(federation)
    assert set(found) == {0, 1, 2, 3}
    for epsilon in found.values():
        assert 3.0 - 0.01 <= epsilon <= 3.0


def test_a_device_is_charged_for_the_rounds_that_it_is_in() -> None:
    flat = dp_run(train__devices=6, train__cohort=2, train__rounds=5, privacy__noise_multiplier=2.0)
    federation, grid = trained(flat)
    asked = ordered(grid)
    assert len(asked) == 10
    found = spent(federation)
    assert set(found) == set(asked)
    for k, epsilon in found.items():
        assert epsilon == pytest.approx(Ledger(8.0, 1e-5, [(1.0, 2.0, asked.count(k))]).epsilon, rel=1e-12)


def test_coins_charge_everyone_for_every_round_even_of_nobody() -> None:
    flat = dp_run(
        train__devices=6,
        train__cohort=1,
        train__rounds=8,
        privacy__cohort="poisson",
        privacy__noise_multiplier=2.0,
    )
    federation = federation_of(flat)
    grid, sizes, seen = InProcessGrid(app, 1, flat), list[int](), list[bytes]()
    for number in range(1, 9):
        assert federation.train_round(grid, number).failures == []
        sizes.append(len(federation.turn.ids))  # type: ignore[attr-defined]
        seen.append(federation.algorithm.models().tobytes())
    assert 0 in sizes and len(set(sizes)) > 2
    assert len(set(seen)) == 8  # a step to which nobody came moves the model as well
    direct = Ledger(8.0, 1e-5, [(1.0 / 6.0, 2.0, 8)]).epsilon
    assert spent(federation) == dict.fromkeys(range(6), pytest.approx(direct, rel=1e-12))
    assert direct < Ledger(8.0, 1e-5, [(1.0, 2.0, 8)]).epsilon / 2


def test_coins_are_independent_and_of_the_right_chance() -> None:
    dp = reception(train__devices=50, train__cohort=10, privacy__cohort="poisson")
    came = np.stack([dp.coins(number) for number in range(400)])  # (rounds, devices)
    assert abs(came.mean() - 0.2) < 4 * np.sqrt(0.16 / came.size)
    assert stats.kstest((came.sum(1) - 10) / np.sqrt(8), "norm").statistic < 0.12
    off = np.corrcoef(came.T.astype(float))[np.triu_indices(50, 1)]
    assert np.abs(off).max() < 5 / np.sqrt(400)
    other = reception(train__devices=50, train__cohort=10, privacy__cohort="poisson", seed=8)
    assert (other.coins(1) != came[1]).any()


@pytest.mark.parametrize("cohort", ["visible", "poisson"])
def test_who_has_less_leaves_sooner_and_the_run_goes_on(cohort: str) -> None:
    flat = dp_run(privacy__device_epsilons="5.0,8.0", train__rounds=6, privacy__cohort=cohort)
    federation, grid = trained(flat)
    asked, found = ordered(grid), spent(federation)
    assert all(found[k] <= 5.0 for k in (0, 2)) and all(7.99 <= found[k] <= 8.0 for k in (1, 3))
    assert asked.count(1) == 6 and 0 < asked.count(0) < 6
    ledger = Ledger(8.0, 1e-5)
    z = ledger.calibrate(1.0, 6)
    fits = max(n for n in range(7) if Ledger(5.0, 1e-5, [(1.0, z, n)]).epsilon <= 5.0)
    assert asked.count(0) == fits


@pytest.mark.parametrize("keys", [{}, {"privacy__cohort": "poisson"}])
def test_when_all_is_spent_the_model_stays_and_nobody_is_asked(keys: Flat) -> None:
    flat = dp_run(privacy__noise_multiplier=1.0, privacy__target_epsilon=8.0, train__rounds=9, **keys)
    fits = max(n for n in range(9) if Ledger(8.0, 1e-5, [(1.0, 1.0, n)]).epsilon <= 8.0)
    assert 0 < fits < 9
    federation = federation_of(flat)
    grid, seen = InProcessGrid(app, 1, flat), list[bytes]()
    for number in range(1, 10):
        cost = federation.train_round(grid, number)
        assert bool(cost.failures) == (number == fits)
        seen.append(federation.algorithm.models().tobytes())
    assert len(set(seen)) == fits
    assert len(ordered(grid)) == 4 * fits
    assert "device 3 takes no part any more: its privacy budget is spent" in _said(flat, fits)[-1]


def _said(flat: Flat, rounds: int) -> list[str]:
    federation = federation_of(flat)
    grid = InProcessGrid(app, 1, flat)
    return [why for number in range(1, rounds + 1) for why in federation.train_round(grid, number).failures]


def test_a_schedules_dear_rounds_are_refused_and_its_cheap_ones_are_not() -> None:
    dp = reception(train__devices=2, privacy__noise_multiplier=1.0, privacy__target_epsilon=5.0)
    ids = [0, 1]
    turn = Turn(ids=ids, steps=[1, 1], factors=[1.0, 1.0], noise=[0.5, 0.5])
    assert dp.admitted(turn, 1).ids == [] and not dp.gone
    assert dp.admitted(Turn(ids=ids, steps=[1, 1], factors=[1.0, 1.0], noise=[1.0, 1.0]), 1).ids == ids


@pytest.mark.parametrize(
    "keys",
    [
        {"privacy__device_epsilons": "5.0,8.0"},
        {"privacy__cohort": "poisson", "train__cohort": 1},
        {
            "train__devices": 30,
            "privacy__quantile": 0.5,
            "privacy__noise_multiplier": 1.3,
            "mixture__examples": 16,
        },
    ],
)
def test_a_resumed_run_is_the_run(keys: Flat) -> None:
    flat = dp_run(**keys)
    whole, again = trained(flat)[0], trained(flat, resume_after=2)[0]
    ours, theirs = whole.state(), again.state()
    assert set(ours) == set(theirs)
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key], err_msg=key)
    assert whole.ledgers == again.ledgers


def test_a_killed_round_is_repeated_and_paid_once(tmp_path: Path) -> None:
    """The ledgers of the disk are ahead of the state, by the round that was killed before it was saved."""
    flat = dp_run(privacy__ledgers=str(tmp_path), privacy__target_epsilon=3.0, train__rounds=3)
    first = federation_of(flat)
    grid = InProcessGrid(app, 1, flat)
    first.train_round(grid, 1)
    saved = {key: np.array(value) for key, value in first.state().items()}
    first.train_round(grid, 2)
    killed = first.algorithm.models().copy()
    again = federation_of(flat)
    again.load(saved)
    assert spent(again) == spent(first)
    again.train_round(grid, 2)
    np.testing.assert_array_equal(again.algorithm.models(), killed)
    again.train_round(grid, 3)
    assert all(2.99 <= epsilon <= 3.0 for epsilon in spent(again).values())


@pytest.mark.parametrize("cohort", ["visible", "poisson"])
def test_what_earlier_runs_spent_counts(tmp_path: Path, cohort: str) -> None:
    flat = dp_run(privacy__ledgers=str(tmp_path), privacy__target_epsilon=3.0, privacy__cohort=cohort)
    trained(with_keys(flat, privacy__target_epsilon=2.0, seed=3))
    second, _ = trained(flat)
    assert all(2.99 <= epsilon <= 3.0 for epsilon in spent(second).values())
    assert all(len(Ledger.from_json(text).events) == 2 for text in second.ledgers.values())
    third, grid = trained(flat)
    assert ordered(grid) == [] and spent(third) == spent(second)
    with pytest.raises(ValueError, match="keeps its ledger at delta = 1e-05"):
        federation_of(with_keys(flat, privacy__delta=1e-3))


@pytest.mark.parametrize("cohort", ["visible", "poisson"])
def test_runs_side_by_side_have_one_book(tmp_path: Path, cohort: str) -> None:
    keys: Flat = {"privacy__ledgers": str(tmp_path), "privacy__noise_multiplier": 2.0, "train__rounds": 2}
    flats = [
        dp_run(seed=seed, privacy__target_epsilon=1e3, privacy__cohort=cohort, **keys) for seed in (7, 3)
    ]
    runs = [(federation_of(flat), InProcessGrid(app, 1, flat)) for flat in flats]
    for number in (1, 2):
        for federation, grid in runs:
            federation.train_round(grid, number)
    book = Ledger.from_json((tmp_path / "0.json").read_text())
    assert [steps for _, _, steps in book.events] == [4]


# --- runs -------------------------------------------------------------------------------------------------


def test_without_noise_and_with_equal_shards_it_is_fedavg() -> None:
    plain = with_keys(dp_run(mixture__spread=0.0), privacy__mechanism="none")
    ours, theirs = trained(dp_run(mixture__spread=0.0) | NOISELESS)[0], trained(plain)[0]
    np.testing.assert_allclose(ours.algorithm.models(), theirs.algorithm.models(), rtol=0, atol=1e-7)


def test_shards_of_unlike_sizes_count_alike() -> None:
    flat = dp_run(train__rounds=1, mixture__spread=1.0) | NOISELESS
    federation, vectors = federation_of(flat), list[Any]()
    dp, start = dp_of(federation), federation.algorithm.models()[0].copy()
    fold = dp.fold

    def watched(device: int, vector: Any, weight: float) -> None:
        vectors.append((vector.copy(), weight))
        fold(device, vector, weight)

    dp.fold = watched  # type: ignore[method-assign]
    federation.train_round(InProcessGrid(app, 1, flat), 1)
    rows, weights = np.stack([v for v, _ in vectors]).astype(np.float64), [w for _, w in vectors]
    assert len(set(weights)) == 4
    moved = federation.algorithm.models()[0]
    np.testing.assert_allclose(moved, rows.mean(0), rtol=0, atol=1e-7)
    assert np.abs(moved - np.average(rows, axis=0, weights=weights)).max() > 1e-4
    assert np.abs(moved - start).max() > 1e-3


def test_devices_that_vanish_are_not_charged_and_do_not_move_the_divisor() -> None:
    flat = dp_run(faults__vanish=0.4, train__rounds=1, seed=2) | NOISELESS
    federation, vectors = federation_of(flat), dict[int, Any]()
    dp, start = dp_of(federation), federation.algorithm.models()[0].astype(np.float64)
    fold = dp.fold

    def watched(device: int, vector: Any, weight: float) -> None:
        vectors[device] = vector.astype(np.float64) - start
        fold(device, vector, weight)

    dp.fold = watched  # type: ignore[method-assign]
    federation.train_round(InProcessGrid(app, 1, flat), 1)
    assert 0 < len(vectors) < 4 and federation.ledgers.keys() == vectors.keys()
    moved = federation.algorithm.models()[0] - start
    np.testing.assert_allclose(moved, sum(vectors.values()) / 4, rtol=0, atol=1e-7)


def test_a_split_run_is_fedsgd_of_equal_weights_and_is_charged_by_step(tmp_path: Path) -> None:
    base = with_keys(text_run(tmp_path), train__rounds=2, train__local_steps=2, text__partition="iid")
    dp = with_keys(base, privacy__mechanism="client") | NOISELESS
    ours, theirs = trained(dp)[0], trained(base)[0]
    np.testing.assert_allclose(ours.algorithm.models(), theirs.algorithm.models(), rtol=0, atol=1e-7)
    noised = with_keys(base, privacy__mechanism="client", privacy__target_epsilon=4.0)
    federation, _ = trained(noised)
    assert all(3.99 <= epsilon <= 4.0 for epsilon in spent(federation).values())
    assert [e[2] for e in Ledger.from_json(federation.ledgers[0]).events] == [4]
    assert math.isnan(federation.loss)
    again, _ = trained(noised, resume_after=1)
    np.testing.assert_array_equal(again.algorithm.models(), federation.algorithm.models())


def test_a_split_run_with_coins_has_steps_of_nobody(tmp_path: Path) -> None:
    flat = with_keys(
        text_run(tmp_path),
        train__rounds=5,
        train__cohort=1,
        privacy__mechanism="client",
        privacy__cohort="poisson",
        privacy__noise_multiplier=1.0,
    )
    federation, grid = trained(flat)
    assert len(ordered(grid)) < 10
    direct = Ledger(8.0, 1e-5, [(0.25, 1.0, 5)]).epsilon
    assert spent(federation) == dict.fromkeys(range(4), pytest.approx(direct))


MODES: dict[str, Flat] = {
    "synchronous": {"wireless.loss": "rayleigh"},
    "deadline": {"selection.deadline-s": 20.0},
    "over-selection": {},
    "asynchronous": {"fedbuff.buffer": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_fleet_is_charged_for_what_arrives(mode: str) -> None:
    flat = dp_run(train__devices=8, train__cohort=3, train__rounds=4, privacy__noise_multiplier=2.0)
    flat |= {"fleet.profiles": "mixed", "fleet.on-share": 0.9, "selection.policy": "random"}
    flat |= {"selection.mode": mode, **MODES[mode]}
    federation, grid = trained(flat)
    asked, dp = ordered(grid), dp_of(federation)
    assert dp.expected == (2 if mode == "asynchronous" else 3)
    events = {k: sum(e[2] for e in Ledger.from_json(text).events) for k, text in federation.ledgers.items()}
    assert events == {k: asked.count(k) for k in set(asked)}
    said = federation.hands.participation.summary()
    assert said["arrived"] == len(asked) > 0
    assert not np.isfinite(federation.state()["fleet.history.norm"]).any()  # policies learn no norms


def test_a_fleet_whose_budgets_are_spent_rests() -> None:
    flat = dp_run(train__rounds=6, privacy__noise_multiplier=1.0, privacy__target_epsilon=8.0)
    flat |= {"fleet.profiles": "mixed", "fleet.on-share": 1.0, "selection.policy": "random"}
    federation, grid = trained(flat)
    assert len(dp_of(federation).gone) == 4
    assert len(ordered(grid)) < 4 * 6
    assert max(spent(federation).values()) <= 8.0


# --- what is refused --------------------------------------------------------------------------------------

FLEET: Flat = {"fleet.profiles": "mixed"}


@pytest.mark.parametrize(
    ("flat", "why"),
    [
        ({"strategy": "central"}, "'central', where one device has everything"),
        ({"strategy": "local"}, "needs more than the sum"),
        ({"strategy": "fedsgd-lora", "split.heads": "averaged"}, "'split.heads' = 'averaged'"),
        (FLEET | {"selection.policy": "importance"}, "'importance', which chooses by the norms"),
        (FLEET | {"privacy.cohort": "poisson"}, "'privacy.cohort' = 'poisson' is not allowed with 'fleet"),
        ({"privacy.quantile": 0.5}, "'privacy.quantile' = 0.5 is not allowed with 4 devices a step"),
        ({"job": "compare", "privacy.ledgers": "/tmp"}, "'/tmp' is not allowed with 'job' = 'compare'"),
        ({"privacy.noise-multiplier": 0.1}, "no device's privacy budget has room for one step"),
    ],
)
def test_what_would_break_the_promise_is_refused(flat: Flat, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        checks.check(parse(dp_run() | flat))


def test_what_is_left_is_allowed() -> None:
    checks.check(parse(dp_run()))
    checks.check(parse(dp_run(privacy__quantile=0.5, privacy__noise_multiplier=2.0, train__devices=60)))
