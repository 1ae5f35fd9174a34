"""Every strategy on every task: it runs, packing changes no bit of it, and where it was killed it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedlam_app import checks
from fedlam_app.base.layout import Layout
from fedlam_app.base.records import SplitOrder, SplitReport, TrainOrder, TrainReport, cut, decode, kind_of
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.federate import federate
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder
from fedlam_app.grid import InProcessGrid
from fedlam_app.models.factors import layout_of
from fedlam_app.tasks import TASKS
from strategies import ALGORITHMS
from strategies.base import Federation
from tests.tiny import tiny_mixture_run, tiny_run, tiny_text_run

Flat = dict[str, Scalar]
State = dict[str, NDArray[np.generic]]

SPLIT = [name for name, rule in ALGORITHMS.items() if rule.space == "gradient"]
OWN: dict[str, Flat] = {  # what four devices allow, or a strategy asks for
    "fedavg-full": {"model.tuning": "full"},
    "trimmed-mean": {"robust.trim": 0.25},
    "multi-krum": {"robust.byzantine": 0},
    "fedbuff": {"fedbuff.buffer": 2},
    "scaffold": {"train.cohort": 3},
    "fed-sb": {"train.rounds": 3},  # its first round is the probe
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The edge server sets torch's threads, here as in a run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Flat]:
    folder = tmp_path_factory.mktemp("data")
    text = tiny_text_run(folder)
    channels = tiny_run(folder) | {"train.rounds": 2, "train.evaluate-every": 2, "train.batch-rows": 4}
    language: Flat = {"task": "language-modelling", "model.backbone": "random-gpt2", "text.test": 4}
    return {
        "channel-prediction": channels | {"federation.server-threads": 1},
        "text-classification": text,
        "language-modelling": text | language | {"text.train": 16, "train.batch-rows": 2},
        "mixture": tiny_mixture_run(),
    }


@pytest.fixture
def play(tasks: dict[str, Flat], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], State]]:
    """Run a strategy to its end in this process; return its final record and its last state."""

    def played(task: str, strategy: str, nodes: int = 2, **keys: Scalar) -> tuple[dict[str, Any], State]:
        flat = whole(tasks[task], strategy, tmp_path / f"{strategy}-{nodes}", keys)
        checks.check(parse(flat))
        folder = go(flat, nodes, lambda line: None)
        return folder.read_metrics()[-1], last_state(folder)

    return played


def whole(base: Flat, strategy: str, results: Path, keys: Flat) -> Flat:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return {**base, "strategy": strategy, **OWN.get(strategy, {}), **named, "results": str(results)}


def go(flat: Flat, nodes: int, say: Callable[[str], None]) -> RunFolder:
    flat = {**flat, "federation.supernodes": nodes}
    folder = RunFolder.open(parse(flat))
    run_cells(InProcessGrid(app, nodes, flat), flat, cells_of(parse(flat)), folder, 1, say)
    return folder


def last_state(folder: RunFolder) -> State:
    (file,) = (folder.path / "state").glob("*.safetensors")
    return dict(load_file(file))


def start(base: Flat, strategy: str, nodes: int = 1, **keys: Scalar) -> tuple[Federation, InProcessGrid]:
    """A federation before its first round."""
    flat = whole(base, strategy, Path("/runs/none"), keys) | {"federation.supernodes": nodes}
    config = parse(flat)
    task = TASKS[config.task](config)
    return federate(config, "{}", task, task.build_model()), InProcessGrid(app, nodes, flat)


# --- the matrix -------------------------------------------------------------------------------------------

# What crosses is the same code for every rule of a family: half of them stand for all where it must be equal.
LAYOUTS = {"fedsgd-lora", "median", "scaffold", "fedbuff", "splitlora", "fedavg-lora", "rolora", "flora"} | {
    "fedsa-lora",
    "fed-sb",
    "local",
}
SPREAD_CHANNELS = {"fedsgd-lora", "splitlora", "fedavg-lora", "local"}  # the embedding trains as well
LANGUAGE = ("fedsgd-lora", "fedit", "central")
NO_LORA = ("fedavg-lora", "fedavg-full", "fedprox", "local", "central")  # what needs no backbone
MATRIX = [
    *((task, name) for task in ("text-classification", "channel-prediction") for name in ALGORITHMS),
    *(("language-modelling", name) for name in LANGUAGE),
    *(("mixture", name) for name in NO_LORA),
]


@pytest.mark.parametrize(("task", "strategy"), MATRIX, ids=[f"{name}-{task}" for task, name in MATRIX])
def test_every_strategy_runs(
    play: Callable[..., Any], tasks: dict[str, Flat], task: str, strategy: str
) -> None:
    last, state = play(task, strategy, nodes=1)
    assert last["kind"] == "final" and last["failures"] == 0
    channels = task == "channel-prediction"
    scores = ("train_loss_db", "nmse_clean_db") if channels else ("train_loss", "accuracy")
    assert all(np.isfinite(last[key]) for key in (*scores, "own_loss"))
    assert last["bytes_up"] > 0 and last["bytes_down"] > 0
    assert all(np.isfinite(array).all() for array in state.values() if array.dtype.kind == "f")

    federation, _ = start(tasks[task], strategy)
    for row, first in zip(state["models"], federation.algorithm.models(), strict=False):
        # Fed-SB's vector changes its length.
        assert row.shape != first.shape or not np.array_equal(row, first)

    if strategy in {"text-classification": LAYOUTS, "channel-prediction": SPREAD_CHANNELS}.get(task, ()):
        again, spread = play(task, strategy, nodes=3)
        assert set(spread) == set(state)
        for name, array in state.items():
            np.testing.assert_array_equal(spread[name], array, err_msg=name)
        # Bytes are counted with Flower's frame, and a split has one a message, not one a device.
        frames = {key: again[key] for key in ("bytes_up", "bytes_down")}
        assert without_clocks(again) == without_clocks(last) | frames


def test_the_published_llm4cp_is_split_too_and_its_dropout_is_keyed(play: Callable[..., Any]) -> None:
    keys: Flat = {"model__name": "llm4cp", "train__rounds": 1, "train__local_steps": 1}
    (_, one), (_, three) = (play("channel-prediction", "fedsgd-lora", nodes=n, **keys) for n in (1, 3))
    np.testing.assert_array_equal(one["models"], three["models"])


def without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the machine: every time but the virtual clock's ends in _s."""
    return {k: v for k, v in record.items() if not k.endswith("_s") and k != "peak_rss_bytes"}


