"""What a wireless fleet cost and whom it served, in numbers: one row a cell, means over seeds.

    time to 90 %    the first virtual second at which an evaluation found at least 0.9 x the goal;
                    the goal is the cell's own last metric, or the best of all cells of the run

A record of a fleet has ``seconds`` (virtual), the sums so far of ``chosen, trained, arrived, lost, late,
polled, poll_bytes, energy_j``, and ``jain``, Jain's index of how often each device took part. Round 0 has
none of them: it is scored before the clock starts. Of NMSE in dB nine tenths are 0.9 x its decibels, which
means something below 0 dB alone (0 dB is a prediction of nothing). Times are seen at evaluations only:
``train.evaluate-every`` bounds how fine they are. Units: s, J, bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlam_app.experiments import views
from fedlam_app.experiments.lookup import cells, final_records, label_of, mean_of
from fedlam_app.experiments.views import Column, Record, View, number, plain

SHARE = 0.9  # of the final metric


@dataclass(frozen=True)
class FleetRow:
    """One cell of a fleet: means over its seeds; NaN where nothing was measured."""

    cell: str
    label: str
    means: Mapping[str, float]  # by the keys of COLUMNS


def _count(value: float) -> str:
    return plain(value, ",.0f" if value % 1.0 == 0.0 else ",.1f")


def _reached(value: float) -> str:
    """What a cell never reached is said: it is no missing number."""
    return "never" if value == math.inf else plain(value, ",.1f")


COLUMNS = (
    Column("seconds", "virtual s", "virtual time", "s", lambda value: plain(value, ",.1f")),
    Column("own_s", "to 90 % s", "to 90 % of its end", "s", _reached),
    Column("best_s", "to 90 % of best s", "to 90 % of the best", "s", _reached),
    Column("energy_j", "energy J", "energy", "J", lambda value: plain(value, ",.0f")),
    Column("jain", "Jain", "Jain index", "", lambda value: plain(value, ".3f")),
    Column("chosen", "chosen", "chosen", "", _count),
    Column("trained", "trained", "trained", "", _count),
    Column("arrived", "arrived", "arrived", "", _count),
    Column("lost", "lost", "lost", "", _count),
    Column("late", "late", "late", "", _count),
    Column("polled", "polled", "polled", "", lambda value: _count(value) if value else "", optional=True),
)


def fleet_cells(records: Sequence[Record]) -> list[str]:
    """Return the cells whose devices had radios and a clock, in a legend's order; none without a fleet."""
    on_air = {str(record["cell"]) for record in records if record.get("jain") is not None}
    return [cell for cell in cells(records) if cell in on_air]


def fleet_rows(records: Sequence[Record]) -> list[FleetRow]:
    """Return one row for each cell of a fleet that has a final record, soonest at the best metric first."""
    final, view = final_records(records), views.of_records(records)
    here = [cell for cell in fleet_cells(records) if any(record["cell"] == cell for record in final)]
    best = goal_of(records)
    rows = []
    for cell in here:
        own = [record for record in final if record["cell"] == cell]
        means = {column.key: mean_of(own, cell, column.key) for column in COLUMNS}
        courses = [course_of(records, cell, record.get("seed"), view) for record in own]
        ends = [number(record.get(view.metric)) for record in own]
        own_s = [
            reached_s(*course, nine_tenths(end, view), view)
            for course, end in zip(courses, ends, strict=True)
        ]
        means["own_s"] = float(np.mean(own_s))
        means["best_s"] = float(np.mean([reached_s(*course, best, view) for course in courses]))
        rows.append(FleetRow(cell, label_of(records, cell), means))
    return sorted(rows, key=lambda row: (math.isnan(row.means["best_s"]), row.means["best_s"]))


def columns_of(rows: Sequence[FleetRow]) -> list[Column]:
    """Return the columns with something to show; the best cell's goal only where there is another cell."""
    return [
        column
        for column in COLUMNS
        if (len(rows) > 1 or column.key != "best_s")
        and (not column.optional or any(column.show(row.means[column.key]) for row in rows))
    ]


def goal_of(records: Sequence[Record]) -> float:
    """Return nine tenths of the best cell's last metric, mean over seeds; NaN before a cell has finished."""
    final, view = final_records(records), views.of_records(records)
    scores = [mean_of(final, cell, view.metric) for cell in fleet_cells(final)]
    best = min((score for score in scores if math.isfinite(score)), key=view.error, default=math.nan)
    return nine_tenths(best, view)


def nine_tenths(score: float, view: View) -> float:
    """Return 0.9 x a metric; NaN for a loss in dB that is not below 0."""
    return SHARE * score if view.higher or score < 0 else math.nan


def course_of(
    records: Sequence[Record], cell: str, seed: object, view: View
) -> tuple[np.ndarray, np.ndarray]:
    """Return the virtual seconds (R,) and the metric (R,) of one cell and seed, where it was measured."""
    found = {
        int(record["round"]): (number(record.get("seconds")), number(record.get(view.metric)))
        for record in records
        if record["cell"] == cell and record.get("seed") == seed
    }  # the last record of a round counts: a final one, scored on more, replaces its sketch
    points = np.array([found[round] for round in sorted(found)], np.float64).reshape(-1, 2)
    seconds = np.nan_to_num(points[:, 0], nan=0.0)  # round 0: the clock has not started
    measured = np.isfinite(points[:, 1])
    return seconds[measured], points[measured, 1]


def reached_s(seconds: np.ndarray, scores: np.ndarray, goal: float, view: View) -> float:
    """Return the first of ``seconds`` (R,) whose score is at the goal; inf: never; NaN: there is no goal."""
    if math.isnan(goal):
        return math.nan
    at_goal = np.flatnonzero(scores >= goal if view.higher else scores <= goal)
    return float(seconds[at_goal[0]]) if len(at_goal) else math.inf
