"""A sweep: its axes as one line, its cells, what it refuses, how it goes on and grows, and what it shows."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from fedlam_app import checks, launch
from fedlam_app.base import axes
from fedlam_app.cli import app as command_line
from fedlam_app.client_app import app
from fedlam_app.config import ConfigError, Scalar, parse, to_flat
from fedlam_app.experiments import promises, report, summary, sweep_plots, sweep_table
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.report import write_report
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder, read_metrics
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy.accounting import Ledger, Release
from fedlam_app.privacy.membership import loss_threshold
from tests.tiny import tiny_mixture_run, write_texts

Flat = dict[str, Scalar]

MIXTURE: Flat = {"job": "sweep", "task": "mixture", "strategy": "fedavg-lora"}
PRIVATE: Flat = MIXTURE | {"privacy.mechanism": "dp-sgd"}
RATES = "train.lr=0.05,0.5; strategy=fedavg-lora,local; seed=1,2"


def swept(over: str, base: Mapping[str, Scalar] = MIXTURE, **keys: Scalar) -> Flat:
    return {**base, "sweep.over": over, **{key.replace("__", "."): value for key, value in keys.items()}}


def names(over: str, base: Mapping[str, Scalar] = MIXTURE, **keys: Scalar) -> list[str]:
    return [cell.key for cell in cells_of(parse(swept(over, base, **keys)))]


def run(flat: Flat) -> tuple[RunFolder, list[str]]:
    """Run a sweep in this process; return its folder and the lines that it said."""
    torch.set_num_threads(1)
    config, said = parse(flat), []
    folder = RunFolder.open(config)
    run_cells(InProcessGrid(app, 1, flat), flat, cells_of(config), folder, 1, said.append)
    return folder, said


def tiny(results: Path, over: str, **keys: Scalar) -> Flat:
    small: Flat = {"train.rounds": 2, "train.evaluate-every": 2, "federation.supernodes": 1}
    return swept(over, tiny_mixture_run() | {"job": "sweep"} | small, results=str(results), **keys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of a rate, a strategy and two seeds that has run to its end."""
    return run(tiny(tmp_path_factory.mktemp("sweep") / "run", RATES))[0].path


# --- axes -------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["train.lr", "strategy", "seed", "privacy.target-epsilon", "train.ranks", "model.rank"]
)
VALUES = st.from_regex(r"[A-Za-z0-9._|/+-]{1,8}", fullmatch=True)
AXES = st.dictionaries(KEYS, st.lists(VALUES, min_size=1, max_size=4, unique_by=axes.spelling), min_size=1)


@given(AXES)
def test_axes_are_read_as_they_are_written(given_axes: dict[str, list[str]]) -> None:
    wanted = {key: tuple(values) for key, values in given_axes.items()}
    assert axes.read_axes(axes.write_axes(wanted)) == wanted
    line = axes.write_axes(wanted)
    assert axes.read_axes(" ; ".join(f" {part} " for part in line.split("; ")) + ";") == wanted


@given(AXES)
def test_points_are_the_product_and_no_point_comes_twice(given_axes: dict[str, list[str]]) -> None:
    wanted = {key: tuple(values) for key, values in given_axes.items()}
    points = list(axes.points(wanted))
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert len(points) == math.prod(len(values) for values in wanted.values())
    assert all(list(point) == list(wanted) for point in points)


@given(AXES)
def test_flower_passes_axes_on_unchanged(given_axes: dict[str, list[str]]) -> None:
    from flwr.common.config import parse_config_args

    line = axes.write_axes(given_axes)
    text = f"job={launch._quoted('job', 'sweep')} sweep.over={launch._quoted('sweep.over', line)}"
    assert parse_config_args([text]) == {"job": "sweep", "sweep.over": line}


