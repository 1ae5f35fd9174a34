"""Looking things up in a run's records: final ones, the cells in order, their labels, who is federated.

A cell is named by what it is: 'fed-10' (the case study's federation of ten), a strategy of the job
``compare``, 'gru-local', 'central', or a classical predictor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlam_app.experiments.palette import FED
from fedlam_app.experiments.views import Record, View, number

_NOT_FEDERATED = ("central", "central-small", "local")


def final_records(records: Sequence[Record]) -> list[Record]:
    """Return the final record of every cell and seed."""
    return [record for record in records if record.get("kind") == "final"]


def cells(records: Sequence[Record]) -> list[str]:
    """Return the cells in the order of a legend: federated by servers, then the others as they came."""
    found = list(dict.fromkeys(str(record["cell"]) for record in records))
    return sorted(
        found, key=lambda cell: (0, int(m[1])) if (m := FED.match(cell)) else (1, found.index(cell))
    )


def label_of(records: Sequence[Record], cell: str) -> str:
    """Return the label that the run gave to a cell."""
    return next(
        (str(record["label"]) for record in records if record["cell"] == cell and record.get("label")), cell
    )


def federated(cell: str, view: View) -> bool:
    """Whether a cell's devices learn together without showing their data: neither pooled nor alone."""
    return cell not in (*_NOT_FEDERATED, *view.classical) and not cell.endswith("-local")


def mean_of(records: Sequence[Record], cell: str, key: str) -> float:
    """Return a cell's mean over its records of one quantity; NaN where one of them lacks it."""
    return float(np.mean([number(record.get(key)) for record in records if record["cell"] == cell]))
