"""Noise and channels: closed forms against optimisers and draws, uncoded links as they run, and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import NonlinearConstraint, minimize

from fedlam_app import checks
from fedlam_app.base.keys import rng
from fedlam_app.client_app import app
from fedlam_app.config import ConfigError, Scalar, parse
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy import channel
from fedlam_app.privacy.accounting import Ledger, epsilon_of, rdp
from fedlam_app.privacy.schedule import Prices, by_channel, even_share, late_weights, rescaled, variances
from strategies.base import Federation
from strategies.noise_plan import ByChannel, Even, Late
from strategies.noised import Noised
from strategies.participation import Turn
from strategies.private_air import PrivateAir
from tests.fleet_runs import federation_of
from tests.tiny import tiny_text_run

Flat = dict[str, Scalar]
DELTA, ROUNDS = 1e-5, 4


# --- closed forms -----------------------------------------------------------------------------------------


def test_the_joint_power_is_what_an_optimiser_finds() -> None:
    """The loudest signal, over (a^2, a^2 s^2), of which both constraints are linear."""
    power, signal, wanted = 1.0, 1.0 / 30.0, 4.0
    for gain in (0.05, 0.5, 3.0, 100.0):
        noise = 0.5 / gain
        found = minimize(
            lambda x: -x[0],
            [0.1, 0.1],
            bounds=[(1e-9, None), (0.0, None)],
            constraints=[
                {"type": "ineq", "fun": lambda x: power - x[0] * signal - x[1]},
                {"type": "ineq", "fun": lambda x, n=noise: x[1] + n - wanted * x[0]},
            ],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        sent = channel.orthogonal(gain, power, 0.5, signal, wanted)
        free = 0.5 / (gain * power / signal) >= wanted
        assert float(sent.amplitude) == pytest.approx(power / signal if free else found.x[0], rel=1e-5)


def test_over_the_air_the_numbers_of_one_example() -> None:
    """K = 10, |h| = 0.192, C = 1, S = 8, d = 1000, N0 = 1, z = 2."""
    parts = {0.1: (4.167, 0.0), 1.0: (1.841, 0.781), 10.0: (0.995, 1.735), 100.0: (0.350, 1.969)}
    for power, (from_air, artificial) in parts.items():
        sent = channel.together(np.full(10, 0.192**2), power, 1.0, 0.064, 4.0)
        assert float(sent.amplitude) ** -0.5 == pytest.approx(from_air, abs=1e-3)
        assert (10.0 * float(sent.artificial)) ** 0.5 == pytest.approx(artificial, abs=1e-3)
        weakest = float(sent.amplitude) / 0.192**2
        assert float(channel.power(weakest, sent.artificial, 0.064)) == pytest.approx(power, rel=1e-12)


def test_in_the_worst_case_the_noise_is_there_and_the_power_kept() -> None:
    draw = rng(7, "rayleigh")
    mean = 10.0 ** draw.uniform(-1.0, 3.0, 1000)
    snr, z = mean * draw.exponential(size=1000), 2.0
    gain, signal = channel.worst(snr, mean, 8.0, 3.0), 1.0 / 384.0
    sent = channel.orthogonal(gain, 1.0, channel.REAL_SHARE, signal, z**2)
    at_worst = channel.received(gain, channel.REAL_SHARE, sent.amplitude, sent.artificial)
    assert (np.sqrt(at_worst) >= z * (1.0 - 1e-12)).all()
    assert (channel.power(sent.amplitude, sent.artificial, signal) <= 1.0 + 1e-9).all()
    # The mutant that trusts the estimate is caught by the same draws.
    naive = channel.orthogonal(snr, 1.0, channel.REAL_SHARE, signal, z**2)
    short = channel.received(gain, channel.REAL_SHARE, naive.amplitude, naive.artificial)
    assert (np.sqrt(short) < z).mean() > 0.9


def test_simulated_noise_is_that_of_the_formulas() -> None:
    draw, count = rng(7, "simulated"), 400_000
    sent = channel.orthogonal(3.0, 1.0, 0.5, 0.01, 1.0)
    a, s = float(sent.amplitude) ** 0.5, float(sent.artificial) ** 0.5
    assert s > 0.0
    x = 0.1 * np.sin(np.arange(count))
    y = 3.0**0.5 * a * (x + s * draw.standard_normal(count)) + 0.5**0.5 * draw.standard_normal(count)
    off = y / (3.0**0.5 * a) - x
    wanted = float(channel.received(3.0, 0.5, sent.amplitude, sent.artificial))
    assert off.var() == pytest.approx(wanted, rel=0.02)
    assert wanted == pytest.approx(1.0, rel=1e-12)


# --- schedules --------------------------------------------------------------------------------------------


def test_late_weights_save_what_an_optimiser_finds() -> None:
    weights = late_weights(20, 0.9)
    v = variances(weights, 1.0)
    assert (weights * variances(weights, 5.0)).sum() == pytest.approx(32.2, abs=0.05)
    assert (weights * v).sum() / (20.0 * weights.sum()) == pytest.approx(0.917, abs=1e-3)
    found = minimize(
        lambda p: float((weights / p).sum()) / 100.0,
        np.full(20, 0.05),
        jac=lambda p: -weights / p**2 / 100.0,
        bounds=[(1e-4, 1.0)] * 20,
        constraints=NonlinearConstraint(lambda p: p.sum(), 1.0, 1.0, jac=lambda p: np.ones((1, 20))),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    np.testing.assert_allclose(1.0 / v, found.x, rtol=1e-5)
    assert float((weights * v).sum()) / 100.0 == pytest.approx(found.fun, rel=1e-9)


def test_the_share_of_good_channels_is_what_an_optimiser_finds() -> None:
    d = rng(7, "distortion").uniform(0.1, 2.0, 8)
    p = by_channel(d, 4.0)
    found = minimize(
        lambda p: -float((p / (1.0 + p * d)).sum()),
        np.full(8, 0.5),
        jac=lambda p: -1.0 / (1.0 + p * d) ** 2,
        bounds=[(1e-6, 4.0)] * 8,
        constraints=NonlinearConstraint(lambda p: p.sum(), 4.0, 4.0, jac=lambda p: np.ones((1, 8))),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(p, found.x, rtol=1e-5)


weights_or_noises = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=30).map(np.array)


@given(weights=weights_or_noises, budget=st.floats(0.1, 50.0))
def test_no_schedule_is_worse_than_an_even_one(weights: NDArray[np.float64], budget: float) -> None:
    count = len(weights)
    v, p = variances(weights, budget), by_channel(weights, budget)
    assert (1.0 / v).sum() == pytest.approx(budget) and p.sum() == pytest.approx(budget)
    assert (weights * v).sum() <= weights.sum() * count / budget * (1.0 + 1e-12)
    even = (1.0 / (count / budget + weights)).sum()
    assert (1.0 / (1.0 / p + weights)).sum() >= even * (1.0 - 1e-12)


@given(qualities=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=40), planned=st.integers(1, 40))
def test_who_knows_the_past_alone_never_spends_more_than_there_is(
    qualities: list[float], planned: int
) -> None:
    left, total = float(planned), 0.0
    for count, quality in enumerate(qualities):
        mean = float(np.mean(qualities[: count + 1]))
        price = even_share(left, planned - count, quality, mean)
        assert 0.0 <= price <= left
        left, total = left - price, total + price
    assert total <= planned * (1.0 + 1e-12)
    if len(qualities) >= planned:
        assert total == pytest.approx(planned)


@pytest.mark.parametrize(("q", "z", "steps"), [(0.05, 1.0, 10), (0.2, 3.0, 5), (1.0, 4.0, 1)])
def test_scaled_factors_land_on_the_even_plans_epsilon(q: float, z: float, steps: int) -> None:
    shape = np.sqrt(variances(late_weights(12, 0.7), 12.0))
    factors = rescaled(shape, q, z, steps, DELTA)
    even = epsilon_of(rdp(q, z) * 12 * steps, DELTA)
    ledger = Ledger(np.inf, DELTA, events=[(q, z * f, steps) for f in factors.tolist()])
    assert even - 0.01 <= ledger.epsilon <= even + 1e-9
    if q < 1.0 and z < 2.0:  # priced as Gaussians, the same plan would have passed its budget
        naive = Ledger(np.inf, DELTA, events=[(q, z * f, steps) for f in shape.tolist()])
        assert naive.epsilon > even


@settings(max_examples=20, deadline=None)
@given(shares=st.lists(st.floats(0.01, 4.0), min_size=1, max_size=10))
def test_what_prices_allow_is_within_the_even_plans_epsilon(shares: list[float]) -> None:
    q, z, steps, count = 0.05, 1.2, 4, 10
    prices, left, spent = Prices(q, z, float(steps * count), DELTA), float(count), np.zeros_like(rdp(q, z))
    for share in shares:
        factor, cost = prices.factor(min(share, left))
        if cost <= left:
            left, spent = left - cost, spent + rdp(q, z * factor) * steps
    assert epsilon_of(spent, DELTA) <= epsilon_of(rdp(q, z) * steps * count, DELTA) + 1e-9


# --- in runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    flat = tiny_text_run(tmp_path_factory.mktemp("texts"))
    return flat | {
        "results": str(tmp_path_factory.mktemp("results") / "run"),
        "strategy": "fedsgd-lora",
        "split.heads": "frozen",
        "wire.jacobian": "fp32",
        "fleet.profiles": "mixed",
        "fleet.on-share": 1.0,
        "wireless.radius-m": 150.0,
        "wireless.transport": "analog",
        "selection.policy": "random",
        "privacy.mechanism": "jacobian",
        "train.rounds": ROUNDS,
        "federation.supernodes": 1,
    }


def rounds(federation: Federation, flat: Flat, first: int = 1, last: int = ROUNDS) -> Federation:
    grid = InProcessGrid(app, 1, flat)
    for number in range(first, last + 1):
        assert federation.train_round(grid, number).failures == []
    return federation


def spent(federation: Federation) -> list[float]:
    return [Ledger.from_json(text).epsilon for text in federation.ledgers.values()]


def counted_folds(federation: Federation) -> list[int]:
    """Return a list that fills with the devices whose results the rule is given."""
    found: list[int] = []
    fold = federation.algorithm.fold

    def counted(device: int, vector: NDArray[Any], weight: float) -> None:
        found.append(device)
        fold(device, vector, weight)

    federation.algorithm.fold = counted  # type: ignore[method-assign]
    return found


def fresh(base: Flat, tmp_path: Path, **keys: Scalar) -> Flat:
    more = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return base | more | {"results": str(tmp_path / "run")}


def test_uncoded_jacobians_come_with_the_noise_of_the_formula(base: Flat, tmp_path: Path) -> None:
    """The device's own code adds its part, the link the receiver's: each as the formula has it."""
    flat = fresh(base, tmp_path, privacy__count_channel_noise=True, wireless__tx_power_dbm=-5.0)
    checks.check(parse(flat))
    federation: Any = federation_of(flat)
    link, found, wanted = federation.link, [], []
    sent = link.jacobians
    rows_of: dict[tuple[int, int], NDArray[Any]] = {}

    def as_sent(device: int, step: int, up: object, rows: int) -> NDArray[Any]:
        rows_of[device, step] = sent(device, step, up, rows)
        return rows_of[device, step]

    link.jacobians = as_sent
    heard = link.receiver.rows

    def as_heard(device: int, step: int, rows: NDArray[Any]) -> NDArray[Any]:
        turn, place = federation.turn, federation.turn.ids.index(device)
        got = heard(device, step, rows)
        noise = (got - rows_of[device, step]) * len(rows)
        found.append(noise.astype(np.float64).ravel() / turn.receiver[place])
        z, free = federation.hands.participation._z[device], turn.free[place]
        own = rows.astype(np.float64) * len(rows)  # clipped to 1 over 768 entries: nearly all is noise
        wanted.append((own.std() ** 2 - 1.0 / own.shape[1], max(0.0, z**2 - free**2)))
        return got

    link.receiver.rows = as_heard
    rounds(federation, flat)
    noise = np.concatenate(found)
    assert noise.std() == pytest.approx(1.0, rel=0.02) and abs(noise.mean()) < 4.0 / len(noise) ** 0.5
    own, asked = np.array(wanted).mean(axis=0)
    assert own == pytest.approx(asked, rel=0.02)
    said = federation.hands.participation.summary()
    assert 0.0 < said["z_artificial"] < said["z_asked"] < said["z_effective"]
    assert all(7.99 <= epsilon <= 8.0 for epsilon in spent(federation))  # the whole z is charged


def test_uncounted_the_devices_add_everything(base: Flat, tmp_path: Path) -> None:
    flat = fresh(base, tmp_path)
    said = rounds(federation_of(flat), flat).hands.participation.summary()
    assert said["z_artificial"] == pytest.approx(said["z_asked"]) and said["z_effective"] > said["z_asked"]


@pytest.mark.parametrize("strategy", ["fedavg-lora", "flexlora"])
def test_uncoded_updates_come_with_the_noise_of_their_snr(base: Flat, tmp_path: Path, strategy: str) -> None:
    """Any rule, for every device is heard apart; what does not move gets noise of the update's own size."""
    flat = fresh(base, tmp_path, strategy=strategy, privacy__mechanism="none")
    federation = federation_of(flat)
    receiver, ratios = federation.hands.receiver, []
    vector = receiver.vector

    def as_heard(device: int, sent: NDArray[Any]) -> NDArray[Any]:
        got = vector(device, sent)
        turn = receiver.turn
        start = federation.algorithm.models()[0]
        size = np.sqrt(np.mean((sent - start).astype(np.float64) ** 2))
        snr = turn.snr[turn.ids.index(device)]
        ratios.append((got - sent).astype(np.float64) / (size * (0.5 / snr) ** 0.5))
        return got

    receiver.vector = as_heard  # type: ignore[method-assign]
    rounds(federation, flat, last=2)
    assert np.concatenate(ratios).std() == pytest.approx(1.0, rel=0.02)