@given(st.floats(allow_nan=False) | st.integers(-(10**9), 10**9))
def test_a_number_has_one_spelling(number: float) -> None:
    one = axes.spelling(repr(number))
    assert float(one) == number
    assert axes.spelling(one) == one
    assert axes.spelling(f"{number!r}".replace("e", "E")) == one


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ("", "'sweep.over' = '' has no axis: it must be key=value,value"),
        ("train.lr", "'sweep.over' has 'train.lr', which is no axis"),
        ("train.lr=", "which is no axis"),
        ("train.lr=0.1,,0.2", "which is no axis"),
        ("=0.1", "which is no axis"),
        ("train.lr=0.1; train.lr=0.2", "has the axis 'train.lr' twice"),
        ("train.lr=0.1,0.10", "has train.lr = 0.1 twice"),
        ("strategy='fedit'", "a value must not hold quotes"),
        ("job=train,compare", "has the axis 'job', which is the same for a whole run"),
        ("task=mixture,text-classification", "has the axis 'task', which is the same"),
        ("federation.supernodes=1,2", "has the axis 'federation.supernodes', which is the same"),
        ("compare.seeds=1,2", "has the axis 'compare.seeds', which is the same"),
    ],
)
def test_what_is_no_axis_is_refused_in_one_sentence(over: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(swept(over))
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flat", "reason"),
    [
        (swept("train.lrr=0.1,0.2"), "in 'lrr = 0.1': unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (
            swept("train.lr=0.1,fast"),
            "in 'lr = fast': 'train.lr' = 'fast' is not allowed: it must be",
        ),
        (swept("train.rounds=2,2.5"), "in 'rounds = 2.5': 'train.rounds' = 2.5 is not allowed"),
        (swept("strategy=fedavg-lora,fedavg-lroa"), "in 'fedavg-lroa': unknown strategy 'fedavg-lroa'; did"),
        (swept("strategy=fedavg-lora,flora"), "in 'flora': 'strategy' = 'flora' needs LoRA"),
        (swept("train.cohort=5,20"), "in 'cohort = 20': 'train.cohort' = 20 must not be above"),
        (
            swept("privacy.mechanism=dp-sgd,jacobian; privacy.target-epsilon=1,inf"),
            "in 'jacobian, ε = 1': 'privacy.mechanism' = 'jacobian' is not allowed with 'strategy'",
        ),
        (swept("privacy.target-epsilon=1,-1", PRIVATE), "in 'ε = -1': 'privacy.target-epsilon' = -1 is not"),
        (swept("privacy.target-epsilon=1,nan", PRIVATE), "'privacy.target-epsilon' = nan is not allowed"),
        (swept("privacy.target-epsilon=1,8"), "changes nothing where 'privacy.mechanism' = 'none'"),
        (swept("privacy.clip=1,8; privacy.mechanism=none"), "has the axis 'privacy.clip', which changes"),
        (
            swept("privacy.target-epsilon=1,8", PRIVATE, **{"privacy.device-epsilons": "1,2"}),
            "changes nothing beside 'privacy.device-epsilons'",
        ),
        (
            swept("privacy.clip=1,2", PRIVATE, **{"privacy.ledgers": "/tmp/ledgers"}),
            "whose experiments would spend each other's budgets",
        ),
        (swept("seed=1,two"), "'seed' = 'two' is not allowed"),
    ],
)
def test_a_cell_that_cannot_run_is_named_before_anything_starts(flat: Flat, reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        checks.check(parse(flat))
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


# --- cells ------------------------------------------------------------------------------------------------


def test_cells_are_the_product_with_seeds_outermost() -> None:
    assert names("train.lr=0.1,0.2; seed=3,4; strategy=fedavg-lora,local") == [
        f"strategy={strategy},train.lr={rate}-seed{seed}"
        for seed in (3, 4)
        for rate in (0.1, 0.2)
        for strategy in ("fedavg-lora", "local")
    ]
    assert names("seed=1,2", seed=9) == ["strategy=fedavg-lora-seed1", "strategy=fedavg-lora-seed2"]
    assert names("train.lr=1", seed=9) == ["train.lr=1-seed9"]


def test_a_cells_name_depends_on_its_point_alone() -> None:
    many = names("train.lr=0.1,0.2,1.0; strategy=fedavg-lora,local")
    assert set(names("strategy=local; train.lr=1,0.10")) < set(many)
    long = names("text.source=/a/b c.csv,/a/b_c.csv", {**MIXTURE, "task": "text-classification"})
    assert len(set(long)) == 2 and not any("/" in name or " " in name for name in long)


def test_every_cell_is_a_training_of_its_own_with_its_values() -> None:
    flat = swept("privacy.target-epsilon=1,inf; train.lr=1; train.optimiser=sgd", PRIVATE, seed=5)
    low, high = cells_of(parse(flat))
    base = to_flat(parse(flat))
    own = parse({**base, **json.loads(json.dumps(high.overrides))})  # as a SuperNode hears of it
    assert own.job == "train" and own.seed == 5 and own.privacy.noiseless
    assert own.train.lr == 1.0 and own.train.optimiser == "sgd"
    assert parse({**base, **low.overrides}).privacy.target_epsilon == 1.0
    assert high.axes == {"privacy.target-epsilon": "inf", "train.lr": "1", "train.optimiser": "sgd"}
    assert high.label == "ε = ∞, lr = 1, optimiser = sgd"


def test_a_list_is_one_value_with_bars() -> None:
    base = {"job": "sweep", "task": "text-classification", "strategy": "flora", "model.backbone": "random"}
    cells = cells_of(parse(swept("train.ranks=2|8,8", base)))
    assert [cell.overrides["train.ranks"] for cell in cells] == ["2,8", "8"]
    assert parse({**base, **cells[0].overrides}).train.ranks == (2, 8)
    assert cells[0].label == "ranks = 2,8"


def test_no_privacy_is_one_cell_whatever_the_budget() -> None:
    over = "privacy.mechanism=none,dp-sgd; privacy.target-epsilon=1,8; strategy=fedavg-lora,local"
    found = names(over)
    assert len(found) == 2 + 4 == len(set(found))
    assert sum("mechanism=none" in name for name in found) == 2
    checks.check(parse(swept(over)))


def test_whole_models_are_tuned_whole_as_in_a_comparison() -> None:
    base: Flat = {"job": "sweep", "task": "text-classification", "model.backbone": "random"}
    checks.check(parse(swept("strategy=fedavg-lora,fedavg-full", base)))


def test_infinity_survives_the_configuration() -> None:
    config = parse({**PRIVATE, "job": "train", "privacy.target-epsilon": math.inf})
    assert parse(to_flat(config)) == config and config.privacy.noiseless
    lists = parse({**PRIVATE, "job": "train", "privacy.device-epsilons": "1,inf"})
    assert parse(to_flat(lists)) == lists and lists.privacy.budget(1) == math.inf


# --- the command ------------------------------------------------------------------------------------------


def fedlam(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(command_line, list(words))
    return result.exit_code, result.output


def test_the_command_says_how_many_cells_and_what_is_promised(home: Path, tmp_path: Path) -> None:
    base = "task=text-classification model.backbone=random privacy.mechanism=dp-sgd train.devices=4"
    texts = f"text.source={write_texts(tmp_path / 'texts.jsonl', 90)}"
    axes_given = ("privacy.target-epsilon=1,8,inf", "strategy=fedit,ffa-lora", "seed=1,2")
    code, output = fedlam("sweep", *axes_given, "-c", f"{base} {texts}", "--dry-run", "--supernodes", "1")
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0] == f"results: {home / 'fedlam-runs' / 'sweep'}"
    assert lines[1] == "cells: 12"
    assert [line.split("epsilon at most ")[1][:4] for line in lines if line.startswith("privacy:")] == [
        "1 at",
        "8 at",
        "none",
    ]
    assert output.count("NOT covered") == 1  # what differs in the budget alone is said once
    from flwr.common.config import parse_config_args

    words = shlex.split(lines[-1])
    told = parse_config_args([words[words.index("--run-config") + 1]])
    assert told["job"] == "sweep" and told["sweep.over"] == "; ".join(axes_given)
    assert [cell.key for cell in cells_of(parse(told))] == names("; ".join(axes_given), told)
    assert list(home.iterdir()) == []


def test_the_command_refuses_with_the_cells_name(home: Path) -> None:
    code, output = fedlam("sweep", "train.cohort=5,20", "-c", "task=mixture", "--dry-run")
    assert code == 2 and len(output.splitlines()) == 1
    assert "in 'cohort = 20': 'train.cohort' = 20 must not be above 'train.devices' = 10" in output


def test_paths_among_the_values_become_absolute(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "mine.jsonl", 90)
    flat: Flat = {"job": "sweep", "task": "text-classification", "model.backbone": "random"}
    config = launch.resolve(flat | {"sweep.over": "text.source=mine.jsonl,rotten-tomatoes"})
    assert config.sweep.over == f"text.source={tmp_path / 'mine.jsonl'},rotten-tomatoes"
    with pytest.raises(ConfigError, match=r"in 'source = .*missing\.jsonl': .* does not exist"):
        launch.resolve(flat | {"sweep.over": "text.source=mine.jsonl,missing.jsonl"})


# --- runs -------------------------------------------------------------------------------------------------


def finals(path: Path) -> dict[str, dict[str, Any]]:
    return {str(r["key"]): r for r in read_metrics(path) if r.get("kind") == "final"}


def test_a_cell_of_a_sweep_is_the_training_that_it_names(finished: Path, tmp_path: Path) -> None:
    found = finals(finished)
    assert len(found) == 8
    record = found["strategy=local,train.lr=0.5-seed2"]
    assert record["axes"] == {"train.lr": "0.5", "strategy": "local"} and record["seed"] == 2
    small: Flat = {"train.rounds": 2, "train.evaluate-every": 2, "federation.supernodes": 1}
    own: Flat = {"strategy": "local", "train.lr": 0.5, "seed": 2, "results": str(tmp_path / "alone")}
    alone = finals(run({**tiny_mixture_run(), **small, **own})[0].path)["local-seed2"]
    for key in ("accuracy", "loss", "train_loss", "attack_auc", "bytes_up"):
        assert record[key] == alone[key], key


def test_a_resumed_sweep_skips_what_is_finished(tmp_path: Path) -> None:
    flat = tiny(tmp_path / "run", "train.lr=0.05,0.5")
    folder, _ = run(flat)
    whole = finals(folder.path)
    lines = [r for r in read_metrics(folder.path) if not (r["cell"] == "train.lr=0.5" and r["round"] > 0)]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder.path / "state" / "train.lr=0.5-seed7.safetensors").unlink()  # killed before its first round
    _, said = run(flat | {"resume": True})
    assert all("lr = 0.5" in line for line in said) and said
    again = finals(folder.path)
    assert [again[key]["accuracy"] for key in whole] == [whole[key]["accuracy"] for key in whole]
    with pytest.raises(ConfigError, match="already holds this run's results"):
        RunFolder.open(parse(flat))


