"""Rules that combine gradients on the edge server, and its optimisers: exactness, robustness, resumption."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg
from flwr.serverapp.strategy import MultiKrum as FlowerMultiKrum
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlam_app.base.keys import rng
from fedlam_app.base.layout import Layout
from fedlam_app.base.schedule import learning_rate
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.wireless.fleet import Load
from strategies.buffered import Buffered
from strategies.clock import durations
from strategies.fedbuff import FedBuff
from strategies.fedsgd_lora import FedSgdLora, Stacked, clipped
from strategies.hands import Hands, without_radio
from strategies.median import Median
from strategies.mixing import mixed
from strategies.multi_krum import MultiKrum, krum_keeps
from strategies.norm_clip import NormClip
from strategies.participation import Turn
from strategies.scaffold import Scaffold
from strategies.server_optimiser import ServerOptimiser
from strategies.splitlora import SplitLora
from strategies.trimmed_mean import TrimmedMean
from strategies.versions import Versions

RULES = (FedSgdLora, Median, TrimmedMean, MultiKrum, NormClip, Scaffold, FedBuff, SplitLora)
ROBUST = (Median, TrimmedMean, MultiKrum, NormClip)
OPTIMISERS = ("sgd", "adamw", "adam", "yogi", "adagrad")
P = 12  # length of a vector


def config(**keys: Scalar) -> RunConfig:
    """A short run whose learning rate moves at every step."""
    flat: dict[str, Scalar] = {"train.rounds": 5, "train.local-steps": 4, "train.lr": 0.05, "seed": 3}
    return parse(flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


def started(rule: type[FedSgdLora], run: RunConfig, devices: int = 6, dtype: type = np.float64) -> FedSgdLora:
    algorithm = rule(run)
    vector = rng(11, "start").standard_normal(P).astype(dtype)
    algorithm.init(vector, list(range(devices)), Layout.of([("head", (P,))]))
    return algorithm


def shard(device: int, number: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    draw = rng(5, "shard", device, number)
    return draw.standard_normal((rows, 3)), draw.standard_normal((rows, 3))


def gradient(vector: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient of mean ||x A^T B^T - y||^2 in (A (2, 3), B (3, 2)): LoRA, and not convex."""
    a, b = vector[:6].reshape(2, 3), vector[6:].reshape(3, 2)
    residual = 2.0 * (x @ a.T @ b.T - y) / len(x)  # (rows, 3)
    return np.concatenate([(b.T @ residual.T @ x).ravel(), (residual.T @ x @ a.T).ravel()])


def begun(
    rule: type[FedSgdLora], run: RunConfig, devices: int = 6, dtype: type = np.float64
) -> tuple[FedSgdLora, Hands]:
    """A rule that has started, and what a federation without a fleet works with beside it."""
    algorithm = started(rule, run, devices, dtype)
    return algorithm, without_radio(algorithm)


def play(
    algorithm: FedSgdLora,
    hands: Hands,
    steps: Sequence[int],
    silent: Callable[[int, int], bool] | None = None,
) -> None:
    """Do what a federation does: turn, models, gradients, fold in order, step, settle."""
    for number in steps:
        turn = turn_of(hands, number)
        heard = hands.begin(turn)
        models = hands.versions.models()
        for row, device in zip(hands.versions.rows(turn), turn.ids, strict=True):
            if silent is None or not silent(number, device):
                if algorithm.sequential:
                    models = hands.versions.models()
                rows = 2 + device
                g = gradient(models[row].astype(np.float64), *shard(device, number, rows))
                hands.fold(turn, device, g.astype(models.dtype), rows)
        algorithm.step()
        hands.settle(heard)


def turn_of(hands: Hands, number: int) -> Turn:
    def no_load() -> Load:
        raise AssertionError("without a fleet nobody asks for the load")

    return hands.participation.turn(number, no_load, None)


def newest(algorithm: FedSgdLora) -> np.ndarray:
    return algorithm.models()[0]


def combined(rule: type[Stacked], gradients: np.ndarray, **keys: Scalar) -> np.ndarray:
    """One combination with equal weights."""
    algorithm = rule(config(**keys))
    return algorithm.combine(range(len(gradients)), gradients, np.ones(len(gradients)))


# --- the schedule and the optimisers ----------------------------------------------------------------------


