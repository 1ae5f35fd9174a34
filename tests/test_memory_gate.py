"""The memory gate: what fits into a device decides whether it takes part, and at which rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlam_app.base.vectors import pack
from fedlam_app.client_app import app
from fedlam_app.config import parse
from fedlam_app.grid import InProcessGrid
from fedlam_app.models.factors import layout_of
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.base import Cost
from fedlam_app.wireless import profiles
from strategies import ALGORITHMS
from strategies.algorithm import Algorithm
from strategies.base import Federation
from strategies.memory_gate import activation_bytes, feasible_blocks, gate, largest_rank
from tests.fleet_runs import FLEET, Flat, federation_of, fleet_of, ordered
from tests.tiny import tiny_text_run

COST = Cost(0.0, 0.0, 6000, 400)  # elements_embedding: 16 tokens of width 384, nearly


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    return tiny_text_run(tmp_path_factory.mktemp("texts")) | FLEET


@pytest.fixture(scope="module")
def model(texts: Flat) -> SplitModel:
    return TASKS["text-classification"](parse(texts)).build_model()


def rule(flat: Flat, model: SplitModel) -> Algorithm:
    config = parse(flat)
    algorithm = ALGORITHMS[config.strategy](config)
    split = algorithm.space == "gradient"
    layout = layout_of(model.backbone if split else model, 2.0)
    trains = model.server_side() if split else model.trainable()
    algorithm.init(pack(trains.values()), range(8), layout)
    return algorithm


def needed(flat: Flat, model: SplitModel, rank: int) -> float:
    """Bytes of RAM at which a rank just fits, counted from the model's parameters one by one."""
    config = parse(flat)
    fixed = 17 * 4 * COST.elements_embedding * config.train.batch_rows * config.model.blocks
    for name, p in model.named_parameters():
        if "lora_A" in name:
            fixed += 16 * rank * p.shape[1]
        elif "lora_B" in name:
            fixed += 16 * rank * p.shape[0]
        else:
            fixed += p.numel() * (16 if p.requires_grad else 4)
    return 2.0 * fixed


def devices(gigabytes: Sequence[float]) -> np.ndarray:
    return np.array([1e9 * g for g in gigabytes], np.float32)


def test_the_largest_rank_is_where_the_sum_of_all_parameters_says(texts: Flat, model: SplitModel) -> None:
    algorithm = rule({**texts, "strategy": "flora"}, model)
    config = parse({**texts, "strategy": "flora"})
    for rank in (0, 1, 5, 8):
        edge = needed(texts, model, rank)
        ram = np.array([edge * 0.9999, edge * 1.0001], np.float32)
        below, above = largest_rank(config, COST, model, algorithm, ram).tolist()
        assert (below, above) == (rank - 1, rank)


@pytest.mark.parametrize("strategy", ["fedavg-lora", "flora", "fedsgd-lora"])
def test_where_all_fit_nothing_changes(texts: Flat, model: SplitModel, strategy: str) -> None:
    flat = {**texts, "strategy": strategy}
    algorithm = rule(flat, model)
    assert gate(parse(flat), COST, model, algorithm, devices([2.0] * 7 + [64.0])) == (None, None)


def test_a_common_rank_must_fit_and_an_own_one_may_shrink(texts: Flat, model: SplitModel) -> None:
    ram = np.array([needed(texts, model, rank) * 1.0001 for rank in (0, 1, 5, 8)] + [0.0] * 4, np.float32)
    flat = {**texts, "strategy": "fedavg-lora"}
    able, limits = gate(parse(flat), COST, model, rule(flat, model), ram)
    assert able is not None and limits is None
    assert able.tolist() == [False, False, False, True] + [False] * 4
    flat = {**texts, "strategy": "hetlora", "train.ranks": "8,8,2,8"}
    algorithm = rule(flat, model)
    able, limits = gate(parse(flat), COST, model, algorithm, ram)
    assert able is not None and limits is not None
    assert able.tolist() == [False, True, True, True] + [False] * 4
    algorithm.limits = limits
    assert algorithm.ranks()[able].tolist() == [1, 2, 8]
    assert [algorithm.rank(k) for k in range(8)] == algorithm.ranks().tolist()


@given(st.lists(st.floats(1e6, 1e10), min_size=2, max_size=8))
def test_more_memory_is_never_worse(texts: Flat, model: SplitModel, sizes: list[float]) -> None:
    flat = {**texts, "strategy": "flora"}
    ram = np.sort(np.array(sizes, np.float32))
    ranks = largest_rank(parse(flat), COST, model, rule(flat, model), ram)
    assert (np.diff(ranks) >= 0).all()