def test_a_sweep_grows_and_loses_nothing(tmp_path: Path) -> None:
    flat = tiny(tmp_path / "run", "train.lr=0.05,0.5")
    folder, _ = run(flat)
    before = read_metrics(folder.path)
    states = {path: path.read_bytes() for path in (folder.path / "state").iterdir()}
    grown = flat | {"sweep.over": "seed=7,8; train.lr=0.5,0.10,0.05"}  # other order, other spelling
    _, said = run(grown)
    assert read_metrics(folder.path)[: len(before)] == before
    assert {path: path.read_bytes() for path in states} == states
    assert len(finals(folder.path)) == 6
    assert not any(", seed 7" in line and "lr = 0.1" not in line for line in said)
    saved = folder.config()["config"]
    assert isinstance(saved, dict) and saved["sweep.over"] == grown["sweep.over"]
    with pytest.raises(
        ConfigError, match=r"of which this one has no 'lr = 0\.1' \(1 in all\)|a sweep may grow"
    ):
        RunFolder.open(parse(grown | {"sweep.over": "seed=7,8; train.lr=0.5,0.05"}))
    with pytest.raises(ConfigError, match=r"holds another run: its 'train\.rounds' is 2"):
        RunFolder.open(parse(grown | {"train.rounds": 3, "sweep.over": "seed=7,8,9; train.lr=0.5,0.1,0.05"}))
    with pytest.raises(ConfigError, match="already holds this run's results"):
        RunFolder.open(parse(grown))


