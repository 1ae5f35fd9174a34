"""Figures of a wireless fleet: time to accuracy, fairness and energy, and who took part.

    time, energy    from ``metrics.jsonl``: lines are means over seeds at the same virtual time, as far as
                    every seed goes, straight between two evaluations; bands are the range
    who             Lorenz curve of c_k, the rounds in which device k's update arrived (M. O. Lorenz, 1905):
                    sum of the n smallest c over the sum of all, against n / N. The dashed curve is what a
                    uniform draw from all devices is expected to give in T rounds: c ~ Bin(T, mean(c) / T)

Counts are in a cell's saved state (``fleet.history.count``); the map is in ``fleet_map.py``. Cells whose
devices did the same, under rules that cost the same, share a line. Matplotlib is imported inside (it costs a
second). Units: s, J.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlam_app.experiments import palette, views
from fedlam_app.experiments.fleet_map import COUNT, NEVER, map_figure
from fedlam_app.experiments.fleet_table import course_of, fleet_cells, goal_of
from fedlam_app.experiments.lookup import cells, final_records, label_of, mean_of
from fedlam_app.experiments.track import RunFolder
from fedlam_app.experiments.views import Record, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[np.ndarray, np.ndarray]  # seconds, values; each (R,)
SOFT = "#8d97a3"  # what lines are set against
_GRID_POINTS = 400  # at which seeds are averaged
_UNITS = ((300.0, 1.0, "s"), (2 * 3600.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"), (np.inf, 86400.0, "days"))


def fleet_figures(
    folder: RunFolder, config: Mapping[str, Any], records: Sequence[Record]
) -> dict[str, Figure | None]:
    """Return the figures of a run by their names; none for a run without a fleet.

    ``config`` is the run's flat configuration. A figure that has nothing to show yet is ``None``.
    """
    if not fleet_cells(records):
        return {}
    return {
        "time-to-accuracy": time_figure(records),
        "fairness-energy": fairness_figure(records, int(config["train.devices"])),
        "chosen": chosen_figure(folder, records),
        "map": map_figure(folder, config, records),
    }


def time_figure(records: Sequence[Record]) -> Figure | None:
    """Held-out metric against virtual time, and the goal: nine tenths of the best cell's last."""
    import matplotlib.pyplot as plt

    view, among = views.of_records(records), cells(records)
    curve = view.curves[1]
    courses = {
        cell: [course_of(records, cell, seed, view) for seed in _seeds(records, cell)]
        for cell in fleet_cells(records)
    }
    span, unit = _clock([course for own in courses.values() for course in own])
    if not span:
        return None
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    for cell, own in courses.items():
        points = [(seconds / span, curve.scale * scores) for seconds, scores in own]
        _draw(axes, records, cell, label_of(records, cell), points)
    final = final_records(records)
    for cell in (cell for cell in cells(final) if cell not in courses):
        level = curve.scale * mean_of(final, cell, curve.key)
        if np.isfinite(level):
            colour, label = palette.colour_of(cell, among), label_of(records, cell)
            axes.axhline(level, color=colour, linewidth=1.3, linestyle="--", label=label)
    goal = curve.scale * goal_of(records)
    if np.isfinite(goal):
        axes.axhline(goal, color=SOFT, linewidth=1.3, linestyle=":", label="90 % of the best", zorder=1)
    axes.set(title=f"{curve.title}, by virtual time", xlabel=f"virtual time ({unit})", ylabel=curve.axis)
    axes.set_xlim(left=0.0)
    figure.legend(loc="outside right center", handlelength=3.2)
    return figure


