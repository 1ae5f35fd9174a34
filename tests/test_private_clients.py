"""DP-SGD on the devices: coins, noise, charges and refusals, up to a federation and the books it leaves."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.adapter import Worker
from clients.ledgers import Ledgers
from clients.private import PASS, chunks, gaussian, poisson
from fedlam_app import client_app
from fedlam_app.base.records import TrainOrder
from fedlam_app.base.schedule import learning_rate
from fedlam_app.checks import check
from fedlam_app.client_app import app
from fedlam_app.config import ConfigError, Scalar, parse, sampling_rate
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.federate import federate
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy.accounting import BudgetSpent, Ledger, Release, rdp
from fedlam_app.privacy.noise import Stream
from fedlam_app.rules_privacy import DP_SGD
from fedlam_app.tasks import TASKS
from strategies import ALGORITHMS
from strategies.adapter_round import AdapterFederation
from tests.tiny import tiny_mixture_run, tiny_text_run

Flat = dict[str, Scalar]
EMPTY = 1e-9  # a sampling rate at which no coin falls
PRIVATE: Flat = {
    "privacy.mechanism": "dp-sgd",
    "privacy.target-epsilon": 3.0,
    "train.optimiser": "sgd",
    "train.weight-decay": 0.0,
    "federation.supernodes": 1,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    return {**tiny_text_run(tmp_path_factory.mktemp("data")), **PRIVATE}


@pytest.fixture
def points() -> Flat:
    return {**tiny_mixture_run(), **PRIVATE}


def worker_of(flat: Mapping[str, Scalar]) -> Worker:
    config = parse(dict(flat))
    return Worker(config, TASKS[config.task](config))


def order_of(worker: Worker, **changed: Any) -> TrainOrder:
    """Return the order of round 1 to devices 0 and 1, from where everything starts."""
    vector, steps = worker.initial, worker.config.train.local_steps
    order = TrainOrder(
        cell="{}", round=1, devices=[0, 1], rows=[0, 0], ranks=[worker.layout.rank] * 2, known=[0, 0],
        steps=[steps] * 2, factors=[1.0, 1.0], noise=[], free=[], chunks=[], width=0, trains="a+b+other",
        returns="a+b+other", keeps="", proximal=0.0, probe=False, compact=False, vectors=vector,
        sizes=[len(vector)], kinds=[], entry_ranks=[], first=0, entries=np.zeros(0, np.float32),
    )  # fmt: skip
    return replace(order, **changed)


def started(flat: Flat) -> tuple[AdapterFederation, InProcessGrid]:
    config = parse(flat)
    task = TASKS[config.task](config)
    federation = federate(config, "{}", task, task.build_model())
    assert isinstance(federation, AdapterFederation)
    return federation, InProcessGrid(app, 1, flat)


def spent(ledgers: Mapping[int, str]) -> dict[int, float]:
    return {device: Ledger.from_json(text).epsilon for device, text in ledgers.items()}


# --- coins and noise --------------------------------------------------------------------------------


def test_each_sample_has_a_coin_of_its_own() -> None:
    draw, q, steps, samples = Stream(b"s", "coins"), 0.3, 20_000, 6
    taken = np.zeros((steps, samples))
    for row in taken:
        row[poisson(draw, samples, q)] = 1.0
    error = 4.0 * (q * (1 - q) / steps) ** 0.5
    assert np.abs(taken.mean(0) - q).max() < error
    apart = np.corrcoef(taken.T) - np.eye(samples)
    assert np.abs(apart).max() < 4.0 / steps**0.5
    assert np.abs(np.bincount(taken.sum(1).astype(int), minlength=7)[0] / steps - (1 - q) ** 6) < 0.01
    assert poisson(draw, samples, 1.0).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_large_batch_passes_in_parts_and_an_empty_one_not_at_all() -> None:
    sizes = np.random.default_rng(0).integers(1, 300, 50)
    ids = np.arange(3, 40)
    parts = list(chunks(ids, sizes))
    assert len(parts) == -(-sizes[ids].sum() // PASS) > 2
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), ids)
    assert all(sizes[a].max() <= sizes[b].min() for a, b in itertools.pairwise(parts))  # like with like
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
    assert list(chunks(np.zeros(0, np.int64), sizes)) == []


def test_the_rate_is_the_batch_over_the_samples_unless_it_is_named() -> None:
    rows: Flat = {"train.batch-rows": 8}
    assert sampling_rate(parse(rows), 32) == 0.25
    assert sampling_rate(parse(rows), 5) == 1.0
    assert sampling_rate(parse({**rows, "privacy.sampling-rate": 0.7}), 32) == 0.7


def noise_of(worker: Worker, device: int, round: int) -> np.ndarray:
    """Return S + N(0, z^2 C^2 I) of a round of one step, from the vector that it made."""
    train = worker.config.train
    vector, _ = worker.train(worker.initial, device, round)
    expected = sampling_rate(worker.config, worker.task.examples(device)) * worker.task.examples(device)
    rate = learning_rate(train.lr, train.rounds, round)
    return (worker.initial.astype(float) - vector) / rate * expected


def test_an_empty_batch_is_a_step_of_noise_alone(texts: Flat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not called: transformers fail on no texts. Noise has its size, and is new every time."""
    keys: Flat = {"privacy.noise-multiplier": 1.5, "privacy.clip": 0.4, "privacy.sampling-rate": EMPTY}
    worker = worker_of({**texts, **keys, "train.local-steps": 1, "train.lr": 1e-7})
    monkeypatch.setattr(worker.model, "forward", None)
    drawn = [noise_of(worker, device, round) for device, round in ((0, 1), (0, 2), (1, 1), (1, 2))]
    for one in drawn:
        assert one.std() == pytest.approx(1.5 * 0.4, rel=0.01)
    apart = np.corrcoef(drawn) - np.eye(4)
    assert np.abs(apart).max() < 4.0 / len(drawn[0]) ** 0.5
    assert worker.ledgers.of(0).events == [(EMPTY, 1.5, 2)]