def test_a_killed_cell_keeps_its_devices_when_the_sweep_grows(tmp_path: Path) -> None:
    """What devices remember, their privacy ledgers too, does not depend on the other points."""
    from clients.memory import Memory

    flat = tiny(tmp_path / "run", "train.lr=0.05,0.5")
    cell = cells_of(parse(flat))[0]
    grown = flat | {"sweep.over": "train.lr=0.05,0.5,5", "resume": True}
    small, large = (Memory(parse({**base, **cell.overrides})).folder for base in (flat, grown))
    assert small == large
    other = cells_of(parse(grown))[1]
    assert Memory(parse({**grown, **other.overrides})).folder != large


# --- the attack -------------------------------------------------------------------------------------------

LOSSES = st.lists(st.floats(0, 8, width=16), min_size=1, max_size=12)


@given(LOSSES, LOSSES)
def test_the_auc_is_the_share_of_pairs(members: list[float], others: list[float]) -> None:
    m, n = np.array(members), np.array(others)
    pairs = (m[:, None] < n[None]) + 0.5 * (m[:, None] == n[None])
    attack = loss_threshold(m, n)
    assert attack.auc == pytest.approx(pairs.mean(), abs=1e-12)
    assert 0.0 <= attack.accuracy <= 1.0 and attack.auc_se >= 0.0
    assert loss_threshold(n, m).auc == pytest.approx(1.0 - attack.auc, abs=1e-12)