def test_in_gradient_space_the_backbone_weighs_nothing_until_its_blocks_stay(
    texts: Flat, model: SplitModel
) -> None:
    flat = {**texts, "strategy": "fedsgd-lora", "model.blocks": 2}
    whole, cut = parse(flat), parse({**flat, "split.device-blocks": 1})
    task = TASKS["text-classification"]
    uncut, with_block = task(whole).build_model(), task(cut).build_model()
    kept = 2.0 * 4 * sum(p.numel() for m in (uncut.embedding, uncut.head) for p in m.parameters())
    trained = sum(p.numel() for p in uncut.device_side().values())
    kept += 2.0 * 12 * trained + 2.0 * activation_bytes(whole, COST)
    assert kept < needed(flat, uncut, 0)
    ram = np.array([kept * 0.9999, kept * 1.0001, 1e10], np.float32)
    assert feasible_blocks(whole, COST, uncut, ram).tolist() == [-1, 0, 0]
    assert feasible_blocks(cut, COST, with_block, ram).tolist() == [-1, 0, 1]
    able, limits = gate(cut, COST, with_block, rule({**flat, "split.device-blocks": 1}, with_block), ram)
    assert able is not None and limits is None
    assert able.tolist() == [False, False, True]


@pytest.mark.parametrize("strategy", ["fedavg-lora", "flora", "fedsgd-lora"])
def test_nobody_able_is_one_sentence(texts: Flat, model: SplitModel, strategy: str) -> None:
    flat = {**texts, "strategy": strategy}
    with pytest.raises(ValueError, match="no device can hold its part of the model") as refusal:
        gate(parse(flat), COST, model, rule(flat, model), devices([0.00001] * 7 + [0.00002]))
    said = str(refusal.value)
    assert "'fleet.profiles' = 'mixed' has 2e-05 GB" in said and "\n" not in said
    assert ("'split.device-blocks'" if strategy == "fedsgd-lora" else "'model.backbone' = 'random'") in said


# --- in a federation --------------------------------------------------------------------------------------


def with_memory(
    flat: Flat, monkeypatch: pytest.MonkeyPatch, gigabytes: float
) -> tuple[Federation, InProcessGrid]:
    """A federation in which phones of the first kinds have this much memory, and all others enough."""
    small = tuple(
        dataclasses.replace(p, ram_gb=(gigabytes,)) if place in (1, 2) else p
        for place, p in enumerate(profiles.PROFILES)
    )
    monkeypatch.setattr(profiles, "PROFILES", small)
    return federation_of({**flat, "federation.server-threads": 1}), InProcessGrid(app, 1, flat)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("strategy", ["fedavg-lora", "fedsgd-lora"])
def test_whoever_cannot_hold_the_work_is_never_chosen(
    texts: Flat, monkeypatch: pytest.MonkeyPatch, strategy: str, mode: str
) -> None:
    own: Flat = {"strategy": strategy, "selection.mode": mode, "selection.policy": "random"}
    flat = {**texts, **own, "wireless.loss": "none", "fleet.on-share": 1.0, "wireless.radius-m": 50.0}
    federation, grid = with_memory(flat, monkeypatch, 0.001)
    fleet = fleet_of(federation)
    able = fleet.fleet.devices.ram > 1e8
    assert fleet.able is not None and fleet.able.tolist() == able.tolist()
    assert 1 < able.sum() < 8
    for number in range(1, 7):
        federation.train_round(grid, number)
    worked, can = set(ordered(grid)), set(np.flatnonzero(able).tolist())
    # Where nobody waits, the slow ones may not be back yet.
    assert worked == can if mode == "synchronous" else 1 < len(worked & can) == len(worked)


@pytest.mark.parametrize("strategy", ["flora", "hetlora", "flexlora"])
def test_a_small_memory_makes_a_small_rank(
    texts: Flat, model: SplitModel, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    flat = {**texts, "strategy": strategy, "selection.policy": "random", "wireless.loss": "none"}
    task = TASKS["text-classification"](parse(flat))
    elements = task.cost().elements_embedding
    activations = 2.0 * 17 * 4 * parse(flat).train.batch_rows * (elements - COST.elements_embedding)
    fits = needed(flat, model, 3) + activations
    federation, grid = with_memory(flat, monkeypatch, fits * 1.0001 / 1e9)
    fleet, algorithm = fleet_of(federation), federation.algorithm
    assert fleet.able is None
    small = fleet.fleet.devices.ram < 1e9
    assert 0 < small.sum() < 8
    assert algorithm.ranks().tolist() == np.where(small, 3, 8).tolist()
    told: dict[int, int] = {}
    for number in range(1, 5):
        federation.train_round(grid, number)
    for message in grid.delivered:
        config = message.content.config_records["config"]
        if config["type"] == "TrainOrder":
            told |= dict(zip(config["devices"], config["ranks"], strict=True))  # type: ignore[arg-type, misc]
    assert set(told.values()) == {3, 8}
    assert all(told[k] == algorithm.rank(k) for k in told)
    assert np.isfinite(algorithm.models()).all()
