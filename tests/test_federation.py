"""The round: one client is local training, packing changes nothing, and what fails is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from clients.adapter import Worker, torch_device
from fedlam_app.base.records import (
    SCHEMA,
    EvaluateReport,
    TrainOrder,
    TrainReport,
    cut,
    decode,
    encode,
    payload_bytes,
    reply,
)
from fedlam_app.base.schedule import WARM_UP_ROUNDS, learning_rate
from fedlam_app.base.vectors import pack
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.federate import federate
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder
from fedlam_app.grid import InProcessGrid
from fedlam_app.tasks.channel_prediction import ChannelPrediction
from strategies.adapter_round import AdapterFederation
from strategies.base import Federation
from tests.tiny import tiny_run

Flat = dict[str, Scalar]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    return tiny_run(tmp_path_factory.mktemp("data"))


def models_after(flat: Flat, supernodes: int, **overrides: Scalar) -> NDArray[np.float32]:
    """Run all rounds in this process and return the final models (m, p)."""
    federation, grid = start(flat, supernodes, overrides)
    for round in range(1, parse(flat).train.rounds + 1):
        federation.train_round(grid, round)
    return federation.algorithm.models()


def start(
    flat: Flat, supernodes: int, overrides: Mapping[str, Scalar], client: ClientApp = app
) -> tuple[Federation, InProcessGrid]:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    config = parse({**flat, **keys, "federation.supernodes": supernodes})
    task = ChannelPrediction(config)
    federation = federate(config, json.dumps(keys), task, task.build_model())
    return federation, InProcessGrid(client, supernodes, {**flat, "federation.supernodes": supernodes})


def test_fedavg_with_one_client_is_local_training_bit_for_bit(flat: Flat) -> None:
    """A plain loop in plain PyTorch: no messages, no strategy, no worker."""
    config = parse({**flat, "train.devices": 1})
    task = ChannelPrediction(config)
    model = task.build_model().train()
    parameters = list(model.trainable().values())
    for round in range(1, config.train.rounds + 1):
        optimiser = torch.optim.AdamW(
            parameters,
            lr=learning_rate(config.train.lr, config.train.rounds, round),
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        for step in range(config.train.local_steps):
            optimiser.zero_grad()
            task.loss(model, task.batch(0, round, step)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
            optimiser.step()
    federated = models_after(flat, 1, train__devices=1)
    np.testing.assert_array_equal(federated[0], pack(parameters))


def test_one_client_alone_is_the_same_under_every_rule(flat: Flat) -> None:
    expected = models_after(flat, 1, train__devices=1)
    for strategy in ("local", "central"):
        np.testing.assert_array_equal(models_after(flat, 1, train__devices=1, strategy=strategy), expected)


@pytest.mark.parametrize("strategy", ["fedavg-lora", "local"])
def test_packing_does_not_change_a_bit(flat: Flat, strategy: str) -> None:
    one, two, four = (models_after(flat, nodes, strategy=strategy) for nodes in (1, 2, 4))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, four)


def test_the_seed_decides(flat: Flat) -> None:
    assert not np.array_equal(models_after(flat, 2), models_after({**flat, "seed": 8}, 2))


def test_a_round_is_the_weighted_mean_of_its_devices(flat: Flat) -> None:
    federation, grid = start(flat, 2, {})
    federation.train_round(grid, 1)
    reports = [decode(m.content, TrainReport) for m in grid.delivered[1::2]]
    vectors = np.stack([v for report in reports for v in cut(report.vectors, report.sizes)]).astype(
        np.float64
    )
    weights = np.array([w for report in reports for w in report.weights])
    expected = (weights[:, None] * vectors).sum(0) / weights.sum()
    np.testing.assert_allclose(federation.algorithm.models()[0], expected, rtol=1e-6, atol=1e-12)


def test_only_what_trains_travels_and_bytes_are_counted_as_serialised(flat: Flat) -> None:
    federation, grid = start(flat, 4, {})
    cost = federation.train_round(grid, 1)
    (p,) = federation.algorithm.models()[0].shape
    assert p == sum(q.numel() for q in ChannelPrediction(parse(flat)).build_model().trainable().values())
    ups, downs = grid.delivered[1::2], grid.delivered[0::2]
    for message, kind in [*((m, TrainReport) for m in ups), *((m, TrainOrder) for m in downs)]:
        arrays = message.content.array_records["arrays"]
        other = "entries" if kind is TrainOrder else "sums"
        assert set(arrays) == {"vectors", other}, "nothing but adapter vectors may cross"
        assert len(arrays[other].numpy()) == 0  # this rule broadcasts nothing, and four need no sums
        # One device a node: the payload in the message is the device's payload.
        assert len(arrays["vectors"].data) == pytest.approx(payload_bytes(np.zeros(p, np.float32)), abs=16)
        decode(message.content, kind)
    assert cost.bytes_up == cost.bytes_down == 4 * payload_bytes(np.zeros(p, np.float32))
    assert 4 * p <= cost.bytes_up / 4 <= 1.01 * 4 * p


def test_a_device_takes_as_many_steps_as_its_order_says_and_a_poll_takes_none(flat: Flat) -> None:
    federation, grid = start(flat, 2, {})
    assert isinstance(federation, AdapterFederation)
    polled = federation.poll(grid, 1, [1, 3])
    federation.train_round(grid, 1)
    order, report = (
        decode(grid.delivered[4].content, TrainOrder),
        decode(grid.delivered[5].content, TrainReport),
    )
    worker = Worker(parse(flat), ChannelPrediction(parse(flat)))
    none, one, two = (worker.obey(replace(order, steps=[n] * 2, factors=[0.5] * 2), 1) for n in (0, 1, 2))
    assert order.devices[1] == none.device == 1 and order.steps == [2, 2]
    assert none.loss == one.loss == polled[1] != two.loss == report.losses[1]
    assert len(none.vector) == 0 and not np.array_equal(one.vector, two.vector)
    np.testing.assert_array_equal(two.vector, cut(report.vectors, report.sizes)[1])
    assert two.norm == report.norms[1] == pytest.approx(np.linalg.norm(two.vector - order.vectors), rel=1e-5)
    assert two.weight == 0.5 * report.weights[1]


def _with_bad_device(bad: int, poison: float) -> ClientApp:
    """The real client, but one device's vector is overwritten on its way out."""
    wrapped = ClientApp()

    @wrapped.train()
    def train(message: Message, context: Context) -> Message:
        report = decode(app(message, context).content, TrainReport)
        if bad in report.devices:
            cut(report.vectors, report.sizes)[report.devices.index(bad)][:] = poison
        return reply(report, message)

    return wrapped


