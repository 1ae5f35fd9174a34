"""A sweep in numbers: one row a point of its axes, means and standard deviations over seeds.

A record of a sweep has ``axes``: its point as text, without the seed ({"privacy.target-epsilon": "3",
"strategy": "fedit"}). Rows stand in the order of the axes, numbers ascending and infinity last. What a
device has spent at most (``epsilon``) is null in a record where there is no end to it (JSON has no infinity).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlam_app.base.axes import EPSILON, words
from fedlam_app.experiments import views
from fedlam_app.experiments.lookup import final_records
from fedlam_app.experiments.views import Column, Record, View, number

if TYPE_CHECKING:
    from rich.table import Table

_NARROW = ("epsilon", "attack_auc")  # of all columns, those for a terminal
SPREAD = ("attack_auc",)  # columns that have a standard deviation, beside the metric


@dataclass(frozen=True)
class SweepRow:
    """One point: what was measured at the end, over its seeds; NaN where nothing was."""

    view: View
    point: Mapping[str, str]
    label: str
    seeds: int
    means: Mapping[str, float]  # by the keys of the view's columns
    sds: Mapping[str, float]  # sample standard deviation; NaN with one seed

    @property
    def score(self) -> float:
        """The metric."""
        return self.means[self.view.metric]

    @property
    def line(self) -> dict[str, str]:
        """The point without its epsilon: what stays as the budget changes."""
        return {key: value for key, value in self.point.items() if key != EPSILON}


def is_sweep(records: Sequence[Record]) -> bool:
    """Whether the records are a sweep's."""
    return any(record.get("axes") for record in records)


