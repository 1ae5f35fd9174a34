"""The report of a wireless fleet: its table says what the records say, its figures show it, others have
none."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedlam_app.config import Scalar, parse, to_flat
from fedlam_app.experiments import fleet_table, report, views
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.fleet_map import COUNT, map_figure, positions_m
from fedlam_app.experiments.fleet_plots import chosen_figure, fleet_figures, lorenz, time_figure
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder, read_metrics
from fedlam_app.wireless.fleet import Fleet
from fedlam_app.wireless.radio import Radio
from tests.tiny import tiny_mixture_run

FIGURES = {"time-to-accuracy", "fairness-energy", "chosen", "map"}
FLEET: dict[str, Scalar] = {
    "job": "compare",
    "compare.strategies": "fedavg-full,fedprox,linear-probe",
    "compare.seeds": "3,4",
    "train.devices": 40,
    "train.cohort": 4,
    "train.evaluate-every": 1,
    "fleet.profiles": "mixed",
    "fleet.update-mb": 1.6,
    "wireless.loss": "rayleigh",
    "wireless.interference-db": 10.0,
    "fleet.on-share": 1.0,
    "selection.mode": "over-selection",
    "selection.over": 1.5,
    "federation.supernodes": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison over a fleet of forty devices, with its report."""
    from fedlam_app.client_app import app
    from fedlam_app.grid import InProcessGrid

    torch.set_num_threads(1)
    flat = tiny_mixture_run() | FLEET | {"results": str(tmp_path_factory.mktemp("fleet"))}
    config = parse(flat)
    run = RunFolder.open(config)
    run_cells(InProcessGrid(app, 1, flat), flat, cells_of(config), run, 1, lambda line: None)
    report.write_report(run.path)
    return run.path


def record(
    cell: str, seed: int, round: int, seconds: float, accuracy: float, **more: object
) -> dict[str, object]:
    sums = {"energy_j": 8.0 * round, "jain": 0.5, "chosen": 4 * round, "trained": 3 * round, "late": round}
    return {
        "task": "mixture", "cell": cell, "key": f"{cell}-seed{seed}", "label": cell, "seed": seed, "round":
        round, "accuracy": accuracy, "train_loss": 1.0, "seconds": seconds, "arrived": 2 * round, "lost":
        round, **sums, **more,
    }  # fmt: skip


FAST = [record("fast", 0, n, 2.0 * n, 0.2 * n) for n in (1, 2, 3)]
FAST += [record("fast", 0, 4, 8.0, 0.8, kind="final")]
SLOW = [record("slow", 0, n, 10.0 * n, 0.1 * n) for n in (1, 2, 3)]
SLOW += [record("slow", 0, 4, 40.0, 0.4, kind="final")]