def test_a_vector_that_is_not_finite_is_left_out_and_named(flat: Flat) -> None:
    federation, grid = start(flat, 2, {}, _with_bad_device(2, np.nan))
    cost = federation.train_round(grid, 1)
    assert np.isfinite(federation.algorithm.models()).all()
    assert cost.failures == ["round 1: device 2 sent a vector that is not finite"]


def test_a_failing_client_is_named_and_a_round_without_any_is_an_error(flat: Flat) -> None:
    usual, grid = start(flat, 1, {})
    usual.algorithm.init(usual.algorithm.models()[0], [99], usual.algorithm.layout)  # no such shard
    federation = AdapterFederation(
        usual.algorithm, "{}", [99], parse(flat | {"federation.supernodes": 1}).federation
    )
    with pytest.raises(RuntimeError, match=r"no device finished round 1: .*train of \[99\]: IndexError"):
        federation.train_round(grid, 1)


def test_an_evaluation_with_a_missing_chunk_is_an_error(flat: Flat) -> None:
    federation, grid = start(flat, 2, {})
    federation._evaluation = ([0, 1, 2], 2)
    messages = list(federation.configure_evaluate(0, ArrayRecord(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    federation.aggregate_evaluate(0, replies)
    with pytest.raises(RuntimeError, match=r"only 2 of 3 evaluation chunks came back"):
        federation.aggregate_evaluate(0, replies[:1])


def test_a_message_of_another_schema_is_refused() -> None:
    table = np.zeros((1, 1, 2))
    record = EvaluateReport(rows=[0], chunks=[0], users=[1], cpu_s=0.0, peak_rss_bytes=1, table=table)
    content = encode(record)
    np.testing.assert_array_equal(decode(content, EvaluateReport).table, table)
    with pytest.raises(ValueError, match=f"expected TrainReport of schema {SCHEMA}, got 'EvaluateReport'"):
        decode(content, TrainReport)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert torch_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert torch_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="device = 'cuda', but torch finds no CUDA device"):
            torch_device("cuda")


def test_the_rate_warms_up_and_then_falls(flat: Flat) -> None:
    lr = parse(flat).train.lr
    rates = [learning_rate(lr, 20, round) for round in range(1, 21)]
    assert rates[0] < rates[WARM_UP_ROUNDS - 1] <= lr
    assert all(a > b for a, b in zip(rates[WARM_UP_ROUNDS - 1 :], rates[WARM_UP_ROUNDS:], strict=False))
    assert rates[-1] == pytest.approx(0.05 * lr)


class Stop(Exception):
    """Stands for a kill in the middle of a run."""


def test_a_killed_run_resumes_with_the_same_numbers(flat: Flat, tmp_path: Path) -> None:
    whole = _records(flat, tmp_path / "whole")
    killed = {**flat, "results": str(tmp_path / "killed")}
    folder = RunFolder.open(parse(killed))

    def kill_after_first_evaluation(line: str) -> None:
        if "round 2" in line:
            raise Stop

    with pytest.raises(Stop):
        _run(killed, folder, kill_after_first_evaluation)
    resumed = {**killed, "resume": True}
    again = RunFolder.open(parse(resumed))
    _run(resumed, again, lambda line: None)
    assert _computed(again.read_metrics()) == _computed(whole)


def _computed(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """What does not depend on the machine: every measured time ends in _s."""
    return [{k: v for k, v in r.items() if not k.endswith("_s") and k != "peak_rss_bytes"} for r in records]


def _records(flat: Flat, results: Path) -> list[dict[str, object]]:
    flat = {**flat, "results": str(results)}
    folder = RunFolder.open(parse(flat))
    _run(flat, folder, lambda line: None)
    return folder.read_metrics()


def _run(flat: Flat, folder: RunFolder, say: object) -> None:
    config = parse(flat)
    grid = InProcessGrid(app, config.federation.supernodes, flat)
    run_cells(grid, flat, cells_of(config), folder, 1, say)  # type: ignore[arg-type]