def test_at_whole_rounds_the_rate_is_torchs_cosine_after_two_rounds_of_warm_up() -> None:
    for rounds in (2, 3, 20):
        optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, rounds - 1, eta_min=0.02)
        for number in range(1, rounds + 1):
            expected = cosine.get_last_lr()[0] * (0.5 if number == 1 else 1.0)
            assert learning_rate(0.4, rounds, number) == pytest.approx(expected, rel=1e-12)
            optimiser.step()
            cosine.step()
    assert learning_rate(0.4, 1, 1) == 0.2


def test_the_rate_climbs_falls_and_never_jumps() -> None:
    rates = np.array([learning_rate(1.0, 20, step / 50) for step in range(1, 1001)])
    assert np.abs(np.diff(rates)).max() < 0.011 and rates.argmax() == 99  # the end of round 2
    assert rates[-1] == pytest.approx(0.05)
    assert (np.diff(rates[99:]) < 0).all() and (np.diff(rates[:99]) > 0).all()


TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0, betas=(0.9, 0.999), eps=1e-8),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
}


@pytest.mark.parametrize("name", TORCH)
def test_the_optimiser_is_torchs(name: str) -> None:
    ours = ServerOptimiser(config(server__optimiser=name).server, weight_decay=0.1)
    vector = rng(1, "vector").standard_normal(40)
    parameter = torch.nn.Parameter(torch.from_numpy(vector.copy()))
    theirs = TORCH[name]([parameter])
    for step in range(20):
        g = rng(1, "gradient", step).standard_normal(40) * 10.0 ** rng(1, "scale").uniform(-6, 6, 40)
        lr = 0.01 * (1 + step % 3)
        vector = ours.step(vector, g, lr)
        parameter.grad = torch.from_numpy(g)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        np.testing.assert_allclose(vector, parameter.detach().numpy(), rtol=1e-12, atol=1e-13)


def test_yogi_and_adagrad_are_the_papers() -> None:
    """Two steps by hand: b1 = 0.5, b2 = 0.75, tau = 0.5, v_0 = 0.25, lr = 1, gradients 2 then 1."""
    keys = {"server__beta_1": 0.5, "server__beta_2": 0.75, "server__epsilon": 0.5}
    seconds = {"yogi": (0.25 + 0.25 * 4.0, 1.25 - 0.25 * 1.0), "adagrad": (4.25, 5.25)}
    for name, (v_1, v_2) in seconds.items():
        optimiser = ServerOptimiser(config(server__optimiser=name, **keys).server, weight_decay=9.0)
        w_1 = optimiser.step(np.zeros(1), np.array([2.0]), 1.0)
        w_2 = optimiser.step(w_1, np.array([1.0]), 1.0)
        assert w_1[0] == pytest.approx(-1.0 / (math.sqrt(v_1) + 0.5), rel=1e-14)
        assert w_2[0] - w_1[0] == pytest.approx(-1.0 / (math.sqrt(v_2) + 0.5), rel=1e-14)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_descends_and_keeps_the_vectors_type(name: str) -> None:
    optimiser = ServerOptimiser(config(server__optimiser=name).server, weight_decay=0.0)
    vector = np.array([1.0, -2.0, 3.0], np.float32)
    start = vector.copy()
    for _ in range(300):
        vector = optimiser.step(vector, 2.0 * vector, 0.2)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) < 0.3 * np.linalg.norm(start)