def section(page: Path) -> list[list[str]]:
    """Return the table of the fleet's section as text, row by row."""
    text = page.read_text(encoding="utf-8").split("<h2>Wireless fleet</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    return [[html.unescape(re.sub("<small>.*?</small>", "", cell)) for cell in row] for row in cells]


# --- a run ---------------------------------------------------------------------------------------------


def test_a_run_over_a_fleet_has_its_figures_in_the_report(folder: Path) -> None:
    stems = {path.stem for path in (folder / "plots").iterdir()}
    assert stems == {"loss", "uplink"} | FIGURES  # its virtual time has one figure, not two
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == len(stems)
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', text)


def test_the_numbers_in_the_table_are_those_of_the_records(folder: Path) -> None:
    head, *rows = section(folder / "report.html")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = [record for record in records if record.get("kind") == "final"]
    assert {row[0] for row in rows} == {"fedavg-full", "fedprox"}
    for row in rows:
        own = [record for record in final if record["label"] == row[0]]
        assert [record["seed"] for record in own] == [3, 4]
        said = {name: float(text.replace(",", "")) for name, text in zip(head[1:], row[1:], strict=True)}
        for name, key, digits in (
            ("virtual time", "seconds", 1), ("energy", "energy_j", 0), ("Jain index", "jain", 3),
            ("chosen", "chosen", 1), ("trained", "trained", 1), ("arrived", "arrived", 1),
            ("lost", "lost", 1), ("late", "late", 1),
        ):  # fmt: skip
            mean = sum(record[key] for record in own) / 2
            assert said[name] == pytest.approx(mean, abs=0.51 * 10**-digits)
        assert said["chosen"] == said["arrived"] + said["lost"] + said["late"] > said["trained"]
        nine = []
        for last in own:
            course = [
                r for r in records if r["key"] == last["key"] and r["accuracy"] >= 0.9 * last["accuracy"]
            ]
            nine.append(course[0].get("seconds", 0.0))
        assert said["to 90 % of its end"] == pytest.approx(sum(nine) / 2, abs=0.051)


def test_the_counts_that_are_drawn_are_those_that_arrived(folder: Path) -> None:
    run = RunFolder(folder)
    for last in (
        record for record in run.read_metrics() if record.get("kind") == "final" and "jain" in record
    ):
        state = run.load_state(last["key"])
        assert state is not None
        count = state[0][COUNT].astype(float)
        assert count.sum() == last["arrived"]
        assert count.sum() ** 2 / (40 * (count @ count)) == pytest.approx(last["jain"])


def test_devices_that_did_the_same_share_a_line(folder: Path) -> None:
    run = RunFolder(folder)
    figure = chosen_figure(run, run.read_metrics())
    assert figure is not None
    labels = [str(line.get_label()) for line in figure.axes[0].lines]
    assert re.fullmatch(r"fedavg-full, fedprox: Jain 0\.\d\d", labels[0])
    assert labels[1:] == ["uniform draw from all", "everybody as often"]


def test_without_its_state_a_run_still_has_a_report(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("state", "plots"))
    report.write_report(tmp_path / "run")
    stems = {path.stem for path in (tmp_path / "run" / "plots").iterdir()}
    assert stems == {"loss", "uplink", "time-to-accuracy", "fairness-energy"}


def test_measured_links_have_no_map(folder: Path) -> None:
    run = RunFolder(folder)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert map_figure(run, config, run.read_metrics()) is not None
    for key in ("fleet.speeds", "fleet.capacity"):
        assert map_figure(run, config | {key: "file"}, run.read_metrics()) is None


def test_a_run_without_a_fleet_has_none_of_it(tmp_path: Path) -> None:
    run = RunFolder.open(parse({"results": str(tmp_path / "run"), "task": "mixture", "job": "compare"}))
    for own in FAST:
        run.append_metrics({key: value for key, value in own.items() if key != "jain"})
    text = report.write_report(run.path).read_text(encoding="utf-8")
    assert {path.stem for path in (run.path / "plots").iterdir()} == {"loss", "seconds"}
    assert "Wireless fleet" not in text
    assert fleet_figures(run, {}, read_metrics(run.path)) == {}


# --- positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 7])
def test_the_map_finds_every_device_where_the_fleet_left_it(cells: int) -> None:
    flat: dict[str, Scalar] = {"job": "train", "fleet.profiles": "mixed", "wireless.cells": cells}
    config = parse(flat)
    fleet = Fleet(config.fleet, config.wireless, 500, 11, np.full(500, 9.0))
    began = fleet.links.positions_m() if isinstance(fleet.links, Radio) else None
    fleet.advance(100.0)
    fleet.advance(700.0)
    assert isinstance(fleet.links, Radio) and began is not None
    state = {f"fleet.world.{name}": array for name, array in fleet.state().items()}
    keys = to_flat(config) | {"fleet.behaviour": "a file that is gone"}
    places, sites, radius_m = positions_m(keys, 11, {**state, COUNT: np.zeros(500, np.int32)})
    np.testing.assert_array_equal(places, fleet.links.positions_m())
    assert 100 < (places != began).any(1).sum() <= 200  # two in five move
    assert sites.shape == (cells, 2)
    nearest = np.linalg.norm(places[:, None] - sites, axis=2).min(1)
    assert nearest.max() <= radius_m * (1 + 1e-5)


# --- who took part -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any))
def test_a_lorenz_curve_is_convex_and_under_the_diagonal(counts: list[int]) -> None:
    share = lorenz(np.array(counts))
    assert share[0] == 0.0 and share[-1] == pytest.approx(1.0)
    assert np.all(share <= np.linspace(0.0, 1.0, len(share)) + 1e-12)
    assert np.all(np.diff(share, 2) >= -1e-12)
    if len(set(counts)) == 1:
        assert share == pytest.approx(np.linspace(0.0, 1.0, len(share)))


def test_a_uniform_draw_lies_on_the_curve_that_it_is_expected_to(tmp_path: Path) -> None:
    run = RunFolder.open(parse({"results": str(tmp_path / "run")}))
    draw = np.random.default_rng(5)
    run.save_state("fast-seed0", {COUNT: draw.binomial(50, 0.06, 20_000).astype(np.int32)}, {})
    figure = chosen_figure(run, [record("fast", 0, 50, 1.0, 0.5)])
    assert figure is not None
    drawn, expected = (
        (np.array(line.get_xdata()), np.array(line.get_ydata())) for line in figure.axes[0].lines[:2]
    )
    np.testing.assert_allclose(np.interp(drawn[0], *expected), drawn[1], atol=0.6)  # percent


# --- times ---------------------------------------------------------------------------------------------


def test_the_table_tells_when_the_best_was_nearly_reached_and_who_never_did() -> None:
    fast, slow = fleet_table.fleet_rows([*SLOW, *FAST])
    assert (fast.cell, slow.cell) == ("fast", "slow")  # the soonest first
    assert (fast.means["own_s"], fast.means["best_s"]) == (8.0, 8.0)  # 0.72 is first reached by 0.8
    assert (slow.means["own_s"], slow.means["best_s"]) == (40.0, math.inf)
    best = next(column for column in fleet_table.columns_of([fast, slow]) if column.key == "best_s")
    assert [best.show(row.means["best_s"]) for row in (fast, slow)] == ["8.0", "never"]
    assert "best_s" not in [column.key for column in fleet_table.columns_of([fast])]


def test_nine_tenths_of_a_loss_in_decibels_are_decibels() -> None:
    assert fleet_table.nine_tenths(-10.0, views.CHANNELS) == -9.0
    assert math.isnan(fleet_table.nine_tenths(1.0, views.CHANNELS))
    seconds, scores = np.array([0.0, 5.0, 9.0]), np.array([0.0, -8.9, -9.1])
    assert fleet_table.reached_s(seconds, scores, -9.0, views.CHANNELS) == 9.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_goal_is_never_reached_sooner(scores: list[float], one: float, other: float) -> None:
    view, seconds = views.of_task("mixture"), np.arange(len(scores), dtype=float)
    low, high = sorted((one, other))
    sooner, later = (fleet_table.reached_s(seconds, np.array(scores), goal, view) for goal in (low, high))
    assert sooner <= later
    assert (later == math.inf) is (max(scores) < high)


def test_seeds_are_averaged_at_the_same_time_as_far_as_all_go() -> None:
    quick = [record("fast", 0, n, 2.0 * n, 0.1 * n) for n in range(5)]  # 0.05 a second, to 8 s
    late = [record("fast", 1, n, 4.0 * n, 0.1 * n) for n in range(5)]  # 0.025 a second, to 16 s
    figure = time_figure([*quick, *late])
    assert figure is not None
    (line,) = figure.axes[0].lines
    x, y = np.array(line.get_xdata()), np.array(line.get_ydata())
    assert (x[0], x[-1]) == (0.0, 8.0)
    assert y == pytest.approx(3.75 * x)  # percent
    assert figure.axes[0].get_xlabel() == "virtual time (s)"


def test_a_long_run_is_drawn_in_hours() -> None:
    figure = time_figure([record("fast", 0, n, 3600.0 * n, 0.1 * n) for n in range(5)])
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "virtual time (h)"
    assert np.array(figure.axes[0].lines[0].get_xdata()).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_nothing_is_drawn_before_the_clock_starts() -> None:
    assert time_figure([record("fast", 0, 0, 0.0, 0.1)]) is None


# --- words ---------------------------------------------------------------------------------------------


def test_progress_tells_the_virtual_time_of_a_fleet() -> None:
    scores = {"train_loss": 0.5, "accuracy": 0.75, "seconds": 1234.4}
    said = views.line("mixture", scores)
    assert said == "training loss 0.500, held-out accuracy 75.0 %"
    assert views.line("mixture", scores | {"jain": 0.3}) == f"{said}, 1,234 s"
    assert views.line("mixture", scores | {"jain": 0.3, "seconds": 5.13}) == f"{said}, 5.1 s"
    channels = {"train_loss_db": -1.0, "nmse_clean_db": -5.0, "jain": 0.3, "seconds": 200.0}
    assert views.line("", channels).endswith("-5.00 dB (clean), 200 s")


def test_policies_modes_and_allocators_are_listed() -> None:
    from fedlam_app.cli import app

    said = " ".join(CliRunner().invoke(app, ["ls"]).output.split())
    assert "policies random, best-channel" in said
    assert "modes synchronous, deadline, over-selection, asynchronous" in said
    assert "allocators equal, min-max, min-energy, resource-blocks, hungarian" in said