def test_the_air_sum_has_the_noise_that_was_asked_for(base: Flat, tmp_path: Path) -> None:
    keys: Flat = {"wireless.air": "inversion", "wireless.transport": "air", "privacy.noise-multiplier": 2.0}
    flat = fresh(base, tmp_path, strategy="ffa-lora", privacy__mechanism="client") | keys
    flat |= {"privacy.count-channel-noise": True, "wireless.tx-power-dbm": 0.0}
    checks.check(parse(flat))
    federation = federation_of(flat)
    air = federation.hands.reception
    assert isinstance(air, PrivateAir)
    size = federation.algorithm.layout.size
    turn = Turn(ids=[0, 1, 2], steps=[1] * 3, factors=[1.0] * 3, snr=[0.5, 2.0, 9.0], mean_snr=[1.0] * 3)
    travels, noise = air._travels(1), []
    expected = None
    for number in range(1, 9):
        air.begin(turn)
        for k in turn.ids:
            air.fold(k, air.start.astype(np.float32), 1.0)
        folded: list[NDArray[Any]] = []
        air.algorithm.fold = lambda device, vector, weight, own=folded: own.append(vector)  # type: ignore
        air.end(number)
        noise.append((folded[0] - air.start)[travels] * air.expected)
        sent = channel.together(turn.snr, 1.0, air.counted, 1.0 / int(travels.sum()), 4.0)
        expected = 3.0 * float(sent.artificial) + channel.REAL_SHARE / float(sent.amplitude)
        assert (folded[0][~travels] == air.start[~travels]).all()
    assert expected is not None and expected > 4.0 and len(travels) == size
    assert np.concatenate(noise).std() == pytest.approx(expected**0.5, rel=0.02)
    assert air.summary()["z_artificial"] < 2.0 < air.summary()["z_effective"]


