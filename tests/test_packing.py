"""Partial sums: the same mean in whatever parts it comes, the same bits anywhere, and faults are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.packing import (
    APART,
    BLOCK,
    CHUNKS,
    Answer,
    Tree,
    add_weighted,
    chunked,
    distance,
    gathered,
    tops,
)
from fedlam_app.base.records import TrainOrder, TrainReport, decode, framed_bytes, payload_bytes, reply
from fedlam_app.base.vectors import Vector
from fedlam_app.config import parse
from fedlam_app.grid import InProcessGrid
from strategies import ALGORITHMS
from strategies.adapter_round import AdapterFederation
from strategies.algorithm import Algorithm
from strategies.base import Cost, balanced
from strategies.participation import Drawn, Loads, Poll, Turn

RANK, COUNT = 2, 40
LAYOUT = Layout.of(
    [("m.lora_A.default.weight", (RANK, 5)), ("m.lora_B.default.weight", (4, RANK)), ("head", (3,))]
)
LINEAR = {"fedavg-lora", "fedit", "fedavg-full", "central", "fedprox", "ffa-lora", "rolora", "fedsa-lora"}
Tamper = Callable[[int, Vector], Vector]
Edit = Callable[[TrainReport], TrainReport]


def as_it_is(device: int, vector: Vector) -> Vector:
    return vector


def moving(
    tamper: Tamper = as_it_is, edit: Edit = lambda report: report, gone: frozenset[int] = frozenset()
) -> ClientApp:
    """A client whose devices move at random, by a key; ``tamper`` and ``edit`` are what goes wrong."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = decode(message.content, TrainOrder)
        returned = LAYOUT.part(order.returns)[~LAYOUT.part(order.keeps)]

        def answers() -> Iterator[Answer]:
            for k, factor, steps in zip(order.devices, order.factors, order.steps, strict=True):
                if k in gone:
                    continue
                start = order.vectors[returned]
                draw = np.random.default_rng((order.round, k))
                weight, loss = factor * (1 + k % 5), float(k)
                if steps == 0:
                    yield Answer(k, np.zeros(0, np.float32), weight, loss, 0.0)
                    continue
                sent = tamper(k, (start + draw.standard_normal(len(start))).astype(np.float32))
                yield Answer(k, sent, weight, loss, distance(sent, start))

        return reply(edit(gathered(order, answers())), message)

    return app


def begun(strategy: str, devices: int, nodes: int, apart: bool = False, **keys: int) -> AdapterFederation:
    """A federation before its first round; ``apart``: every vector travels, as if it were not linear."""
    usual = parse({"job": "train", "strategy": strategy, "model.rank": RANK})
    config = usual.model_copy(update={"train": usual.train.model_copy(update={"devices": devices, **keys})})
    rule: type[Algorithm] = ALGORITHMS[strategy]
    if apart:
        rule = type("Apart", (rule,), {"linear": False})
    algorithm = rule(config)
    start = np.random.default_rng(3).standard_normal(LAYOUT.size).astype(np.float32)
    algorithm.init(start, range(devices), LAYOUT)
    where = usual.federation.model_copy(update={"supernodes": nodes})
    return AdapterFederation(algorithm, "{}", range(devices), where)


def played(
    federation: AdapterFederation, client: ClientApp, rounds: int = 2
) -> tuple[NDArray[np.float32], Cost]:
    """Return the model after some rounds, and the last round's cost."""
    grid = InProcessGrid(client, federation.supernodes, {})
    for number in range(1, rounds + 1):
        cost = federation.train_round(grid, number)
    return federation.algorithm.models()[0], cost


# --- chunks and the tree --------------------------------------------------------------------------------


@given(st.integers(0, 500))
def test_chunks_are_contiguous_alike_in_size_and_only_for_many(devices: int) -> None:
    chunks = chunked(devices)
    if devices <= APART:
        assert chunks == []
        return
    sizes = np.bincount(chunks)
    assert len(chunks) == devices and chunks == sorted(chunks)
    assert len(sizes) == min(devices, CHUNKS) and sizes.max() - sizes.min() <= 1


@given(
    count=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 70), max_size=8),
    absent=st.sets(st.integers(0, 70)),
)
def test_the_tree_gives_the_same_bits_wherever_it_is_cut(
    count: int, cuts: list[int], absent: set[int]
) -> None:
    draw = np.random.default_rng(count)
    values = [
        None if c in absent else draw.standard_normal(3) * 10.0 ** draw.integers(-9, 9) for c in range(count)
    ]

    def grown(nodes: Iterator[tuple[tuple[int, int], NDArray[np.float64] | None]]) -> Tree:
        tree = Tree()
        for node, total in nodes:
            tree.add(node, None if total is None else total.copy())
        return tree

    whole = grown(((0, c), values[c]) for c in range(count))
    borders = sorted({0, count, *(cut for cut in cuts if cut < count)})
    parts = []
    for begin, end in pairwise(borders):
        part = grown(((0, c), values[c]) for c in range(begin, end))
        found = tops(range(begin, end))
        assert list(dict.fromkeys(found.values())) == [node for node, _ in part.nodes]
        assert list(found) == list(range(begin, end))
        parts += part.nodes
    again = grown(iter(parts))
    assert [node for node, _ in again.nodes] == [node for node, _ in whole.nodes]
    for (_, one), (_, other) in zip(again.nodes, whole.nodes, strict=True):
        np.testing.assert_array_equal(one, other)  # of two None too