def test_a_step_is_the_clipped_sum_and_the_noise_over_the_expected_batch(points: Flat) -> None:
    """Written out once more: coins and noise from the same stream, gradients one by one from autograd."""
    worker = worker_of(
        {**points, "train.local-steps": 1, "train.batch-rows": 8, "privacy.noise-multiplier": 0.5}
        | {"privacy.target-epsilon": 50.0}
    )
    real, streams = worker.ledgers.stream, list[Stream]()

    def stream(device: int, *key: int | str) -> Stream:
        streams.extend([real(device, *key)] if key[0] == "dp-sgd" else [])
        return real(device, *key)

    worker.ledgers.stream = stream  # type: ignore[method-assign]
    vectors = [worker.train(worker.initial, 0, number)[0] for number in (1, 2, 3)]
    task, train, samples = worker.task, worker.config.train, worker.task.examples(0)
    model = task.build_model().train()
    parameters, sizes = list(model.trainable().values()), set[int]()
    for number, (vector, draw) in enumerate(zip(vectors, streams, strict=True), 1):
        ids = np.flatnonzero(draw.uniform(samples) < 8 / samples)
        sizes.add(len(ids))
        total = np.zeros(len(vector))
        for i in ids:
            alone = torch.autograd.grad(task.loss(model, task.of(0, np.array([i]))), parameters)
            row = torch.cat([g.flatten() for g in alone]).double().numpy()
            total += row * min(1.0, 1.0 / np.linalg.norm(row))
        total += draw.normal(len(vector), 0.5)
        expected = worker.initial - learning_rate(train.lr, train.rounds, number) * total / 8
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)
    assert sizes - {0, 8}  # the batch's own size is not what it is divided by