@pytest.mark.parametrize("schedule", ["late", "channel"])
@pytest.mark.parametrize("mechanism", ["jacobian", "dp-sgd", "client"])
def test_schedules_spend_what_even_rounds_do_and_go_on_after_a_resume(
    base: Flat, tmp_path: Path, schedule: str, mechanism: str
) -> None:
    strategy = "fedsgd-lora" if mechanism == "jacobian" else "ffa-lora"
    own: Flat = {"strategy": strategy, "privacy.mechanism": mechanism, "privacy.schedule": schedule}
    flat = fresh(base, tmp_path) | own
    checks.check(parse(flat))
    federation = rounds(federation_of(flat), flat)
    least = 7.0 if mechanism == "dp-sgd" and schedule == "channel" else 7.98  # prices come in steps
    assert all(least <= epsilon <= 8.0 + 1e-9 for epsilon in spent(federation))
    # Devices keep their ledgers, and would be charged again; the server's are in its state.
    again = flat if mechanism == "client" else flat | {"results": str(tmp_path / "again")}
    saved = rounds(federation_of(again), again, last=2).state()
    other = federation_of(again)
    other.load({key: np.array(value) for key, value in saved.items()})
    rounds(other, again, first=3)
    ours, theirs = federation.state(), other.state()
    for key in ours:
        if key.startswith("fleet.noise.") or key == "models":
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    factors = federation.hands.participation.summary()["noise_factor"]
    assert factors == other.hands.participation.summary()["noise_factor"] != 1.0