@given(st.integers(0, 3 * BLOCK), st.floats(0.1, 1e4))
@settings(max_examples=20)
def test_blocks_change_neither_sums_nor_norms(size: int, weight: float) -> None:
    draw = np.random.default_rng(size)
    vector, start = draw.standard_normal((2, size)).astype(np.float32)
    total = draw.standard_normal(size)
    expected = total + weight * vector.astype(np.float64)
    add_weighted(total, vector, weight)
    np.testing.assert_array_equal(total, expected)
    norm = np.linalg.norm(vector.astype(np.float64) - start)
    assert distance(vector, start) == pytest.approx(norm, rel=1e-12)


def test_the_norm_tells_a_vector_that_cannot_be_used() -> None:
    start, largest = np.zeros(3, np.float32), np.finfo(np.float32).max
    assert distance(np.full(3, largest), -np.full(3, largest)) == pytest.approx(2 * 3**0.5 * float(largest))
    for bad in (np.array([0, np.nan, 0]), np.array([np.inf, 0, -np.inf]), np.zeros(2)):
        assert np.isnan(distance(bad.astype(np.float32), start))


@given(st.lists(st.integers(0, 300), max_size=2), st.sampled_from(["<f4", "<f8", "|u1", "<i8"]))
def test_payload_bytes_are_those_of_the_frame_itself(shape: list[int], dtype: str) -> None:
    array = np.ones(shape, dtype)
    assert payload_bytes(array) == framed_bytes(tuple(shape), dtype) == len(Array(array).data)


# --- rounds ---------------------------------------------------------------------------------------------


def test_linear_rules_are_those_that_need_only_the_sum() -> None:
    adapter = {name for name, rule in ALGORITHMS.items() if rule.space == "adapter"}
    assert {name for name in adapter if ALGORITHMS[name].linear} == LINEAR


@pytest.mark.parametrize("strategy", sorted(LINEAR - {"fedit", "fedavg-full", "central"}))
def test_sums_equal_one_message_a_device(strategy: str) -> None:
    sums, cost = played(begun(strategy, COUNT, 3), moving())
    each, plain = played(begun(strategy, COUNT, COUNT, apart=True), moving())
    np.testing.assert_allclose(sums, each, rtol=1e-6, atol=1e-7)
    assert (cost.bytes_up, cost.bytes_down, cost.failures) == (plain.bytes_up, plain.bytes_down, [])
    assert cost.bytes_up == COUNT * framed_bytes(
        (int(LAYOUT.part(begun(strategy, 1, 1).algorithm.plan(2).returns).sum()),)
    )


@pytest.mark.parametrize("devices", [1, APART])
def test_few_devices_have_the_bits_of_one_message_a_device(devices: int) -> None:
    sums, _ = played(begun("fedavg-lora", devices, 2), moving())
    each, _ = played(begun("fedavg-lora", devices, 2, apart=True), moving())
    np.testing.assert_array_equal(sums, each)


@pytest.mark.parametrize("devices", [17, COUNT, 131])
def test_no_bit_depends_on_the_supernodes(devices: int) -> None:
    gone = frozenset({0, 5, 6, devices - 1})
    expected, _ = played(begun("rolora", devices, 1), moving(gone=gone))
    for nodes in (2, 3, 7, CHUNKS + 1):
        federation = begun("rolora", devices, nodes)
        found, _ = played(federation, moving(gone=gone))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(federation.heard == 0, [k in gone for k in range(devices)])


def test_a_supernode_sends_as_few_sums_as_it_can() -> None:
    for devices, nodes, expected in ((1000, 2, [1, 1]), (1000, 1, [1]), (APART, 2, [0, 0])):
        federation = begun("fedavg-lora", devices, nodes)
        grid = InProcessGrid(moving(), nodes, {})
        federation.train_round(grid, 1)
        reports = [decode(message.content, TrainReport) for message in grid.delivered[1::2]]
        assert [len(report.sums) for report in reports] == expected
        assert [len(report.vectors) > 0 for report in reports] == [devices == APART] * nodes