def axes_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return every axis, epsilon first, and its values: numbers ascending, words as they came."""
    found: dict[str, list[str]] = {}
    for record in records:
        for key, value in (record.get("axes") or {}).items():
            values = found.setdefault(key, [])
            values += [value] if value not in values else []
    return {key: sorted(found[key], key=_rank) for key in sorted(found, key=lambda key: key != EPSILON)}


def sweep_rows(records: Sequence[Record]) -> list[SweepRow]:
    """Return a row for each point that has a final record, in the order of the axes."""
    view, axes = views.of_records(records), axes_of(records)
    cells: dict[str, list[Record]] = {}
    for record in final_records(records):
        if record.get("axes"):
            cells.setdefault(str(record["cell"]), []).append(record)
    rows = []
    for own in cells.values():
        point: Mapping[str, str] = own[0]["axes"]
        keys = [column.key for column in view.columns]
        values = {key: np.array([_figure(record, key) for record in own]) for key in keys}
        rows.append(
            SweepRow(
                view=view,
                point=point,
                label=words(point),
                seeds=len(own),
                means={key: float(found.mean()) for key, found in values.items()}
                | {"epsilon": float(values["epsilon"].max())},
                sds={key: _deviation(found) for key, found in values.items()},
            )
        )
    # A point without an axis (no privacy has no budget) stands before those that have it.
    return sorted(
        rows,
        key=lambda row: [axes[key].index(row.point[key]) if key in row.point else -1 for key in axes],
    )


def columns_of(rows: Sequence[SweepRow]) -> list[Column]:
    """Return the columns with something to show."""
    columns = rows[0].view.columns if rows else ()
    return [c for c in columns if not c.optional or any(shown(row, c) for row in rows)]


def shown(row: SweepRow, column: Column) -> str:
    """Return one figure as text, with its standard deviation where it has one."""
    mean, sd = row.means[column.key], row.sds[column.key]
    if column.key == "epsilon" and mean == math.inf:
        return "∞"
    text = column.show(mean)
    spread = column.key in (row.view.metric, *SPREAD)
    return f"{text} ± {column.show(sd)}" if text and spread and math.isfinite(sd) else text


def sweep_table(records: Sequence[Record]) -> Table:
    """Return the sweep for a terminal: what decides, and the rest in the report."""
    from rich.table import Table

    rows = sweep_rows(records)
    narrow = (views.of_records(records).metric, *_NARROW)
    columns, heads = [c for c in columns_of(rows) if c.key in narrow], list(axes_of(records))
    table = Table(title=views.of_records(records).held_out + note(rows), title_justify="left")
    for head in heads:
        table.add_column(_head(head), overflow="fold")
    for column in columns:
        table.add_column(column.head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(value(row, head) for head in heads), *(shown(row, column) for column in columns))
    return table


def sweep_html(records: Sequence[Record]) -> str:
    """Return the sweep as a table of the report."""
    rows = sweep_rows(records)
    if not rows:
        return "<p>None yet.</p>"
    columns, heads = columns_of(rows), list(axes_of(records))
    head = "".join(f"<th>{html.escape(_head(key))}</th>" for key in heads)
    head += "".join(f"<th>{column.name}<small>{column.unit}</small></th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<th>{html.escape(value(row, key))}</th>" for key in heads)
        + "".join(f"<td>{html.escape(shown(row, column))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    said = [f"One row a point{note(rows)}."]
    if any(column.key == "attack_auc" for column in columns):
        said.append("Attack: membership by a threshold on the final model's loss; AUC 0.5 is guessing.")
    if any(column.key == "epsilon" for column in columns):
        said.append("Spent ε: the largest of a device and seed, Rényi accountant.")
    table = f"<table class='results'><tr>{head}</tr>{body}</table>"
    return f"<div class='wide'>{table}</div><p class='note'>{' '.join(said)}</p>"


def sentences(records: Sequence[Record]) -> list[str]:
    """Return what the sweep says: its best point, what each budget costs, and what an attack finds."""
    view = views.of_records(records)
    rows = [row for row in sweep_rows(records) if math.isfinite(row.score)]
    if not rows:
        return []
    best = min(rows, key=lambda row: view.error(row.score))
    said = [f"Best: {best.label}, {view.result(best.score)}."]
    for line in {words(row.line): row.line for row in rows}.values():
        own = [row for row in rows if EPSILON in row.point and row.line == line]
        if len(own) > 1:
            least, most = own[0], own[-1]
            gap = view.error(least.score) - view.error(most.score)
            tight, loose = (words({EPSILON: row.point[EPSILON]}) for row in (least, most))
            name = f"{words(line)}: " if line else ""
            verb = "costs" if gap >= 0 else "gains"
            spread = max(row.sds[view.metric] for row in (least, most))  # NaN with one seed
            noise = ", less than seeds differ by" if abs(gap) < spread else ""
            said.append(f"{name}{tight} {verb} {view.gap(abs(gap))} against {loose}{noise}.")
    found = [row.means["attack_auc"] for row in rows if math.isfinite(row.means.get("attack_auc", math.nan))]
    if found:
        said.append(
            f"Membership by loss: AUC {min(found):.3f} to {max(found):.3f} over all points; 0.5 is guessing,"
            f" and models that never trained are at {untrained(records):.3f}."
        )
    return said


def untrained(records: Sequence[Record]) -> float:
    """Return the attack's mean AUC before training: what unlike members and non-members alone do."""
    found = [number(r.get("attack_auc")) for r in records if r["round"] == 0 and r.get("kind") != "final"]
    return float(np.mean(found)) if found else math.nan


def value(row: SweepRow, key: str) -> str:
    """Return a point's value as people write it."""
    text = row.point.get(key, "").replace("|", ",")
    return "∞" if (key, text) == (EPSILON, "inf") else text


def note(rows: Sequence[SweepRow]) -> str:
    """Return what a figure is a mean over."""
    least, most = (f([row.seeds for row in rows], default=0) for f in (min, max))
    if most < 2:
        return ""
    return f", mean ± standard deviation over {most if least == most else f'{least} to {most}'} seeds"


def _head(key: str) -> str:
    return "target ε" if key == EPSILON else key.rpartition(".")[2]


def _figure(record: Record, key: str) -> float:
    """Return a figure of a record; a spent epsilon that is null has no end."""
    return math.inf if key == "epsilon" and record.get(key, 0) is None else number(record.get(key))


def _deviation(values: np.ndarray) -> float:
    finite = len(values) > 1 and bool(np.isfinite(values).all())
    return float(values.std(ddof=1)) if finite else math.nan


def _rank(value: str) -> tuple[int, float]:
    try:
        return 0, float(value)
    except ValueError:
        return 1, 0.0