def test_late_rounds_have_less_noise_and_good_channels_too() -> None:
    config = parse({"job": "train", "privacy.mechanism": "jacobian", "train.devices": 2, "train.cohort": 0})
    even = Even(config, np.array([40.0, 40.0]), 20)
    even.each, even.total, even.own = 1, 20, 20
    late = Late(even, 0.9)
    turn = Turn(ids=[0, 1], steps=[1, 1], factors=[1.0, 1.0], snr=[1.0, 4.0])
    by_round = np.array([late.factors(number, turn)[0] for number in range(1, 21)])
    assert (np.diff(by_round) < 0.0).all() and (by_round**-2.0).sum() == pytest.approx(20.0)
    plan, draw, cost = ByChannel(even, common=False), rng(7, "fades"), np.zeros(2)
    gains, even_gain = 0.0, 0.0
    for number in range(1, 21):
        snr = draw.exponential(size=2) + 0.05
        turn = Turn(ids=[0, 1], steps=[1, 1], factors=[1.0, 1.0], snr=snr.tolist())
        factors = np.array(plan.factors(number, turn))
        assert factors.tolist() == plan.factors(number, turn)  # asked again, said again
        cost += factors**-2.0
        gains += (1.0 / (factors**2 + 1.0 / snr)).sum()
        even_gain += (1.0 / (1.0 + 1.0 / snr)).sum()
        plan.settle()
    np.testing.assert_allclose(cost, 20.0)
    assert gains > even_gain