# --- resumption -------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill in the middle of a run."""


STATEFUL: list[tuple[str, str, Flat]] = [
    ("text-classification", "fedbuff", {"fedbuff.buffer": 1}),
    ("text-classification", "scaffold", {"train.cohort": 2}),
    ("text-classification", "flora", {}),
    ("text-classification", "fedex-lora", {}),
    ("text-classification", "fed-sb", {}),
    ("text-classification", "fedsa-lora", {}),
    ("text-classification", "fedsgd-lora", {"split.heads": "personal"}),
    ("text-classification", "fedsgd-lora", {"split.heads": "averaged", "split.average-every": 2}),
    ("text-classification", "median", {"wire.jacobian": "top-k", "wire.delta": True}),
    ("channel-prediction", "fedsgd-lora", {}),  # the embedding trains on the device too
]


@pytest.mark.parametrize(
    ("task", "strategy", "keys"), STATEFUL, ids=[f"{s}-{t}-{','.join(k)}" for t, s, k in STATEFUL]
)
def test_a_killed_run_resumes_with_the_same_numbers(
    tasks: dict[str, Flat], tmp_path: Path, task: str, strategy: str, keys: Flat
) -> None:
    rounds: Flat = {"train.rounds": 3, "train.evaluate-every": 1}
    flat = {**tasks[task], "strategy": strategy, **OWN.get(strategy, {}), **rounds, **keys}
    straight = go({**flat, "results": str(tmp_path / "straight")}, 2, lambda line: None)

    def kill_in_round_2(line: str) -> None:
        if "round 2" in line:  # its record is written, its state not yet
            raise Stop

    killed: Flat = {**flat, "results": str(tmp_path / "killed")}
    with pytest.raises(Stop):
        go(killed, 2, kill_in_round_2)
    resumed = go({**killed, "resume": True}, 2, lambda line: None)
    whole, again = last_state(straight), last_state(resumed)
    assert set(whole) == set(again)
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    # A resumed split asks for its embeddings again: these bytes are spent again, and told.
    spent = ("bytes_up", "bytes_down") if strategy in SPLIT else ()
    for ours, theirs in zip(resumed.read_metrics(), straight.read_metrics(), strict=True):
        assert {k: v for k, v in without_clocks(ours).items() if k not in spent} == {
            k: v for k, v in without_clocks(theirs).items() if k not in spent
        }


# --- laws across strategies -------------------------------------------------------------------------------

ALONE = [
    "fedit",
    "fedprox",
    "central",
    "fedex-lora",
    "hetlora",
]  # with one device they hand back what it made


@pytest.mark.parametrize("strategy", ALONE)
def test_one_device_alone_is_local_training_under_every_rule(play: Callable[..., Any], strategy: str) -> None:
    keys: Flat = {"train__devices": 1, "train__proximal_mu": 0.0}
    _, expected = play("text-classification", "local", nodes=1, **keys)
    _, state = play("text-classification", strategy, nodes=1, **keys)
    # HetLoRA's weight is a norm: v w / w is v up to rounding.
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if strategy == "hetlora" else {"rtol": 0, "atol": 0}
    np.testing.assert_allclose(state["models"], expected["models"], **tolerance)