def test_standard_errors_are_the_spread_of_repetitions() -> None:
    draw = np.random.default_rng(5)
    attacks = [loss_threshold(draw.exponential(1.0, 200), draw.exponential(1.5, 300)) for _ in range(2000)]
    for figure in ("auc", "accuracy"):
        spread = np.std([getattr(attack, figure) for attack in attacks])
        said = np.mean([getattr(attack, f"{figure}_se") for attack in attacks])
        assert said == pytest.approx(spread, rel=0.06)  # the threshold is drawn too, which adds a little
    assert np.mean([attack.auc for attack in attacks]) == pytest.approx(1.5 / 2.5, abs=0.003)


def test_a_model_without_losses_says_nothing() -> None:
    for members, others in (([math.nan, 1.0], [1.0]), ([], [1.0])):
        assert math.isnan(loss_threshold(np.array(members), np.array(others)).auc)
    assert loss_threshold(np.array([0.0, 1.0]), np.array([math.inf])).auc == 1.0


def test_what_is_recorded_is_the_attack_on_the_final_model(finished: Path) -> None:
    from safetensors.numpy import load_file

    from fedlam_app.base.vectors import unpack
    from fedlam_app.tasks.mixture import Mixture

    key = "strategy=fedavg-lora,train.lr=0.5-seed1"
    flat = json.loads((finished / "config.json").read_text())["config"]
    config = parse({**flat, "job": "train", "train.lr": 0.5, "seed": 1})
    task = Mixture(config)
    model = task.build_model()
    unpack(load_file(finished / "state" / f"{key}.safetensors")["models"][0], model.trainable().values())
    losses = {
        split: np.concatenate([task.evaluate(model, chunk, 0)[:, 0] for chunk in task.chunks(split)])
        for split in ("train", "test")
    }
    pairs = losses["train"][:, None] < losses["test"][None]
    record = finals(finished)[key]
    assert record["attack_auc"] == pytest.approx(pairs.mean(), abs=1e-9)
    assert record["attack_auc_se"] == pytest.approx(loss_threshold(*losses.values()).auc_se, rel=1e-9)


def test_a_model_that_learned_by_heart_gives_its_members_away(tmp_path: Path) -> None:
    keys: Flat = {
        "job": "train", "strategy": "central", "results": str(tmp_path / "run"), "train.rounds": 30,
        "train.local-steps": 20, "train.evaluate-every": 30, "train.optimiser": "adamw", "train.lr": 0.01,
        "mixture.examples": 16, "mixture.spread": 0.0, "mixture.noise": 3.0, "mixture.dirichlet": 100.0,
        "federation.supernodes": 1,
    }  # fmt: skip
    folder, _ = run(tiny_mixture_run() | keys)
    first, last = read_metrics(folder.path)
    assert last["attack_auc"] > 0.8 and last["attack_accuracy"] > 0.7
    assert abs(first["attack_auc"] - 0.5) < 4 * first["attack_auc_se"]  # before training: guessing


# --- what is shown ----------------------------------------------------------------------------------------