def fairness_figure(records: Sequence[Record], devices: int) -> Figure | None:
    """Jain's index, joules a device, and joules an update that arrived, against virtual time."""
    import matplotlib.pyplot as plt

    panels = {
        "Fairness": ("Jain index", lambda record: number(record.get("jain"))),
        "Energy, mean over devices": ("J so far", lambda record: number(record.get("energy_j")) / devices),
        "Energy of an arrived update": (
            "J, mean so far",
            lambda record: number(record.get("energy_j")) / (number(record.get("arrived")) or np.nan),
        ),
    }
    series = {
        cell: [
            [_measured(records, cell, seed, value) for seed in _seeds(records, cell)]
            for _, value in panels.values()
        ]
        for cell in fleet_cells(records)
    }
    span, unit = _clock([course for own in series.values() for panel in own for course in panel])
    if not span:
        return None
    figure, row = plt.subplots(1, len(panels), figsize=(11, 3.9), layout="constrained")
    groups = _alike(
        {cell: [a for panel in own for pair in panel for a in pair] for cell, own in series.items()}
    )
    for place, (axes, (title, (axis, _))) in enumerate(zip(row, panels.items(), strict=True)):
        for group in groups:
            points = [(seconds / span, values) for seconds, values in series[group[0]][place]]
            _draw(axes, records, group[0], _names(records, group), points)
        axes.set(title=title, xlabel=f"virtual time ({unit})", ylabel=axis)
        axes.set_xlim(left=0.0)
        axes.set_ylim(0.0, 1.06 * max(float(axes.dataLim.y1), 1e-9) if place else 1.0)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def chosen_figure(folder: RunFolder, records: Sequence[Record]) -> Figure | None:
    """Lorenz curves of how often each device's update arrived, with Jain's index in the labels."""
    import matplotlib.pyplot as plt
    from scipy.stats import binom

    counts = {}
    for cell in fleet_cells(records):
        saved = (_count(folder, records, cell, seed) for seed in _seeds(records, cell))
        counts[cell] = [count for count in saved if count is not None and count.any()]
    counts = {cell: own for cell, own in counts.items() if own}
    if not counts:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 4.9), layout="constrained")
    for group in _alike(counts):
        own = counts[group[0]]
        jain = np.mean([count.sum() ** 2 / (len(count) * (count @ count)) for count in own])
        share = np.mean([lorenz(count) for count in own], axis=0)
        label = f"{_names(records, group)}: Jain {jain:.2f}"
        place = np.linspace(0.0, 100.0, len(share))
        axes.plot(place, 100.0 * share, label=label, **palette.line(group[0], cells(records)))
    rounds = max(int(record["round"]) for record in records)
    p = min(float(np.mean([count.mean() for own in counts.values() for count in own])) / rounds, 1.0)
    times = np.arange(rounds + 1)
    fair, weight = binom.cdf(times, rounds, p), binom.pmf(times, rounds, p) * times
    axes.plot(
        100.0 * np.append(0.0, fair), 100.0 * np.append(0.0, np.cumsum(weight) / weight.sum()),
        color=SOFT, linewidth=1.3, linestyle="--", zorder=1, label="uniform draw from all",
    )  # fmt: skip
    axes.plot([0, 100], [0, 100], color=NEVER, linewidth=1.2, zorder=1, label="everybody as often")
    axes.set(
        title="Who took part",
        xlabel="share of the devices, the least often chosen first (%)",
        ylabel="share of the updates that arrived (%)",
        xlim=(0, 100),
        ylim=(0, 100),
    )
    axes.legend(loc="upper left")
    return figure


def lorenz(count: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the share (N + 1,) of all counts that the n smallest have, n = 0..N; somebody has one."""
    return np.append(0.0, np.cumsum(np.sort(count), dtype=np.float64)) / float(count.sum())


# --- lines over virtual time ---------------------------------------------------------------------------


def _seeds(records: Sequence[Record], cell: str) -> list[object]:
    return list(dict.fromkeys(record.get("seed") for record in records if record["cell"] == cell))


def _measured(records: Sequence[Record], cell: str, seed: object, value: Any) -> Series:
    """Return what the fleet's own figures were at every evaluation of one seed."""
    own = {
        int(record["round"]): (number(record.get("seconds")), value(record))
        for record in records
        if record["cell"] == cell and record.get("seed") == seed and record.get("jain") is not None
    }
    points = np.array([own[round] for round in sorted(own)], np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(1)]
    return points[:, 0], points[:, 1]


def _clock(series: Sequence[Series]) -> tuple[float, str]:
    """Return the seconds of a unit that suits the longest series, and its name; 0 where nothing took time."""
    longest = max((float(seconds.max(initial=0.0)) for seconds, _ in series), default=0.0)
    if longest <= 0.0:
        return 0.0, ""
    return next((span, unit) for most, span, unit in _UNITS if longest <= most)


def _alike(found: Mapping[str, Sequence[np.ndarray]]) -> list[list[str]]:
    """Group the cells whose arrays are the same: the devices do alike under rules that cost alike."""
    groups: dict[tuple[bytes, ...], list[str]] = {}
    for cell, arrays in found.items():
        groups.setdefault(tuple(array.tobytes() for array in arrays), []).append(cell)
    return list(groups.values())


def _names(records: Sequence[Record], group: Sequence[str]) -> str:
    """Return the label of the line that is drawn for a group of cells."""
    labels = [label_of(records, cell) for cell in group]
    return ", ".join(labels) if len(labels) < 4 else f"{labels[0]}, {labels[1]} and {len(labels) - 2} more"


def _draw(axes: Axes, records: Sequence[Record], cell: str, label: str, series: Sequence[Series]) -> None:
    """Draw a cell's mean over seeds, and the band of its seeds."""
    among = cells(records)
    whole = [(x, y) for x, y in series if len(x)]
    if len(whole) == 1:
        axes.plot(*whole[0], label=label, marker="o", markersize=4.0, **palette.line(cell, among))
    elif whole:
        first, last = max(x[0] for x, _ in whole), min(x[-1] for x, _ in whole)
        grid = np.linspace(first, last, _GRID_POINTS)
        values = np.stack([np.interp(grid, x, y) for x, y in whole])
        axes.plot(grid, values.mean(0), label=label, **palette.line(cell, among))
        shade = palette.colour_of(cell, among)
        axes.fill_between(grid, values.min(0), values.max(0), color=shade, alpha=0.12, linewidth=0)


def _count(folder: RunFolder, records: Sequence[Record], cell: str, seed: object) -> NDArray[np.int64] | None:
    """Return how often each device (N,) of a cell and seed took part; None where its state is gone."""
    own = next(record for record in records if record["cell"] == cell and record.get("seed") == seed)
    state = folder.load_state(str(own.get("key", cell)))
    return None if state is None else state[0][COUNT].astype(np.int64)
