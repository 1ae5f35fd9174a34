"""The final numbers of a run: one row a cell, means over seeds, from the records alone.

Every learned result stands beside the strongest classical one (predictors that learn nothing from other users
but a linear map; for texts the majority class and a linear probe): where that wins, the table says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlam_app.experiments import views
from fedlam_app.experiments.lookup import federated, final_records, mean_of
from fedlam_app.experiments.palette import FED
from fedlam_app.experiments.sweep_table import is_sweep, sweep_table
from fedlam_app.experiments.views import Column, Record, View, number

if TYPE_CHECKING:
    from rich.table import Table

_RIVALS = ("central", "local", "llm4cp-local", "gru-local", "rnn-local")


@dataclass(frozen=True)
class Row:
    """One cell: means over its seeds; NaN where nothing was measured."""

    view: View
    cell: str
    label: str
    seeds: int
    means: Mapping[str, float]  # by the keys of the view's columns
    spread: float  # of the metric: highest minus lowest over the seeds

    @property
    def classical(self) -> bool:
        """Whether it stands for what needs no training by gradients."""
        return self.cell in self.view.classical

    @property
    def score(self) -> float:
        """The metric."""
        return self.means[self.view.metric]

    @property
    def error(self) -> float:
        """The metric as something to make small."""
        return self.view.error(self.score)


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Return the cells that have a final record, best metric first."""
    final, view = final_records(records), views.of_records(records)
    rows = []
    for cell in dict.fromkeys(str(record["cell"]) for record in final):
        own = [record for record in final if record["cell"] == cell]
        scores = [number(record.get(view.metric)) for record in own]
        rows.append(
            Row(
                view=view,
                cell=cell,
                label=own[0].get("label") or cell,
                seeds=len(own),
                means={column.key: mean_of(own, cell, column.key) for column in view.columns},
                spread=math.nan if any(map(math.isnan, scores)) else max(scores) - min(scores),
            )
        )
    return sorted(rows, key=lambda row: row.error)


def strongest_classical(rows: Sequence[Row]) -> Row | None:
    """Return the best of the rows that are classical, or ``None`` where none was run."""
    measured = (row for row in rows if row.classical and math.isfinite(row.error))
    return min(measured, key=lambda row: row.error, default=None)


def loses(row: Row, classical: Row | None) -> bool:
    """Whether a learned row is behind the strongest classical one."""
    measured = not math.isnan(row.score)
    return classical is not None and not row.classical and measured and row.error > classical.error


def headlines(rows: Sequence[Row]) -> list[str]:
    """Return what the run says in a few sentences, losses included."""
    rows = [row for row in rows if math.isfinite(row.error)]
    by_cell = {row.cell: row for row in rows}
    study = sorted((row for row in rows if FED.match(row.cell)), key=lambda row: _servers(row.cell))
    together = [row for row in rows if federated(row.cell, row.view)]
    learned = [row for row in rows if not row.classical]
    # Of the case study's federations the largest leads; of strategies the best.
    lead = study[-1] if study else min(together or learned, key=lambda row: row.error, default=None)
    said = []
    if lead is not None:
        said.append(f"{lead.label}: {lead.view.result(lead.score)}.")
        rivals = [by_cell[cell] for cell in _RIVALS if cell in by_cell]
        said += [_against(lead, rival) for rival in rivals if rival is not lead]
    if len(study) > 1:
        steps = ", ".join(f"{_servers(row.cell)}: {views.decibel(row.score)}" for row in study)
        said.append(f"By number of edge servers (dB): {steps}.")
    said += _uplinks([row for row in together if row not in study])
    classical = strongest_classical(rows)
    if lead is not None and classical is not None:
        what = f"That is the strongest classical {lead.view.learner} of this run."
        said.append(f"{_against(lead, classical)} {what}")
    return said


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of a table of these rows: optional ones only where a row has something to show."""
    return [
        column
        for column in (rows[0].view.columns if rows else ())
        if not column.optional or any(column.show(row.means[column.key]) for row in rows)
    ]


def cells_of_row(row: Row, columns: Sequence[Column]) -> list[str]:
    """Return a row's figures as text, in the order of the table's columns."""
    texts = [column.show(row.means[column.key]) for column in columns]
    spread = columns[0].show(row.spread / 2) if row.seeds > 1 else ""
    return [f"{texts[0]} ±{spread}" if spread else texts[0], *texts[1:]]


def final_table(records: Sequence[Record]) -> Table:
    """Return the final results for a terminal: the strongest classical row is marked, and who loses to it.

    A sweep has a table of its own, by its axes.
    """
    from rich.table import Table

    if is_sweep(records):
        return sweep_table(records)
    rows = rows_of(records)
    classical, columns = strongest_classical(rows), columns_of(rows)
    seeds = max((row.seeds for row in rows), default=1)
    title = f"{views.of_records(records).held_out}{f', mean over {seeds} seeds' if seeds > 1 else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column.head, justify="right")
    for row in rows:
        best = classical is not None and row is classical
        table.add_row(
            row.label + (" [dim](strongest classical)[/]" if best else ""),
            *cells_of_row(row, columns),
            style="cyan" if best else None if not loses(row, classical) else "dim",
        )
    notes = ["± half the range over seeds"] if seeds > 1 else []
    if classical is not None and any(loses(row, classical) for row in rows):
        notes.append(f"dim: learned, and behind {classical.label}")
    table.caption = "; ".join(notes)
    return table


def _against(lead: Row, other: Row) -> str:
    gain = other.error - lead.error
    if gain == 0:
        return f"Level with {other.label}."
    return f"{'Better' if gain > 0 else 'Worse'} than {other.label} by {lead.view.gap(abs(gain))}."


def _uplinks(rows: Sequence[Row]) -> list[str]:
    """Compare what the devices of each strategy sent up, where strategies differ in it."""
    sent = sorted((row for row in rows if row.means["bytes_up"] > 0), key=lambda row: row.means["bytes_up"])
    if not sent:
        return []
    least = sent[0]
    times = [(row.label, row.means["bytes_up"] / least.means["bytes_up"]) for row in sent[1:]]
    if not times or times[-1][1] < 1.05:
        return []
    ratios = ", ".join(f"{label} {ratio:,.{1 if ratio < 10 else 0}f}" for label, ratio in times)
    megabytes = f"{least.means['bytes_up'] / 1e6:.3g} MB"
    return [f"Uplink: {least.label} sends least, {megabytes}; as multiples of that: {ratios}."]


def _servers(cell: str) -> int:
    found = FED.match(cell)
    return int(found[1]) if found else 0