def rendered(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(summary.final_table(records))
    return text.getvalue()


def test_the_table_shows_the_numbers_of_the_records(finished: Path) -> None:
    records = read_metrics(finished)
    found = finals(finished)
    own = [found[f"strategy=local,train.lr=0.05-seed{seed}"] for seed in (1, 2)]
    mean, sd = (100 * f([r["accuracy"] for r in own]) for f in (np.mean, lambda v: np.std(v, ddof=1)))
    auc = np.mean([r["attack_auc"] for r in own])
    lines = [line for line in rendered(records).splitlines() if "0.05" in line and "local" in line]
    assert len(lines) == 1
    assert f"{mean:.1f} ± {sd:.1f}" in lines[0] and f"{auc:.3f} ± " in lines[0]
    page = write_report(finished).read_text(encoding="utf-8")
    assert f"<td>{mean:.1f} ± {sd:.1f}</td>" in page and "mean ± standard deviation over 2 seeds" in page
    rows = sweep_table.sweep_rows(records)
    assert [list(row.point.values()) for row in rows] == [
        ["0.05", "fedavg-lora"], ["0.05", "local"], ["0.5", "fedavg-lora"], ["0.5", "local"],
    ]  # fmt: skip


def test_the_figure_shows_the_numbers_of_the_records(finished: Path) -> None:
    records = read_metrics(finished)
    write_report(finished)
    assert (finished / "plots" / "sweep.png").stat().st_size > 10_000
    figure = sweep_plots.sweep_figure(records)
    assert figure is not None and len(figure.axes) == 2
    rows = {row.label: row for row in sweep_table.sweep_rows(records)}
    for axes_drawn, key, scale in zip(figure.axes, ("accuracy", "attack_auc"), (100, 1), strict=True):
        bars = {str(c.get_label()): c.lines for c in axes_drawn.containers}
        assert set(bars) == {"fedavg-lora", "local"}
        for name, (line, _, (segments,)) in bars.items():
            own = [rows[f"lr = {rate}, {name}"] for rate in ("0.05", "0.5")]
            assert list(line.get_ydata()) == pytest.approx([scale * row.means[key] for row in own])
            half = [np.ptp(segment[:, 1]) / 2 for segment in segments.get_segments()]
            assert half == pytest.approx([scale * row.sds[key] for row in own])
    assert 0.5 in [line.get_ydata()[0] for line in figure.axes[1].lines]
    assert figure.axes[0].get_xscale() == "log"


def made(epsilon: str, strategy: str, seed: int, accuracy: float, **more: object) -> dict[str, Any]:
    point = {"strategy": strategy, "privacy.target-epsilon": epsilon} if epsilon else {"strategy": strategy}
    cell = ",".join(f"{key}={value}" for key, value in point.items())
    spent = {"epsilon": None if epsilon == "inf" else 0.99 * float(epsilon)} if epsilon else {}
    return {
        "task": "text-classification", "cell": cell, "key": f"{cell}-seed{seed}", "label": cell, "seed": seed,
        "axes": point, "round": 4, "kind": "final", "accuracy": accuracy, "loss": 1.0, "train_loss": 1.0,
        "attack_auc": 0.5 + accuracy / 10, "attack_auc_se": 0.01, **spent, **more,
    }  # fmt: skip


MADE = [
    made(epsilon, strategy, seed, score + seed / 100)
    for strategy, scores in (("fedit", (0.6, 0.7, 0.8)), ("ffa-lora", (0.7, 0.75, 0.7)))
    for epsilon, score in zip(("8", "1", "inf"), scores, strict=True)
    for seed in (0, 1)
]


def test_epsilon_is_drawn_on_a_logarithm_with_infinity_at_the_right_end() -> None:
    figure = sweep_plots.sweep_figure([*MADE, made("", "none at all", 0, 0.9)])
    assert figure is not None
    left, right = figure.axes
    assert left.get_xscale() == right.get_xscale() == "log"
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "8", "∞"]
    ticks = list(left.get_xticks())
    assert ticks[:2] == [1.0, 8.0] and ticks[2] == pytest.approx(64.0)
    fedit = next(c.lines for c in left.containers if c.get_label() == "fedit")
    assert list(fedit[0].get_ydata()) == pytest.approx([70.5, 60.5, 80.5])
    assert list(fedit[0].get_xdata()) == pytest.approx(ticks, rel=0.05)
    levels = {str(line.get_label()): line.get_ydata()[0] for line in left.lines}
    assert levels["none at all"] == pytest.approx(90.0)