def test_gaussian_cuts_one_draw_into_shapes() -> None:
    like = [torch.zeros(3, 2), torch.zeros(4)]
    parts = gaussian(Stream(b"s", 1), like, 2.0)
    assert [tuple(part.shape) for part in parts] == [(3, 2), (4,)]
    whole = Stream(b"s", 1).normal(10, 2.0).astype(np.float32)
    np.testing.assert_array_equal(torch.cat([part.flatten() for part in parts]).numpy(), whole)


# --- what repeats, and what must not ----------------------------------------------------------------


def test_a_repeated_round_is_the_same_to_the_bit_and_costs_nothing(texts: Flat) -> None:
    worker = worker_of(texts)
    first = worker.obey(order_of(worker), 0)
    book = worker.ledgers.of(0).to_json()
    again = worker_of(texts).obey(order_of(worker), 0)
    np.testing.assert_array_equal(first.vector, again.vector)
    assert worker.ledgers.of(0).to_json() == book
    assert first.norm > 0.0


def test_another_rank_is_another_question(texts: Flat) -> None:
    """The same vector: only what gets noise differs, and from the second step on what it is added to."""
    worker = worker_of({**texts, "strategy": "hetlora", "privacy.noise-multiplier": 2.0})
    has = worker.layout.within(2)
    start = np.where(has, worker.initial, np.float32(0))
    low = order_of(worker, ranks=[2, 2], vectors=start[has], sizes=[int(has.sum())])
    before = worker.obey(low, 0).vector - start[has]
    after = (worker.obey(order_of(worker, vectors=start), 0).vector - start)[has]
    assert abs(np.corrcoef(before, after)[0, 1]) < 4.0 / len(before) ** 0.5
    assert sum(steps for _, _, steps in worker.ledgers.of(0).events) == 4


@pytest.mark.parametrize("order", [{"steps": [-9, -9]}, {"noise": [-1.0, 1.0]}, {"noise": [np.nan, 1.0]}])
def test_an_order_that_would_give_budget_back_is_refused(points: Flat, order: dict[str, Any]) -> None:
    worker = worker_of({**points, "privacy.noise-multiplier": 1.0, "seed": 47})
    with pytest.raises(ValueError, match="no release has"):
        worker.obey(order_of(worker, **order), 0)
    assert worker.ledgers.of(0).epsilon == 0.0


