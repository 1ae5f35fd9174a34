"""The report and its figures: honest about who wins, whole in one file, from the records alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks.record import Figure, read_results, write_result
from fedlam_app.config import parse
from fedlam_app.experiments import palette, plots, report, summary
from fedlam_app.experiments.track import RunFolder


def final(cell: str, seed: int, nmse_db: float, round: int = 4) -> dict[str, object]:
    return {
        "cell": cell, "key": f"{cell}-seed{seed}", "label": cell.upper(), "seed": seed, "round": round,
        "kind": "final", "nmse_clean_db": nmse_db, "train_loss_db": nmse_db + 1,
        "nmse_by_speed_db": {"10": nmse_db - 1, "50": nmse_db + 1},
        "nmse_by_horizon_db": [nmse_db, nmse_db + 2],
    }  # fmt: skip


RECORDS = [
    *[final("fed-1", seed, -8.0 + seed) for seed in (0, 1)],
    *[final("fed-10", seed, -12.0 + seed) for seed in (0, 1)],
    *[final("gru-local", seed, -6.0) for seed in (0, 1)],
    *[final("ar", seed, -10.0, round=0) for seed in (0, 1)],
    *[final("wiener-ar", seed, -13.0, round=0) for seed in (0, 1)],
    *[
        {**final(cell, seed, -float(round)), "kind": "round", "round": round}
        for cell in ("fed-1", "fed-10", "gru-local")
        for seed in (0, 1)
        for round in range(4)
    ],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunFolder.open(parse({"results": str(tmp_path / "run"), "train.lr": 0.125}))
    for record in RECORDS:
        run.append_metrics(record)
    return run.path


def test_rows_are_means_over_seeds_best_first() -> None:
    rows = summary.rows_of(RECORDS)
    assert [row.cell for row in rows] == ["wiener-ar", "fed-10", "ar", "fed-1", "gru-local"]
    assert (rows[1].nmse_clean_db, rows[1].spread_db, rows[1].seeds) == (-11.5, 1.0, 2)
    assert math.isnan(rows[1].cpu_s)


def test_the_strongest_classical_predictor_is_named_and_who_loses_to_it() -> None:
    rows = summary.rows_of(RECORDS)
    best = summary.strongest_classical(rows)
    assert best is not None
    assert best.cell == "wiener-ar"
    assert {row.cell for row in rows if summary.loses(row, best)} == {"fed-10", "fed-1", "gru-local"}
    said = summary.headlines(rows)
    assert "Worse than WIENER-AR by 1.50 dB." in said[-1]
    assert "Better than GRU-LOCAL by 5.50 dB." in said


def test_a_winner_is_said_to_win() -> None:
    rows = summary.rows_of([record for record in RECORDS if record["cell"] != "wiener-ar"])
    best = summary.strongest_classical(rows)
    assert best is not None
    assert not summary.loses(next(row for row in rows if row.cell == "fed-10"), best)
    assert "Better than AR by 1.50 dB." in summary.headlines(rows)[-1]


def test_the_report_needs_nothing_beside_it(folder: Path) -> None:
    text = report.write_report(folder).read_text(encoding="utf-8")
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == [
        "horizon",
        "loss",
        "servers",
        "speed",
    ]
    assert text.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', text)
    assert '<tr class="changed"><th>train.lr</th><td>0.125</td>' in text


def test_labels_cannot_break_the_page(folder: Path) -> None:
    run = RunFolder(folder)
    run.append_metrics({**final("cnn-local", 0, -1.0), "label": "<script>alert(1)</script>"})
    assert "<script" not in report.write_report(folder).read_text(encoding="utf-8")


def test_a_run_on_its_way_has_a_report_too(tmp_path: Path) -> None:
    run = RunFolder.open(parse({"results": str(tmp_path / "run")}))
    with pytest.raises(ValueError, match="holds no measurement yet"):
        report.write_report(run.path)
    run.append_metrics({"cell": "fed-1", "label": "x", "seed": 0, "round": 0, "nmse_clean_db": 0.0})
    assert "No cell has finished yet" in report.write_report(run.path).read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        report.read_run(tmp_path)


def test_every_cell_has_a_colour_of_its_own() -> None:
    among = [
        "fed-1",
        "fed-2",
        "fed-5",
        "fed-10",
        "central",
        "llm4cp-local",
        "gru-local",
        "rnn-local",
        "ar",
        "ridge",
    ]
    assert len({palette.colour_of(cell, among) for cell in among}) == len(among)


def test_a_final_record_replaces_the_sketch_of_its_round() -> None:
    sketch = {**final("fed-1", 0, -3.0), "kind": "round"}
    x, mean, _, _ = plots._curve([sketch, final("fed-1", 0, -5.0)], "fed-1", "nmse_clean_db")
    assert (x.tolist(), mean.tolist()) == ([4], [-5.0])


@pytest.mark.parametrize(
    ("value", "bound", "holds"),
    [
        (1.0, "<= 1", True),
        (1.1, "<= 1", False),
        (2.0, "> 2", False),
        (3.0, "", True),
        (math.nan, ">= 0", False),
    ],
)
def test_a_figure_holds_where_its_bound_does(value: float, bound: str, holds: bool) -> None:
    assert Figure("foundation", "x", value, "dB", bound).holds is holds


def test_a_bound_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of <=, >=, <, >, ==, a space and a number"):
        Figure("foundation", "x", 1.0, "dB", "about 3")


def test_figures_come_back_from_their_file(tmp_path: Path) -> None:
    figures = [
        Figure("foundation", "gap", 0.3, "dB", "<= 0.5"),
        Figure("foundation", "lost", math.nan, "s", "< 1"),
    ]
    write_result("one", figures, seed=3, folder=tmp_path)
    found = [figure for name, figure in read_results(tmp_path) if name == "one"]
    assert found[0] == figures[0]
    assert math.isnan(found[1].value)
    assert not found[1].holds