@pytest.mark.parametrize(
    ("tamper", "clause"),
    [
        (lambda k, v: np.full_like(v, np.nan) if k == 9 else v, "a vector that is not finite"),
        (lambda k, v: v[:-1] if k == 9 else v, f"{LAYOUT.size - 1} values instead of {LAYOUT.size}"),
    ],
    ids=["nan", "shape"],
)
def test_who_sends_what_cannot_be_used_is_left_out_and_named(tamper: Tamper, clause: str) -> None:
    models = []
    for apart in (False, True):
        federation = begun("fedavg-lora", COUNT, 2, apart)
        model, cost = played(federation, moving(tamper), rounds=1)
        assert cost.failures == [f"round 1: device 9 sent {clause}"]
        assert federation.heard[9] == 0 and np.count_nonzero(federation.heard) == COUNT - 1
        models.append(model)
    missing, _ = played(begun("fedavg-lora", COUNT, 2), moving(gone=frozenset({9})), rounds=1)
    np.testing.assert_array_equal(models[0], missing)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-6, atol=1e-7)


def test_a_sum_that_is_not_finite_or_has_another_shape_is_left_out() -> None:
    def poisoned(report: TrainReport) -> TrainReport:
        bad = np.full_like(report.sums, np.nan)
        return replace(report, sums=bad) if 0 in report.devices else report

    def short(report: TrainReport) -> TrainReport:
        return replace(report, sums=report.sums[:, 1:]) if 0 in report.devices else report

    half = frozenset(range(COUNT // 2))
    expected, _ = played(begun("fedavg-lora", COUNT, 2), moving(gone=half), rounds=1)
    for edit, words in ((poisoned, "sum of devices"), (short, "sums of shape")):
        model, cost = played(begun("fedavg-lora", COUNT, 2), moving(edit=edit), rounds=1)
        np.testing.assert_array_equal(model, expected)
        assert len(cost.failures) >= 1 and all(words in failure for failure in cost.failures)


class Weighed(Drawn):
    """Every device counts differently."""

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        turn = super().turn(number, load, poll)
        return replace(turn, factors=[1.0 + k / 7 for k in turn.ids])


def test_a_factor_multiplies_a_devices_weight_in_a_sum_as_outside_one() -> None:
    models = []
    for apart in (False, True):
        federation = begun("fedavg-lora", COUNT, 2, apart)
        federation.hands.participation = Weighed(federation.algorithm)
        models.append(played(federation, moving(), rounds=1)[0])
    start = begun("fedavg-lora", COUNT, 1).algorithm.models()[0]
    moved = [np.random.default_rng((1, k)).standard_normal(LAYOUT.size) for k in range(COUNT)]
    weights = [(1.0 + k / 7) * (1 + k % 5) for k in range(COUNT)]
    np.testing.assert_allclose(models[0], start + np.average(moved, axis=0, weights=weights), atol=1e-6)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-6, atol=1e-7)


def test_a_poll_brings_losses_and_no_vectors() -> None:
    federation = begun("fedavg-lora", COUNT, 2)
    grid = InProcessGrid(moving(gone=frozenset({4})), 2, {})
    assert federation.poll(grid, 1, [3, 4, 20, 39]) == {3: 3.0, 20: 20.0, 39: 39.0}
    reports = [decode(message.content, TrainReport) for message in grid.delivered[1::2]]
    assert all(len(report.vectors) == len(report.sums) == 0 for report in reports)
    assert not federation.heard.any()
    assert federation.cost.bytes_down == 4 * framed_bytes((LAYOUT.size,))


def test_a_hundred_thousand_devices_draw_and_resume_as_a_few_do() -> None:
    first = begun("fedavg-lora", 100_000, 2, cohort=60)
    played(first, moving(), rounds=1)
    second = begun("fedavg-lora", 100_000, 2, cohort=60)
    second.load(first.state())
    assert np.count_nonzero(second.heard) == 60
    cohort = first.algorithm.cohort(2)
    assert cohort == sorted(set(cohort)) and len(cohort) == 60 and type(cohort[0]) is int
    grid = InProcessGrid(moving(), 2, {})
    for federation in (first, second):
        federation.train_round(grid, 2)
    np.testing.assert_array_equal(first.algorithm.models(), second.algorithm.models())
    np.testing.assert_array_equal(first.heard, second.heard)
    assert set(np.flatnonzero(second.heard == 2)) == set(cohort)


@given(work=st.lists(st.floats(0.01, 100.0), max_size=40), parts=st.integers(1, 9))
def test_slices_are_of_like_work(work: list[float], parts: int) -> None:
    cut = balanced(work, parts)
    assert [slot for own in cut for slot in own.tolist()] == list(range(len(work)))
    assert len(cut) <= parts
    assert all(len(own) for own in cut)
    if work:
        heaviest = max(sum(work[slot] for slot in own) for own in cut)
        assert heaviest <= sum(work) / parts + max(work) * (1.0 + 1e-9)