@pytest.mark.parametrize("change", ["vector", "steps", "entries", "noise", "data"])
def test_another_question_gets_other_noise_and_is_charged(
    texts: Flat, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With empty batches an answer is noise alone: the same noise on other sums would give them away."""
    keys: Flat = {"privacy.sampling-rate": EMPTY, "privacy.noise-multiplier": 1.0, "train.lr": 1e-7}
    worker = worker_of({**texts, **keys, "strategy": "flora"})
    order = order_of(worker)
    before = worker.obey(order, 0).vector - worker.initial
    told: dict[str, Any] = {
        "vector": {"vectors": worker.initial + np.float32(1e-3)},
        "steps": {"steps": [1, 1]},
        "noise": {"noise": [2.0, 2.0]},
        "entries": {
            "kinds": ["merge"],
            "entry_ranks": [1],
            "entries": np.full(sum(p.inputs + p.outputs for p in worker.layout.pairs), 1e-3, np.float32),
        },
        "data": {},
    }[change]
    if change == "data":
        real = worker.task.of
        monkeypatch.setattr(worker.task, "of", lambda device, ids: real(device, ids[::-1].copy()))
    asked = replace(order, **told)
    after = worker.obey(asked, 0).vector - asked.vectors
    assert abs(np.corrcoef(before, after)[0, 1]) < 4.0 / len(before) ** 0.5
    assert sum(steps for _, _, steps in worker.ledgers.of(0).events) == (3 if change == "steps" else 4)


def test_the_ledger_tells_nothing_of_the_data(texts: Flat) -> None:
    """The digest of a round is public: with another secret the same data have another name."""
    names = []
    for secret in ("one", "two"):
        worker = worker_of(texts)
        worker.ledgers._secret = secret.encode()
        worker.ledgers.folder = worker.ledgers.folder / secret
        worker.obey(order_of(worker), 0)
        names.append(worker.ledgers.of(0).parts[""])
    assert names[0] != names[1]


# --- budgets ----------------------------------------------------------------------------------------


def test_a_round_that_would_pass_the_budget_is_refused_whole(points: Flat) -> None:
    worker = worker_of({**points, "privacy.noise-multiplier": 2.0})
    worker.obey(order_of(worker), 0)
    one, book = worker.ledgers.of(0).epsilon, ""
    with pytest.raises(BudgetSpent, match="device 0: epsilon"):
        for round in range(2, 200):
            book = worker.ledgers.of(0).to_json()
            worker.obey(order_of(worker, round=round), 0)
    assert worker.ledgers.of(0).to_json() == book
    assert 3.0 - one < worker.ledgers.of(0).epsilon <= 3.0 and one < 2.0
    assert all(p.requires_grad for p in worker.parameters)


def test_a_federation_whose_budgets_are_spent_keeps_its_model(points: Flat) -> None:
    federation, grid = started({**points, "privacy.noise-multiplier": 1.5, "seed": 21})
    refused = list[int]()
    for number in range(1, 41):
        before = federation.algorithm.models().copy()
        cost = federation.train_round(grid, number)
        refused += [len(federation.refused)]
        assert np.array_equal(federation.algorithm.models(), before) == (refused[-1] == 4)
    assert refused[0] == 0 and refused[-1] == 4
    assert len(cost.failures) == 4 and "its privacy budget is spent" in cost.failures[0]
    assert 2.0 < max(spent(federation.ledgers).values()) <= 3.0


def test_noise_is_found_once_and_ends_at_the_target(points: Flat) -> None:
    """One z for all rounds; half of the devices take part in half of the rounds on average."""
    worker = worker_of({**points, "train.rounds": 6})
    for round in range(1, 7):
        worker.obey(order_of(worker, round=round), 0)
    book = worker.ledgers.of(0)
    assert len(book.events) == 1 and book.events[0][2] == 6 * 3
    assert 2.99 <= book.epsilon <= 3.0
    half = worker_of({**points, "train.rounds": 6, "train.cohort": 2})
    for round in (2, 4, 6):
        half.obey(order_of(half, round=round), 0)
    assert 2.99 <= half.ledgers.of(0).epsilon <= 3.0 and len(half.ledgers.of(0).events) == 1
    with pytest.raises(BudgetSpent):
        half.obey(order_of(half, round=7), 0)


def test_earlier_runs_on_the_same_data_count(points: Flat, tmp_path: Path) -> None:
    shared: Flat = {**points, "privacy.ledgers": str(tmp_path / "books"), "train.rounds": 2}
    first = worker_of({**shared, "privacy.noise-multiplier": 2.0})
    for round in (1, 2):
        first.obey(order_of(first, round=round), 0)
    before = first.ledgers.of(0).epsilon
    second = worker_of({**shared, "train.lr": 0.2})
    for round in (1, 2):
        second.obey(order_of(second, round=round), 0)
    assert 0.0 < before < 2.99 <= second.ledgers.of(0).epsilon <= 3.0


def test_a_worker_with_a_book_a_round_is_caught(points: Flat, monkeypatch: pytest.MonkeyPatch) -> None:
    def after_two_rounds(lr: float) -> tuple[float, float]:
        """Return what the book says, and the truth."""
        worker = worker_of({**points, "privacy.noise-multiplier": 4.0, "train.lr": lr})
        for round in (1, 2):
            worker.obey(order_of(worker, round=round), 0)
        q = 16 / worker.task.examples(0)
        return worker.ledgers.of(0).epsilon, Ledger(9.0, 1e-5, events=[(q, 4.0, 6)]).epsilon

    said, true = after_two_rounds(0.1)
    assert said == pytest.approx(true, rel=1e-12)

    def anew(books: Ledgers, device: int, release: Release) -> None:
        ledger = Ledger(3.0, 1e-5)
        ledger.charge(release)
        books._save(device, ledger)

    monkeypatch.setattr(Ledgers, "charge", anew)
    said, true = after_two_rounds(0.2)
    assert said < 0.8 * true


def test_without_a_budget_there_is_clipping_alone(points: Flat) -> None:
    endless: Flat = {**points, "privacy.target-epsilon": float("inf"), "privacy.sampling-rate": 1.0}
    worker = worker_of({**endless, "train.local-steps": 1, "privacy.clip": 1e3})
    vector, _ = worker.train(worker.initial, 0, 4)
    plain = worker_of({**endless, "train.local-steps": 1, "privacy.mechanism": "none"})
    everything = np.arange(plain.task.examples(0))
    plain.task.batch = lambda device, round, step: plain.task.of(device, everything)  # type: ignore[method-assign]
    np.testing.assert_allclose(vector, plain.train(plain.initial, 0, 4)[0], rtol=1e-4, atol=1e-6)
    assert worker.ledgers.of(0).epsilon == float("inf")


# --- what a device says -----------------------------------------------------------------------------


def test_losses_stay_on_the_device(points: Flat) -> None:
    worker = worker_of(points)
    assert worker.obey(order_of(worker), 0).loss == 0.0
    assert np.isnan(worker.obey(order_of(worker, steps=[0, 0]), 1).loss)
    federation, grid = started({**points, "seed": 41})
    federation.train_round(grid, 1)
    assert np.isnan(federation.loss)


@pytest.mark.parametrize("what", ["probe", "compact"])
def test_an_order_for_something_else_is_refused(points: Flat, what: str) -> None:
    worker = worker_of(points)
    with pytest.raises(ValueError, match="DP-SGD trains LoRA's own factors"):
        worker.obey(order_of(worker, **{what: True}), 0)


def test_what_a_rank_has_not_gets_no_noise(texts: Flat) -> None:
    worker = worker_of({**texts, "strategy": "hetlora"})
    has = worker.layout.within(2)
    assert 0 < has.sum() < len(has)
    order = order_of(worker, ranks=[2, 2], vectors=worker.initial[has], sizes=[int(has.sum())])
    answer = worker.obey(order, 0)
    whole = torch.cat([p.detach().flatten() for p in worker.parameters]).numpy()
    assert len(answer.vector) == has.sum() and not whole[~has].any()
    assert (whole[has] != worker.initial[has]).mean() > 0.99


def test_the_schedule_multiplies_the_noise_and_the_book_knows(points: Flat) -> None:
    worker = worker_of({**points, "privacy.noise-multiplier": 2.0})
    worker.obey(order_of(worker, noise=[1.5, 1.0]), 0)
    assert [z for _, z, _ in worker.ledgers.of(0).events] == [3.0]


def test_the_pull_to_the_start_comes_after_the_noise(points: Flat, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedProx: with noise that is 1 everywhere and no samples, step two goes back by lr mu of step one."""
    monkeypatch.setattr(Stream, "normal", lambda self, count, std: np.full(count, std))
    keys: Flat = {"privacy.sampling-rate": EMPTY, "privacy.noise-multiplier": 1.0, "train.rounds": 100}
    moved = {}
    for steps, mu in ((1, 0.5), (2, 0.5), (2, 0.0)):
        worker = worker_of({**points, **keys, "strategy": "fedprox"})
        answer = worker.obey(order_of(worker, round=50, steps=[steps] * 2, proximal=mu), 0)
        moved[steps, mu] = float(answer.vector.mean(dtype=np.float64))
    rate = learning_rate(0.1, 100, 50)
    assert moved[2, 0.0] == pytest.approx(2 * moved[1, 0.5], rel=1e-4)
    assert moved[2, 0.5] == pytest.approx((2 - rate * 0.5) * moved[1, 0.5], rel=1e-4)


# --- rules ------------------------------------------------------------------------------------------


def test_the_strategies_that_may_are_those_of_adapter_space_but_two() -> None:
    adapter = {name for name, rule in ALGORITHMS.items() if rule.space == "adapter"}
    assert set(DP_SGD) == adapter - {"fed-sb", "central"}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"strategy": "fed-sb"}, "'strategy' = 'fed-sb', whose devices send something else"),
        ({"strategy": "central"}, "'strategy' = 'central', whose devices send something else"),
        ({"strategy": "scaffold"}, "is not allowed with 'strategy' = 'scaffold'"),
        ({"model.tuning": "full", "strategy": "fedavg-full"}, "trains the table of words"),
        ({"model.tuning": "ln", "model.backbone": "random-gpt2"}, "trains the table of positions"),
    ],
)
def test_what_cannot_be_private_is_refused_before_it_starts(texts: Flat, keys: Flat, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(parse({**texts, **keys}))
    check(parse({**texts, **keys, "privacy.mechanism": "none"}))


# --- a federation -----------------------------------------------------------------------------------


def finished(flat: Flat, results: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run an experiment in this process; return its records, and its book."""
    flat = {**flat, "results": str(results)}
    config, folder = parse(flat), RunFolder.open(parse(flat))
    run_cells(InProcessGrid(app, 1, flat), flat, cells_of(config), folder, 1, lambda line: None)
    (book,) = (results / "privacy").glob("*.json")
    return folder.read_metrics(), json.loads(book.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        ("ffa-lora", {}),
        ("fedit", {"task": "language-modelling", "model.backbone": "random-gpt2"}),
        ("hetlora", {"train.ranks": "8,4", "privacy.device-epsilons": "1,3"}),
    ],
)
def test_a_federation_ends_at_its_target_in_the_record_and_in_the_book(
    texts: Flat, tmp_path: Path, strategy: str, keys: Flat
) -> None:
    records, book = finished({**texts, **keys, "strategy": strategy}, tmp_path / "run")
    final = records[-1]
    assert final["kind"] == "final" and final["failures"] == 0 and final["own_loss"] is None
    assert 2.99 <= final["epsilon"] <= 3.0
    ledgers = {int(k): Ledger.from_json(json.dumps(text)) for k, text in book["ledgers"].items()}
    assert sorted(ledgers) == [0, 1, 2, 3]
    for device, ledger in ledgers.items():
        budget = 1.0 if "privacy.device-epsilons" in keys and device % 2 == 0 else 3.0
        ((q, z, steps),) = ledger.events
        assert steps == 4 and budget - 0.01 <= ledger.epsilon <= budget
        assert ledger._rdp == pytest.approx(rdp(q, z) * 4)
    assert book["statement"]["label"] == "sample-level DP"


def test_rounds_in_other_workers_give_the_same_run(points: Flat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round in a worker that was just made: coins, noise and books lie on the disk, and not in it."""
    finals = []
    for restarts in (False, True):
        root = Path(os.environ["FEDLAM_DEVICES"]) / str(restarts)
        monkeypatch.setenv("FEDLAM_DEVICES", str(root))
        client_app._worker.cache_clear()
        federation, grid = started({**points, "seed": 51, "train.rounds": 2})
        for number in (1, 2):
            federation.train_round(grid, number)
            if restarts:
                client_app._worker.cache_clear()
        finals.append((federation.algorithm.models().copy(), federation.ledgers))
    client_app._worker.cache_clear()
    np.testing.assert_array_equal(finals[0][0], finals[1][0])
    assert finals[0][1] == finals[1][1] and max(spent(finals[0][1]).values()) > 2.99