def test_a_lost_packet_is_charged_and_not_folded(base: Flat, tmp_path: Path) -> None:
    lossy: Flat = {"wireless.transport": "ofdma", "wireless.loss": "rayleigh", "wireless.radius-m": 1000.0}
    for mechanism, strategy in (("jacobian", "fedsgd-lora"), ("dp-sgd", "fedavg-lora")):
        flat = fresh(base, tmp_path / mechanism, privacy__mechanism=mechanism, strategy=strategy) | lossy
        federation = federation_of(flat)
        folds = counted_folds(federation)
        rounds(federation, flat)
        said = federation.hands.participation.summary()
        assert said["lost"] > 0 and len(folds) == said["arrived"]
        books = [Ledger.from_json(text) for text in federation.ledgers.values()]
        if mechanism == "dp-sgd":
            steps = parse(flat).train.local_steps
            assert sum(n for book in books for _, _, n in book.events) == steps * said["trained"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"wire.jacobian": "int8"}, "'wireless.transport' = 'analog' is not allowed with 'wire.jacobian'"),
        (
            {"selection.mode": "asynchronous"},
            "'analog' is not allowed with 'selection.mode' = 'asynchronous'",
        ),
        ({"strategy": "fedbuff"}, "'analog' is not allowed with 'strategy' = 'fedbuff'"),
        ({"fleet.speeds": __file__}, "'analog' is not allowed with 'fleet.speeds'"),
        (
            {"privacy.mechanism": "logit", "privacy.count-channel-noise": True},
            "it counts where what is clipped",
        ),
        (
            {"wireless.transport": "ofdma", "privacy.count-channel-noise": True},
            "it counts where what is clipped",
        ),
        (
            {
                "privacy.count-channel-noise": True,
                "federation.placement": "sites",
                "privacy.randomness": "device",
                "federation.supernodes": 4,
            },
            "whose real links are digital",
        ),
        ({"privacy.mechanism": "release-once", "privacy.schedule": "late"}, "it must be 'uniform', or"),
        (
            {"wireless.transport": "ofdma", "privacy.schedule": "channel"},
            "every channel is as good as another",
        ),
        ({"fleet.profiles": "none", "privacy.schedule": "channel"}, "where there is no channel"),
        (
            {"privacy.mechanism": "client", "wireless.transport": "air", "wireless.air": "least-error"},
            "which drowns weak devices",
        ),
        (
            {
                "privacy.mechanism": "client",
                "wireless.transport": "air",
                "wireless.air": "inversion",
                "privacy.quantile": 0.5,
            },
            "the sum is all that is heard",
        ),
        ({"selection.policy": "oort"}, "asks devices for their losses"),
    ],
)
def test_what_cannot_be_is_refused(base: Flat, keys: Flat, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checks.check(parse(base | keys))


def test_digital_runs_with_even_budgets_are_left_alone(base: Flat, tmp_path: Path) -> None:
    flat = fresh(base, tmp_path, wireless__transport="ofdma")
    assert not isinstance(federation_of(flat).hands.participation, Noised)
