"""The final numbers of a run: one row a cell, means over seeds, from the records alone.

Every learned result stands beside the strongest predictor that learns nothing from other users (or, for the
ridge, nothing but a linear map): where that wins, the table says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlam_app.config import CLASSICAL
from fedlam_app.experiments.palette import FED

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One cell: means over its seeds; NaN where nothing was measured."""

    cell: str
    label: str
    classical: bool
    seeds: int
    nmse_clean_db: float
    spread_db: float  # highest minus lowest over the seeds
    nmse_noisy_db: float
    nmse_per_user_db: float
    train_loss_db: float
    spectral_efficiency_bps_hz: float
    trainable_share: float
    bytes_up: float
    bytes_down: float
    wall_s: float
    cpu_s: float
    peak_rss_bytes: float


_MEANS = (
    "nmse_noisy_db",
    "nmse_per_user_db",
    "train_loss_db",
    "spectral_efficiency_bps_hz",
    "trainable_share",
    "bytes_up",
    "bytes_down",
    "wall_s",
    "cpu_s",
    "peak_rss_bytes",
)


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Return the cells that have a final record, best clean NMSE first."""
    final = [record for record in records if record.get("kind") == "final"]
    rows = []
    for cell in dict.fromkeys(record["cell"] for record in final):
        own = [record for record in final if record["cell"] == cell]
        errors = [number(record.get("nmse_clean_db")) for record in own]
        means = {key: float(np.mean([number(record.get(key)) for record in own])) for key in _MEANS}
        rows.append(
            Row(
                cell=cell,
                label=own[0].get("label") or cell,
                classical=cell in CLASSICAL,
                seeds=len(own),
                nmse_clean_db=float(np.mean(errors)),
                spread_db=max(errors) - min(errors),
                **means,
            )
        )
    return sorted(rows, key=lambda row: (math.isnan(row.nmse_clean_db), row.nmse_clean_db))


def strongest_classical(rows: Sequence[Row]) -> Row | None:
    """Return the best of the predictors that are not neural, or ``None`` where none was run."""
    return min((row for row in rows if row.classical), key=lambda row: row.nmse_clean_db, default=None)


def headlines(rows: Sequence[Row]) -> list[str]:
    """Return what the run says in a few sentences, losses included."""
    by_cell = {row.cell: row for row in rows}
    federated = sorted((row for row in rows if FED.match(row.cell)), key=lambda row: _servers(row.cell))
    lead = federated[-1] if federated else min((r for r in rows if not r.classical), key=_error, default=None)
    said = []
    if lead is not None:
        said.append(
            f"{lead.label}: held-out NMSE {decibel(lead.nmse_clean_db)} dB against the clean channel."
        )
        for cell in ("central", "llm4cp-local", "gru-local", "rnn-local"):
            if cell in by_cell and by_cell[cell] is not lead:
                said.append(_against(lead, by_cell[cell]))
    if len(federated) > 1:
        steps = ", ".join(f"{_servers(row.cell)}: {decibel(row.nmse_clean_db)}" for row in federated)
        said.append(f"By number of edge servers (dB): {steps}.")
    classical = strongest_classical(rows)
    if lead is not None and classical is not None:
        said.append(_against(lead, classical) + " That is the strongest classical predictor of this run.")
    return said


def final_table(records: Sequence[Record]) -> Table:
    """Return the final results for a terminal: the strongest classical row is marked, and who loses to it."""
    from rich.table import Table

    rows = rows_of(records)
    classical = strongest_classical(rows)
    seeds = max((row.seeds for row in rows), default=1)
    table = Table(
        title=f"Held-out users{f', mean over {seeds} seeds' if seeds > 1 else ''}", title_justify="left"
    )
    table.add_column("")
    columns = (
        "NMSE clean dB",
        "noisy dB",
        "per user dB",
        "loss dB",
        "SE bit/s/Hz",
        "trains %",
        "up MB",
        "CPU s",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        best = classical is not None and row is classical
        table.add_row(
            row.label + (" [dim](strongest classical)[/]" if best else ""),
            *cells_of_row(row),
            style="cyan" if best else None if not loses(row, classical) else "dim",
        )
    notes = ["± half the range over seeds"] if seeds > 1 else []
    if classical is not None and any(loses(row, classical) for row in rows):
        notes.append(f"dim: learned, and behind {classical.label}")
    table.caption = "; ".join(notes)
    return table


def cells_of_row(row: Row) -> list[str]:
    """Return a row's figures as text, in the order of the table's columns."""
    spread = f" ±{row.spread_db / 2:.2f}" if row.seeds > 1 else ""
    return [
        decibel(row.nmse_clean_db) + spread,
        decibel(row.nmse_noisy_db),
        decibel(row.nmse_per_user_db),
        decibel(row.train_loss_db),
        _plain(row.spectral_efficiency_bps_hz, ".2f"),
        _plain(100 * row.trainable_share, ".1f"),
        _plain(row.bytes_up / 1e6, ".1f") if row.bytes_up else "",
        _plain(row.cpu_s, ".0f") if row.cpu_s >= 1 else _plain(row.cpu_s, ".1f"),
    ]


def loses(row: Row, classical: Row | None) -> bool:
    """Whether a learned row is behind the strongest classical one."""
    return classical is not None and not row.classical and row.nmse_clean_db > classical.nmse_clean_db


def number(value: object) -> float:
    """Return a JSON number as float; null and what is absent are NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


def decibel(value: float) -> str:
    """Render decibels with two places and a true minus."""
    return _plain(value, ".2f").replace("-", "−")


def _against(lead: Row, other: Row) -> str:
    gain = other.nmse_clean_db - lead.nmse_clean_db
    return f"{'Better' if gain >= 0 else 'Worse'} than {other.label} by {abs(gain):.2f} dB."


def _plain(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def _error(row: Row) -> float:
    return row.nmse_clean_db


def _servers(cell: str) -> int:
    found = FED.match(cell)
    return int(found[1]) if found else 0
