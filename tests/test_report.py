"""The report and its figures: honest about who wins, whole in one file, from the records alone; any task."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest

from benchmarks.record import Figure, read_results, write_result
from fedlam_app.config import parse
from fedlam_app.experiments import palette, plots, report, summary, views
from fedlam_app.experiments.cells import Cell, cells_of
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
    assert (rows[1].score, rows[1].spread, rows[1].seeds) == (-11.5, 1.0, 2)
    assert math.isnan(rows[1].means["cpu_s"])


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
    stems = {path.stem for path in (folder / "plots").iterdir()}
    assert stems == {"horizon", "loss", "servers", "speed"}
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
    learned = ["fed-1", "fed-2", "fed-5", "fed-10", "central", "llm4cp-local", "gru-local", "rnn-local"]
    among = [*learned, "ar", "ridge"]
    assert len({palette.colour_of(cell, among) for cell in among}) == len(among)


def test_a_final_record_replaces_the_sketch_of_its_round() -> None:
    sketch = {**final("fed-1", 0, -3.0), "kind": "round"}
    x, mean, _, _ = plots._curve([sketch, final("fed-1", 0, -5.0)], "fed-1", "nmse_clean_db")
    assert (x.tolist(), mean.tolist()) == ([4], [-5.0])


def text_final(cell: str, seed: int, accuracy: float, up_mb: float, **more: object) -> dict[str, object]:
    return {
        "task": "text-classification", "cell": cell, "key": f"{cell}-seed{seed}", "label": cell, "seed": seed,
        "round": 4, "kind": "final", "accuracy": accuracy, "loss": 1 - accuracy, "train_loss": 0.5,
        "bytes_up": up_mb * 1e6, "bytes_down": 2e6, "trainable_share": 0.01, "cpu_s": 5.0, **more,
    }  # fmt: skip


def text_round(cell: str, seed: int, round: int, up_mb: float) -> dict[str, object]:
    sketch = text_final(cell, seed, 0.5 + round / 20 + seed / 50, up_mb * round / 4)
    return {**sketch, "kind": "round", "round": round}


def baseline(cell: str, seed: int, accuracy: float) -> dict[str, object]:
    kept = ("task", "cell", "key", "label", "seed", "kind", "accuracy")
    return {key: text_final(cell, seed, accuracy, 0)[key] for key in kept} | {"round": 0, "loss": None}


TEXT = [
    *[text_round(c, s, r, mb) for c, mb in (("fedit", 40), ("fed-sb", 2)) for s in (0, 1) for r in range(4)],
    *[text_final("fedit", seed, 0.80 + seed / 50, 40, seconds=30.0) for seed in (0, 1)],
    *[text_final("fed-sb", seed, 0.74, 2, seconds=10.0) for seed in (0, 1)],
    *[text_final("central", seed, 0.86, 0) for seed in (0, 1)],
    *[text_final("local", seed, 0.70, 0, accuracy_each=[0.6, 0.8]) for seed in (0, 1)],
    *[baseline("linear-probe", seed, 0.76) for seed in (0, 1)],
    *[baseline("majority", seed, 0.50) for seed in (0, 1)],
]


def text_table(records: list[dict[str, object]]) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=160).print(summary.final_table(records))
    return text.getvalue()


def test_accuracy_is_better_when_it_is_higher() -> None:
    rows = summary.rows_of(TEXT)
    assert [row.cell for row in rows] == ["central", "fedit", "linear-probe", "fed-sb", "local", "majority"]
    best = summary.strongest_classical(rows)
    assert best is not None and best.cell == "linear-probe"
    assert {row.cell for row in rows if summary.loses(row, best)} == {"fed-sb", "local"}
    assert rows[1].score == pytest.approx(0.81)
    assert rows[1].spread == pytest.approx(0.02)


def test_a_comparison_says_what_federation_gains_and_costs() -> None:
    said = summary.headlines(summary.rows_of(TEXT))
    assert said == [
        "fedit: held-out accuracy 81.0 %.",
        "Worse than central by 5.0 points.",
        "Better than local by 11.0 points.",
        "Uplink: fed-sb sends least, 2 MB; as multiples of that: fedit 20.",
        "Better than linear-probe by 5.0 points. That is the strongest classical model of this run.",
    ]


def test_ties_are_said_to_be_ties() -> None:
    records = [text_final("fedit", 0, 0.8, 10.0), text_final("flora", 0, 0.7, 10.1)]
    rows = summary.rows_of([*records, text_final("central", 0, 0.8, 0)])  # the uplinks are a tie as well
    assert summary.headlines(rows) == ["fedit: held-out accuracy 80.0 %.", "Level with central."]
    tied = summary.rows_of([records[0], baseline("linear-probe", 0, 0.8)])
    assert "No learned model is behind linear-probe." in report._results(tied)


def test_the_text_table_has_percent_and_blanks_for_what_was_not_measured() -> None:
    lines = text_table(TEXT).splitlines()
    assert "Held-out texts, mean over 2 seeds" in lines[0]
    assert re.findall(r"[\w%]+(?: [\w%]+)*", lines[2]) == [
        "accuracy %", "loss", "trains %", "up MB", "down MB", "virtual s", "CPU s device",
    ]  # fmt: skip
    row = {line.split()[1]: [part.strip() for part in line.split("│")[2:-1]] for line in lines if "│" in line}
    assert row["fedit"] == ["81.0 ±1.0", "0.190", "1.00", "40.0", "2.0", "30.0", "5"]
    assert row["linear-probe"] == ["76.0 ±0.0", "", "", "", "", "", ""]
    assert row["central"][3] == row["central"][5] == ""
    assert "behind linear-probe" in lines[-1]


def test_a_value_that_one_seed_lacks_is_no_mean() -> None:
    records = [text_final("fedit", 0, 0.8, 1.0, perplexity=9.0), text_final("fedit", 1, 0.6, 1.0)]
    (row,) = summary.rows_of(records)
    assert math.isnan(row.means["perplexity"])
    unmeasured = {**text_final("flora", 0, 0.8, 1.0), "accuracy": None}
    rows = summary.rows_of([*records, unmeasured, baseline("majority", 0, 0.9)])
    assert [row.cell for row in rows] == ["majority", "fedit", "flora"]
    assert not summary.loses(rows[-1], rows[0])
    assert summary.cells_of_row(rows[-1], summary.columns_of(rows))[0] == ""


def test_language_models_have_a_perplexity() -> None:
    table = text_table([text_final("fedit", 0, 0.3, 1.0, perplexity=12.34, task="language-modelling")])
    assert "perplexity" in table and "12.3" in table


def test_the_text_report_is_whole_and_marks_who_loses(tmp_path: Path) -> None:
    keys = {"job": "compare", "task": "text-classification", "compare.seeds": "0,1"}
    run = RunFolder.open(parse({"results": str(tmp_path / "run"), **keys}))
    for record in TEXT:
        run.append_metrics(record)
    text = report.write_report(run.path).read_text(encoding="utf-8")
    assert {path.stem for path in (run.path / "plots").iterdir()} == {"loss", "uplink", "seconds"}
    assert text.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', text)
    assert re.findall(r'class="behind"><th>([\w-]+)', text) == ["fed-sb", "local"]
    assert re.findall(r'class="classical"><th>([\w-]+)', text) == ["linear-probe"]
    assert "<h1>Text classification: strategies compared</h1>" in text
    assert "texts: rotten-tomatoes" in text and "seeds: 0,1" in text
    assert "NMSE" not in text.split("<h2>Configuration")[0]


def test_the_uplink_figure_has_a_line_a_federated_strategy_and_levels_for_the_rest() -> None:
    figure = plots.cost_figure(TEXT, "uplink")
    assert figure is not None
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert axes.get_xscale() == "log"
    assert set(lines) == {"fedit", "fed-sb", "central", "local", "linear-probe", "majority"}
    assert list(lines["fedit"].get_xdata()) == pytest.approx([10, 20, 30, 40])  # round 0 has sent nothing
    assert list(lines["fedit"].get_ydata())[-1] == pytest.approx(81)
    assert list(lines["central"].get_ydata()) == pytest.approx([86, 86])


def test_without_a_clock_there_is_no_figure_of_it() -> None:
    assert plots.cost_figure([{**record, "seconds": 0.0} for record in TEXT], "seconds") is None


def test_progress_is_told_in_the_words_of_the_task() -> None:
    channels = {"train_loss_db": -1.234, "nmse_clean_db": -5.678}
    assert views.line("", channels) == "global loss -1.23 dB, held-out NMSE -5.68 dB (clean)"
    assert views.line("channel-prediction", channels) == views.line("", channels)
    text = views.line("text-classification", {"train_loss": 0.69314, "accuracy": 0.8125})
    assert text == "training loss 0.693, held-out accuracy 81.2 %"
    assert views.line("language-modelling", {"accuracy": 0.5}) == "held-out accuracy 50.0 %"
    assert views.mean_keys("channel-prediction") == ("train_loss_db", "nmse_clean_db")
    assert views.mean_keys("text-classification") == ("accuracy",)
    with pytest.raises(ValueError, match="unknown task 'text'; allowed are"):
        views.line("text", {})


def test_a_comparison_runs_every_strategy_for_every_seed() -> None:
    keys = {"compare.strategies": "fedit,linear-probe,central,ar", "compare.seeds": "3,4"}
    cells = cells_of(parse({"job": "compare", **keys}))
    names = ("fedit", "linear-probe", "central", "ar")
    assert [cell.key for cell in cells] == [f"{name}-seed{seed}" for seed in (3, 4) for name in names]
    assert cells[4] == Cell("fedit", "fedit", 4, {"seed": 4, "strategy": "fedit"})
    assert [cell.classical for cell in cells[4:]] == ["", "linear-probe", "", "ar"]
    assert cells[5].overrides == {"seed": 4}
    assert parse({"job": "train", **cells[4].overrides}).strategy == "fedit"


def test_many_strategies_are_told_apart() -> None:
    among = [*(f"strategy-{number}" for number in range(20)), "central", "local", "linear-probe", "majority"]
    looks = {(line["color"], str(line["linestyle"])) for line in (palette.line(c, among) for c in among)}
    assert len(looks) == len(among)


@pytest.mark.parametrize(
    ("value", "bound", "holds"),
    [(1, "<= 1", True), (1.1, "<= 1", False), (2, "> 2", False), (3, "", True), (math.nan, ">= 0", False)],
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