@pytest.mark.parametrize(
    ("strategy", "parts"), [("ffa-lora", ("a",)), ("rolora", ()), ("fedsa-lora", ("b",)), ("fedit", ())]
)
def test_a_factor_that_does_not_train_or_travel_stays_as_the_seed_drew_it(
    tasks: dict[str, Flat], strategy: str, parts: tuple[str, ...]
) -> None:
    federation, grid = start(tasks["text-classification"], strategy)
    first = federation.algorithm.models()[0].copy()
    federation.train_round(grid, 1)
    federation.train_round(grid, 2)
    layout: Layout = federation.algorithm.layout
    moved = federation.algorithm.models()[0] != first
    for part in ("a", "b", "other"):
        assert moved[layout.part(part)].any() == (part not in parts), part


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones(tasks: dict[str, Flat]) -> None:
    federation, grid = start(tasks["text-classification"], "rolora")
    layout: Layout = federation.algorithm.layout
    for number, (fixed, trained) in enumerate([("a", "b"), ("b", "a")], start=1):
        before = federation.algorithm.models()[0].copy()
        federation.train_round(grid, number)
        after = federation.algorithm.models()[0]
        np.testing.assert_array_equal(after[layout.part(fixed)], before[layout.part(fixed)])
        assert not np.array_equal(after[layout.part(trained)], before[layout.part(trained)])


@pytest.mark.parametrize("strategy", ["hetlora", "flexlora", "flora"])
def test_a_device_of_a_smaller_rank_sends_and_gets_less(tasks: dict[str, Flat], strategy: str) -> None:
    federation, grid = start(tasks["text-classification"], strategy, nodes=4, train__ranks="2,4,8")
    federation.train_round(grid, 1)
    layout: Layout = federation.algorithm.layout
    others = int(layout.part("other").sum())
    factors = sum(pair.inputs + pair.outputs for pair in layout.pairs)
    expected = {k: others + rank * factors for k, rank in enumerate([2, 4, 8, 2])}
    for kind in (TrainOrder, TrainReport):
        found = {}
        for message in grid.delivered:
            if kind_of(message.content) == kind.__name__:
                record = decode(message.content, kind)
                found[record.devices[0]] = len(record.vectors)  # one device a SuperNode
        assert found == expected
    other, _ = start(tasks["text-classification"], strategy, nodes=4)
    assert 2 * expected[0] < expected[2] == other.algorithm.layout.size


@pytest.mark.parametrize("strategy", SPLIT)
def test_a_split_sends_neither_factors_nor_labels_nor_heads(tasks: dict[str, Flat], strategy: str) -> None:
    federation, grid = start(tasks["text-classification"], strategy, nodes=2)
    federation.train_round(grid, 1)
    assert {kind_of(m.content) for m in grid.delivered} == {"SplitOrder", "SplitReport"}
    for message in grid.delivered:
        kind = SplitOrder if kind_of(message.content) == "SplitOrder" else SplitReport
        assert set(message.content.array_records["arrays"]) == {"payload"}
        record = decode(message.content, kind)
        assert len(cut(record.payload, record.sizes)) == len(record.devices)


def test_the_servers_vector_is_its_lora_alone(tasks: dict[str, Flat]) -> None:
    for task in ("text-classification", "channel-prediction"):
        federation, _ = start(tasks[task], "fedsgd-lora")
        config = parse({**tasks[task], "strategy": "fedsgd-lora"})
        model = TASKS[config.task](config).build_model()
        assert federation.algorithm.layout.size == layout_of(model.backbone, 2.0).size
        assert not federation.algorithm.layout.part("other").any()


def test_a_comparison_gives_each_strategy_its_own_numbers(
    play: Callable[..., Any], tasks: dict[str, Flat], tmp_path: Path
) -> None:
    """A strategy beside others has the bits that it has alone."""
    names = ("fedit", "fedsgd-lora", "majority")
    together: Flat = {"job": "compare", "compare.strategies": ",".join(names), "compare.seeds": 7}
    flat = {**tasks["text-classification"], **together, "results": str(tmp_path / "together")}
    checks.check(parse(flat))
    folder = go(flat, 2, lambda line: None)
    finals = {r["cell"]: r for r in folder.read_metrics() if r.get("kind") == "final"}
    assert set(finals) == set(names)
    for name in names[:2]:
        alone, state = play("text-classification", name)
        for key in ("accuracy", "train_loss", "loss", "own_loss"):
            assert finals[name][key] == alone[key]
        saved = load_file(folder.path / "state" / f"{name}-seed7.safetensors")
        np.testing.assert_array_equal(saved["models"], state["models"])
    assert json.loads((folder.path / "config.json").read_text())["config"]["job"] == "compare"