def test_one_seed_has_the_attacks_standard_error_for_a_bar() -> None:
    own = [record for record in MADE if record["seed"] == 0 and record["axes"]["strategy"] == "fedit"]
    where, log = sweep_plots.places(["1", "8", "inf"])
    assert log
    bars = sweep_plots.marks(own, "privacy.target-epsilon", "attack_auc", where)[:, 2]
    assert bars.tolist() == [0.01] * 3
    assert not sweep_plots.marks(own, "privacy.target-epsilon", "accuracy", where)[:, 2].any()


def test_a_sweep_without_numbers_has_a_table_and_no_figure() -> None:
    records = [
        {**record, "axes": {"strategy": record["axes"]["strategy"]}} for record in MADE[:1] + MADE[-1:]
    ]
    assert sweep_plots.sweep_figure(records) is None
    assert "ffa-lora" in rendered(records)


def test_what_a_budget_costs_is_said_and_what_is_spent_without_end_is_shown() -> None:
    said = sweep_table.sentences(MADE)
    assert said[0] == "Best: fedit, ε = ∞, held-out accuracy 80.5 %."
    assert "fedit: ε = 1 costs 10.0 points against ε = ∞." in said
    assert "ffa-lora: ε = 1 gains 5.0 points against ε = ∞." in said
    table = rendered(MADE)
    row = next(line for line in table.splitlines() if "∞" in line and "fedit" in line)
    assert row.count("∞") == 2  # the target, and what was spent
    assert re.search(r"│ 1 +│ ffa-lora │ +75\.5 ± 0\.7 │ +0\.99 │", table)


def test_the_report_says_what_is_promised_and_counts_it_twice(tmp_path: Path) -> None:
    over = "privacy.target-epsilon=2,inf"
    mechanism: Flat = {"privacy.mechanism": "dp-sgd", "privacy.delta": 1e-3}
    folder, _ = run(tiny(tmp_path / "run", over, **mechanism))
    page = write_report(folder.path).read_text(encoding="utf-8")
    for words in ("What is promised", "sample-level DP (dp-sgd)", "whoever gets the model", "Not covered:"):
        assert words in page
    key = "privacy.target-epsilon=2-seed7"
    books = json.loads((folder.path / "privacy" / f"{key}.json").read_text())["ledgers"].values()
    ledgers = [Ledger.from_json(json.dumps(book)) for book in books]
    most = max(ledgers, key=lambda ledger: ledger.epsilon)
    record = finals(folder.path)[key]
    assert record["epsilon"] == most.epsilon
    assert 1.9 <= most.epsilon <= 2.0
    assert 0.5 * most.epsilon < most.prv() < most.epsilon
    assert f"<td>2</td><td>0.001</td><td>{most.epsilon:.4g}</td><td>{most.prv():.4g}</td>" in page
    assert finals(folder.path)["privacy.target-epsilon=inf-seed7"]["epsilon"] is None


def test_the_second_look_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(math.inf, 1e-3)
    ledger.charge(Release(group="a", z=2.0, q=0.1, steps=9))
    run_folder = RunFolder(tmp_path)
    run_folder.save_privacy(
        "one", {"statement": {"label": "x"}, "ledgers": {"0": json.loads(ledger.to_json())}}
    )
    first = promises.second_looks(tmp_path, promises.read(tmp_path))
    assert first == {"one": pytest.approx(ledger.prv())}

    def never(self: Ledger, error: float = 0.01) -> float:
        raise AssertionError("asked again")

    monkeypatch.setattr(Ledger, "prv", never)
    assert promises.second_looks(tmp_path, promises.read(tmp_path)) == first
    ledger.charge(Release(group="b", z=3.0, q=0.1))
    run_folder.save_privacy(
        "one", {"statement": {"label": "x"}, "ledgers": {"0": json.loads(ledger.to_json())}}
    )
    with pytest.raises(AssertionError, match="asked again"):
        promises.second_looks(tmp_path, promises.read(tmp_path))


def test_another_run_has_no_sweep_and_no_promise(tmp_path: Path) -> None:
    plain = [{key: value for key, value in record.items() if key != "axes"} for record in MADE]
    assert sweep_plots.sweep_figure(plain) is None and not sweep_table.is_sweep(plain)
    folder = RunFolder.open(parse({"results": str(tmp_path / "run"), "task": "text-classification"}))
    for record in plain:
        folder.append_metrics(record)
    page = report.write_report(folder.path).read_text(encoding="utf-8")
    assert "What is promised" not in page and not (folder.path / promises.CACHE).exists()