@given(hnp.arrays(np.float64, 5, elements=st.floats(-1e3, 1e3)), st.floats(0.01, 100.0))
def test_clipping_is_torchs(g: np.ndarray, largest: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    parameter.grad = torch.from_numpy(g.copy())
    torch.nn.utils.clip_grad_norm_([parameter], largest)
    np.testing.assert_allclose(clipped(g, largest), parameter.grad.numpy(), rtol=1e-12, atol=1e-300)
    np.testing.assert_array_equal(clipped(g, 0.0), g)


# --- the mean ---------------------------------------------------------------------------------------------


def test_a_federation_is_the_centralised_run() -> None:
    """20 server AdamW steps on 6 unequal devices equal torch's on the pooled batch, clipping and rate too."""
    run = config(train__weight_decay=0.05, train__clip_norm=0.7)
    algorithm, hands = begun(FedSgdLora, run)
    parameter = torch.nn.Parameter(torch.from_numpy(newest(algorithm).copy()))
    optimiser = torch.optim.AdamW([parameter], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    for number in range(1, 21):
        play(algorithm, hands, [number])
        batches = [shard(device, number, 2 + device) for device in range(6)]
        x, y = (torch.from_numpy(np.concatenate(part)) for part in zip(*batches, strict=True))
        a, b = parameter[:6].reshape(2, 3), parameter[6:].reshape(3, 2)
        optimiser.zero_grad()
        ((x @ a.T @ b.T - y) ** 2).sum(1).mean().backward()
        torch.nn.utils.clip_grad_norm_([parameter], 0.7)
        optimiser.param_groups[0]["lr"] = learning_rate(0.05, 5, number / 4)
        optimiser.step()
    centralised = parameter.detach().numpy()
    assert np.abs(newest(algorithm) - centralised).max() <= 1e-12 * np.abs(centralised).max()


def test_a_step_without_an_answer_moves_only_the_clock() -> None:
    for rule in RULES:
        algorithm, hands = begun(rule, config())
        before = newest(algorithm).copy()
        play(algorithm, hands, [1], silent=lambda number, device: True)
        np.testing.assert_array_equal(newest(algorithm), before)
        assert hands.participation.seconds() > 0.0


def test_a_folded_array_may_be_reused() -> None:
    """The caller's buffer is free again after ``fold``."""
    for rule in RULES:
        whole, reused = (started(rule, config(train__clip_norm=0.0)) for _ in range(2))
        buffer = np.empty(P)
        for device in whole.cohort(1):
            g = rng(8, "g", device).standard_normal(P)
            whole.fold(device, g, 1.0)
            buffer[:] = g
            reused.fold(device, buffer, 1.0)
        buffer[:] = np.nan
        whole.step(), reused.step()
        np.testing.assert_array_equal(newest(whole), newest(reused))


# --- robust rules -----------------------------------------------------------------------------------------

HONEST = hnp.arrays(np.float64, (8, 4), elements=st.floats(-100, 100, width=32))
LIES = hnp.arrays(np.float64, (2, 4), elements=st.floats(-(2.0**100), 2.0**100))


@given(HONEST, LIES)
def test_two_liars_of_ten_cannot_move_a_robust_rule_far(honest: np.ndarray, lies: np.ndarray) -> None:
    gradients = np.concatenate([lies, honest])
    low, high, slack = honest.min(0), honest.max(0), 1e-9 * np.abs(honest).max()
    for rule in (Median, TrimmedMean):
        g = combined(rule, gradients)
        assert (g >= low - slack).all() and (g <= high + slack).all()
    diameter = max(np.linalg.norm(one - other) for one in honest for other in honest)
    # A kept liar has 5 honest neighbours among its 6, within the score of an honest device: 6 diameter^2.
    reach = (1.0 + math.sqrt(6 / 5)) * diameter * (1 + 1e-9) + slack
    assert np.linalg.norm(combined(MultiKrum, gradients) - honest[0]) <= reach
    norms = np.linalg.norm(honest, axis=1)
    assert np.linalg.norm(combined(NormClip, gradients, robust__clip_norm=1.0)) <= norms.max() * (1 + 1e-9)


def test_sign_flipped_gradients_turn_the_mean_around_and_not_the_robust_rules() -> None:
    """The acceptance case: 2 of 10 devices send their gradient times -10."""
    truth = rng(2, "truth").standard_normal(50)
    gradients = truth + 0.3 * rng(2, "noise").standard_normal((10, 50))
    gradients[[3, 7]] *= -10.0

    def cosine(g: np.ndarray) -> float:
        return float(g @ truth / np.linalg.norm(g) / np.linalg.norm(truth))

    algorithm = started(FedSgdLora, config())
    algorithm.total = gradients.sum(0)
    algorithm.weight = 10.0
    assert cosine(algorithm.direction()) < -0.9
    for rule, least in ((Median, 0.95), (TrimmedMean, 0.95), (MultiKrum, 0.98), (NormClip, 0.9)):
        assert cosine(combined(rule, gradients)) > least


@given(
    hnp.arrays(np.float64, (7, 3), elements=st.integers(-4, 4)), st.permutations(range(7)), st.integers(0, 3)
)
def test_the_order_of_the_devices_decides_nothing(g: np.ndarray, order: list[int], f: int) -> None:
    """Small integers, so that scores and medians tie often."""
    for rule in ROBUST:
        one, other = (combined(rule, rows, robust__byzantine=f) for rows in (g, g[order]))
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@given(hnp.arrays(np.float64, (6, 3), elements=st.floats(-10, 10)), st.integers(1, 6))
def test_few_or_equal_answers_are_no_special_case(g: np.ndarray, n: int) -> None:
    for rule in ROBUST:
        keys: dict[str, Scalar] = {"robust__trim": 0.49, "robust__byzantine": 5}
        assert np.isfinite(combined(rule, g[:n], **keys)).all()
        np.testing.assert_allclose(
            combined(rule, np.repeat(g[:1], n, 0), **keys), g[0], rtol=1e-12, atol=1e-300
        )


FIVE = hnp.arrays(np.float64, (5, 3), elements=st.floats(1, 10))


@given(FIVE, st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_a_generous_norm_clip_is_the_weighted_mean(g: np.ndarray, weights: list[int]) -> None:
    algorithm = NormClip(config(robust__clip_norm=20.0))
    mean = algorithm.combine(range(5), g, np.array(weights, float))
    np.testing.assert_allclose(mean, np.average(g, axis=0, weights=weights), rtol=1e-12)


def test_krum_falls_back_to_the_liars_that_so_few_devices_allow() -> None:
    g = rng(4, "krum").standard_normal((5, 3))
    g[0] += 100.0
    assert krum_keeps(g, 4) == krum_keeps(g, 1) and 0 not in krum_keeps(g, 1)  # (5 - 3) // 2 = 1
    assert len(krum_keeps(g, 1)) == 5 - 1 - 2
    assert krum_keeps(g[:2], 2) == [0, 1]


# --- mixing -----------------------------------------------------------------------------------------------


@given(hnp.arrays(np.float64, (7, 3), elements=st.integers(-4, 4)), st.integers(0, 9))
def test_mixing_averages_the_nearest(g: np.ndarray, f: int) -> None:
    """By its definition: no mean of n - f gradients that hold g_k lies in a smaller ball around it."""
    keep, found = 7 - min(f, 3), mixed(g, f)
    for own, mean in zip(g, found, strict=True):
        distances = np.sort(((g - own) ** 2).sum(1))
        reach = distances[keep - 1]
        sure, maybe = g[((g - own) ** 2).sum(1) < reach], g[((g - own) ** 2).sum(1) == reach]
        left = keep - len(sure)
        means = [
            (sure.sum(0) + maybe[list(some)].sum(0)) / keep
            for some in itertools.combinations(range(len(maybe)), left)
        ]
        assert min(np.abs(mean - other).max() for other in means) < 1e-12


@given(HONEST, st.permutations(range(8)))
def test_mixing_without_liars_is_the_mean_for_everyone(g: np.ndarray, order: list[int]) -> None:
    np.testing.assert_allclose(mixed(g, 0), np.tile(g.mean(0), (8, 1)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(mixed(g[order], 0), mixed(g, 0)[order], rtol=1e-9, atol=1e-9)


def test_liars_apart_from_the_honest_are_mixed_out() -> None:
    """Eight honest devices in noise, two far away: every rule but the clipped one is the honest mean."""
    g = rng(9, "mixing").standard_normal((10, 50))
    g[[2, 5]] *= -10.0
    honest = np.delete(g, [2, 5], 0).mean(0)
    for rule in (Median, TrimmedMean, MultiKrum):
        algorithm = started(rule, config(robust__mix=True, robust__byzantine=2, train__clip_norm=0.0))
        for device, own in enumerate(g):
            algorithm.fold(device, own, 1.0)
        np.testing.assert_allclose(algorithm.direction(), honest, rtol=1e-9, atol=1e-9)


# --- against Flower's strategies --------------------------------------------------------------------------


def replies(gradients: np.ndarray) -> list[Message]:
    """The gradients as Flower's replies, with equal numbers of examples."""
    made = []
    for node, g in enumerate(gradients):
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(g)}), "metrics": MetricRecord({"num-examples": 1})}
        )
        made.append(Message(content=content, metadata=Metadata(1, "", node, 0, "", "", 0.0, 60.0, "train")))
    return made


@pytest.mark.parametrize("n", [1, 2, 9, 10, 23])
def test_the_robust_rules_are_flowers(n: int) -> None:
    g = rng(6, "flower", n).standard_normal((n, 17))
    flower = {Median: FedMedian(), TrimmedMean: FedTrimmedAvg(beta=0.2)}
    if n >= 9:
        flower[MultiKrum] = FlowerMultiKrum(num_malicious_nodes=2, num_nodes_to_select=n - 4)
    for rule, strategy in flower.items():
        arrays, _ = strategy.aggregate_train(1, replies(g))
        expected = arrays["w"].numpy()
        np.testing.assert_allclose(combined(rule, g, robust__trim=0.2), expected, rtol=1e-12, atol=1e-14)


def test_where_flower_differs() -> None:
    """Its Krum subtracts squared norms, which cancel; its trimmed mean cuts 28 where 29 % of 100 is 29."""
    lets_in = 0
    for seed in range(10):  # eight gradients agree to 1e-5 of their norm, two liars to 1e-4
        draw = rng(seed, "cancel")
        g = 1e3 * draw.standard_normal(50) + 0.01 * draw.standard_normal((10, 50))
        g[:2] += 0.1 * draw.standard_normal((2, 50))
        contents = [message.content for message in replies(g.astype(np.float32))]
        theirs = select_multikrum(contents, num_malicious_nodes=2, num_nodes_to_select=6)
        lets_in += any(contents.index(content) < 2 for content in theirs)
        assert min(krum_keeps(g.astype(np.float32).astype(np.float64), 2)) >= 2
    assert lets_in > 0
    values = np.concatenate([np.full(29, -1e6), np.zeros(42), np.full(29, 1e3)])[:, None]
    arrays, _ = FedTrimmedAvg(beta=0.29).aggregate_train(1, replies(values))
    assert combined(TrimmedMean, values, robust__trim=0.29) == 0.0 and arrays["w"].numpy() < -1e4


# --- control variates -------------------------------------------------------------------------------------


def test_scaffold_with_everybody_is_the_mean() -> None:
    """With unequal weights too: c and the mean of the c_k cancel, at every step."""
    plain, scaffold = started(FedSgdLora, config()), started(Scaffold, config())
    for number in range(6):
        for algorithm in (plain, scaffold):
            for device in range(6):
                g = gradient(newest(algorithm), *shard(device, number, 2 + device))
                algorithm.fold(device, g, 2 + device)
        np.testing.assert_allclose(scaffold.direction(), plain.direction(), rtol=1e-10, atol=1e-13)
        plain.step(), scaffold.step()


def test_scaffold_takes_the_sampling_noise_out() -> None:
    """At a standing model, once everyone was heard, any two devices give the mean of all six."""
    algorithm = started(Scaffold, config(train__cohort=2, server__optimiser="sgd", train__lr=1e-12))
    g = rng(9, "scaffold").standard_normal((6, P)).astype(np.float32)
    weights = np.arange(1.0, 7.0)
    heard: set[int] = set()
    number = 0
    while len(heard) < 6 or number < 4:
        number += 1
        for device in algorithm.cohort(number):
            algorithm.fold(device, g[device], weights[device])
            heard.add(device)
        algorithm.step()
    for device in algorithm.cohort(number + 1):
        algorithm.fold(device, g[device], weights[device])
    mean = np.average(g.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(algorithm.direction(), mean, rtol=1e-12, atol=1e-14)


def test_scaffolds_variates_are_the_papers_where_weights_are_equal() -> None:
    algorithm = started(Scaffold, config())
    kept, c = np.zeros((6, P)), np.zeros(P)
    for step, cohort in enumerate(([0, 1], [1, 4], [5], [0, 4, 5])):
        g = {device: rng(10, step, device).standard_normal(P).astype(np.float32) for device in cohort}
        for device in cohort:
            algorithm.fold(device, g[device], 3.0)
        expected = np.mean([g[k] - kept[k] for k in cohort], axis=0) + c
        np.testing.assert_allclose(algorithm.direction(), expected, rtol=1e-12, atol=1e-14)
        c = c + sum(g[k].astype(np.float64) - kept[k] for k in cohort) / 6
        for device in cohort:
            kept[device] = g[device]
        algorithm.step()


# --- the clock, FedBuff, SplitLoRA ------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.integers(1, 30), st.floats(1.0, 20.0))
def test_the_clock_has_the_spread_asked_for(seed: int, n: int, spread: float) -> None:
    times = durations(seed, range(n), spread)
    assert np.median(times) == pytest.approx(1.0) and (times > 0).all()
    if n > 1:
        assert times.max() / times.min() == pytest.approx(spread)
    np.testing.assert_array_equal(times, durations(seed, range(n), spread))


def test_a_synchronous_step_waits_for_its_slowest_and_a_sequential_one_for_all() -> None:
    run = config(train__cohort=3)
    for rule, cost in ((FedSgdLora, max), (SplitLora, sum)):
        algorithm, hands = begun(rule, run)
        play(algorithm, hands, range(1, 6))
        times = durations(run.seed, range(6), run.fedbuff.spread)
        waits = [cost(times[device] for device in algorithm.cohort(n)) for n in range(1, 6)]
        assert hands.participation.seconds() == pytest.approx(sum(waits))


def test_fedbuff_without_spread_is_the_synchronous_rule() -> None:
    run = config(fedbuff__spread=1.0, fedbuff__buffer=6)
    (plain, hers), (buffered, his) = begun(FedSgdLora, run), begun(FedBuff, run)
    for algorithm, hands in ((plain, hers), (buffered, his)):
        play(algorithm, hands, range(1, 21))
    np.testing.assert_array_equal(newest(buffered), newest(plain))
    assert his.versions.models().shape == (1, P)
    assert his.participation.seconds() == hers.participation.seconds() == 20.0


def test_fedbuffs_order_and_staleness_by_hand() -> None:
    """Devices that need 1, 1.5 and 4: the slow one is heard at its third step, two versions late."""
    algorithm, hands = begun(FedBuff, config(fedbuff__buffer=2), devices=3)
    clock, kept = hands.participation, hands.versions
    assert isinstance(clock, Buffered) and isinstance(kept, Versions)
    clock.times = {0: 1.0, 1: 1.5, 2: 4.0}
    clock.work = {device: (time, 0) for device, time in clock.times.items()}
    seen = []
    for number in range(1, 5):
        turn = turn_of(hands, number)
        stale = [kept.steps - version for version in turn.versions]
        models = len(kept.models())
        play(algorithm, hands, [number])
        seen.append((turn.ids, stale, models, clock.seconds()))
    assert seen == [
        ([0, 1], [0, 0], 1, 1.5),
        ([0, 1], [0, 0], 2, 3.0),
        ([0, 2], [0, 2], 2, 4.0),  # 0 at 4, 2 at 4, 1 at 4.5
        ([0, 1], [0, 1], 2, 5.0),  # 1 since 3.0; 0 since 4.0
    ]


def test_fedbuff_damps_a_stale_gradient() -> None:
    algorithm, hands = begun(FedBuff, config(fedbuff__buffer=2), devices=2)
    clock, kept = hands.participation, hands.versions
    assert isinstance(clock, Buffered) and isinstance(kept, Versions)
    kept.steps, clock.work = 3, {0: (1.0, 3), 1: (1.0, 0)}
    turn = turn_of(hands, 4)
    hands.begin(turn)
    hands.fold(turn, 0, np.full(P, 1.0), 1.0)
    hands.fold(turn, 1, np.full(P, 4.0), 3.0)
    np.testing.assert_allclose(algorithm.direction(), (1.0 * 1.0 + 3.0 * 4.0 / 2.0) / 4.0)


@pytest.mark.parametrize("cohort", [0, 5])
def test_fedbuff_keeps_its_devices_at_work_and_only_the_versions_they_use(cohort: int) -> None:
    """Even when two of ten never answer and others vanish now and then."""
    algorithm, hands = begun(FedBuff, config(train__cohort=cohort, fedbuff__buffer=3), devices=10)
    clock, kept = hands.participation, hands.versions
    assert isinstance(clock, Buffered) and isinstance(kept, Versions)
    asked: set[int] = set()
    times = [0.0]
    for number in range(1, 80):
        asked |= set(turn_of(hands, number).ids)
        play(
            algorithm,
            hands,
            [number],
            silent=lambda number, device: device < 2 or (number + device) % 4 == 0,
        )
        times.append(clock.seconds())
        assert len(clock.work) == (cohort or 10)
        used = {version for _, version in clock.work.values()}
        assert set(kept.kept) == used == clock.at_work() and max(used) == number
        np.testing.assert_array_equal(newest(algorithm), kept.models()[-1])
    assert asked == set(range(10))
    assert (np.diff(times) >= 0).all()


def test_fedbuff_needs_less_time_for_as_many_gradients() -> None:
    """Ten devices, slowest 5 times slower than the fastest, 400 gradients each way."""
    run = config(fedbuff__spread=5.0, fedbuff__buffer=4)
    seconds = {}
    for rule, steps in ((FedSgdLora, 40), (FedBuff, 100)):
        algorithm, hands = begun(rule, run, devices=10)
        play(algorithm, hands, range(1, steps + 1))
        seconds[rule] = hands.participation.seconds()
    assert seconds[FedBuff] < 0.6 * seconds[FedSgdLora]


def test_splitlora_steps_after_every_device() -> None:
    run = config(train__clip_norm=0.0)
    algorithm, hands = begun(SplitLora, run)
    optimiser, vector = ServerOptimiser(run.server, 0.0), newest(algorithm).copy()
    for number in range(1, 4):
        for device in range(6):
            g = gradient(vector, *shard(device, number, 2 + device))
            vector = optimiser.step(vector, g, learning_rate(0.05, 5, number / 4))
    play(algorithm, hands, range(1, 4))
    np.testing.assert_array_equal(newest(algorithm), vector)
    assert SplitLora.sequential and len(algorithm.models()) == 1


# --- every rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_continues_with_the_same_bits(rule: type[FedSgdLora], optimiser: str) -> None:
    """From a saved state, twice, in float32; saving disturbs neither the run nor the state."""
    run = config(server__optimiser=optimiser, train__cohort=4, fedbuff__buffer=2, train__weight_decay=0.1)
    whole, hands = begun(rule, run, dtype=np.float32)
    play(whole, hands, range(1, 8))
    state = whole.state() | hands.state()
    saved = {name: np.array(array) for name, array in state.items()}
    play(whole, hands, range(8, 13))
    for _ in range(2):
        resumed, again = begun(rule, run, dtype=np.float32)
        load(resumed, again, state)
        play(resumed, again, range(8, 13))
        for name, array in (whole.state() | hands.state()).items():
            np.testing.assert_array_equal((resumed.state() | again.state())[name], array)
    for name, array in saved.items():
        np.testing.assert_array_equal(state[name], array)
    assert newest(whole).dtype == np.float32


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_has_not_begun_can_be_resumed(rule: type[FedSgdLora]) -> None:
    (one, hers), (other, his) = begun(rule, config()), begun(rule, config())
    load(other, his, one.state() | hers.state())
    for algorithm, hands in ((one, hers), (other, his)):
        play(algorithm, hands, [1, 2])
    np.testing.assert_array_equal(newest(one), newest(other))


def load(algorithm: FedSgdLora, hands: Hands, state: dict[str, np.ndarray]) -> None:
    """As a federation does: everybody takes out what is theirs, and the rule gets the rest."""
    left = dict(state)
    hands.load(left)
    algorithm.load(left)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns(rule: type[FedSgdLora]) -> None:
    """A common target and 12 devices: the loss falls tenfold."""
    run = config(train__rounds=40, train__clip_norm=0.0, robust__trim=0.1)
    algorithm, hands = begun(rule, run, devices=12, dtype=np.float32)
    target = rng(12, "target").standard_normal(P)

    def loss() -> float:
        return float(np.linalg.norm(newest(algorithm) - target))

    before = loss()
    for number in range(1, 161):
        turn = turn_of(hands, number)
        heard = hands.begin(turn)
        models, rows = hands.versions.models(), hands.versions.rows(turn)
        for row, device in zip(rows, turn.ids, strict=True):
            model = newest(algorithm) if rule is SplitLora else models[row]
            noise = 0.1 * rng(12, "noise", number, device).standard_normal(P)
            hands.fold(turn, device, (model - target + noise).astype(np.float32), 8.0)
        algorithm.step()
        hands.settle(heard)
    assert loss() < 0.1 * before
