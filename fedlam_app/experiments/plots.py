"""Figures of a run, from ``metrics.jsonl`` alone: learning curves, and the metric against what it cost.

Which curves and costs is the task's view; what only channel prediction has is in ``channel_plots.py``.
Lines are means over seeds, bands their range; colours are in ``palette.py``. Matplotlib is imported inside
(it costs a second) and draws without a display.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlam_app.experiments import palette, views
from fedlam_app.experiments.channel_plots import horizon_figure, servers_figure, speed_figure
from fedlam_app.experiments.fleet_table import fleet_cells
from fedlam_app.experiments.lookup import cells, federated, final_records, label_of, mean_of
from fedlam_app.experiments.views import Curve, Record, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_figure", "final_records", "loss_figure", "save", "write_plots"]


@dataclass(frozen=True)
class _Cost:
    """What a metric is set against."""

    key: str
    axis: str
    title: str
    scale: float
    logarithmic: bool
    federated_only: bool  # what pooled and lone training move in a simulation is not theirs to pay


_COSTS = {
    "uplink": _Cost("bytes_up", "sent up by all devices (MB)", "uplink", 1e-6, True, True),
    "seconds": _Cost("seconds", "virtual time (s)", "virtual time", 1.0, False, False),
}


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write every figure that ``records`` have data for as PNG into ``folder``; return the paths."""
    return save(lambda: _figures(records), folder)


def save(draw: Callable[[], Mapping[str, Figure | None]], folder: Path) -> list[Path]:
    """Write the figures that ``draw`` makes, in our style, as ``folder/NAME.png``; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(palette.style()):
        for name, figure in draw().items():
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=160)
                plt.close(figure)
                written.append(path)
    return written


def _figures(records: Sequence[Record]) -> dict[str, Figure | None]:
    costs = [
        name
        for name in views.of_records(records).costs
        # A fleet's virtual time has a figure of its own (``fleet_plots.py``).
        if name != "seconds" or not fleet_cells(records)
    ]
    return {
        "loss": loss_figure(records),
        **{name: cost_figure(records, name) for name in costs},
        "servers": servers_figure(records),
        "speed": speed_figure(records),
        "horizon": horizon_figure(records),
    }


def loss_figure(records: Sequence[Record]) -> Figure | None:
    """Global training loss and held-out metric against the round, for every cell that trains."""
    import matplotlib.pyplot as plt

    view = views.of_records(records)
    trained = [cell for cell in cells(records) if len(_curve(records, cell, view.metric)[0]) > 1]
    if not trained:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, curve in zip((left, right), view.curves, strict=True):
        for cell in trained:
            _draw(axes, records, cell, curve, _curve(records, cell, curve.key))
        axes.set(title=curve.title, xlabel="round", ylabel=curve.axis)
    _levels(right, records, view.curves[1], trained)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, -(-len(labels) // 2)))
    return figure


def cost_figure(records: Sequence[Record], name: str) -> Figure | None:
    """Held-out metric against the uplink or the virtual time so far, for every cell that spends it."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    view, cost = views.of_records(records), _COSTS[name]
    curve = view.curves[1]
    spending = [record for record in records if number(record.get(cost.key)) > 0]
    drawn = [
        cell
        for cell in cells(spending)
        if (federated(cell, view) or not cost.federated_only) and len(_curve(spending, cell, curve.key)[0])
    ]
    if not drawn:
        return None
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    for cell in drawn:
        points = _curve(spending, cell, curve.key, cost.key)
        _draw(axes, records, cell, curve, (cost.scale * points[0], *points[1:]), marker="o", markersize=4.5)
    _levels(axes, records, curve, drawn)
    if cost.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=f"{curve.title}, by {cost.title}", xlabel=cost.axis, ylabel=curve.axis)
    figure.legend(loc="outside right center", handlelength=3.2)
    return figure


Points = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, mean, lowest, highest; each (R,)


def _curve(records: Sequence[Record], cell: str, key: str, against: str = "round") -> Points:
    """Return (x, mean, lowest, highest over seeds) of one quantity, round by round, where it was measured."""
    by_round: dict[int, dict[object, tuple[float, float]]] = {}
    for record in records:
        if record["cell"] == cell and record.get(key) is not None:
            # The last record of a seed's round counts: a final one, scored on more, replaces its sketch.
            point = (number(record.get(against)), number(record[key]))
            by_round.setdefault(int(record["round"]), {})[record.get("seed")] = point
    stack = [np.array(list(by_round[number].values())) for number in sorted(by_round)]  # each (seeds, 2)
    return (
        np.array([points[:, 0].mean() for points in stack]),
        np.array([points[:, 1].mean() for points in stack]),
        np.array([points[:, 1].min() for points in stack]),
        np.array([points[:, 1].max() for points in stack]),
    )


def _draw(
    axes: Axes, records: Sequence[Record], cell: str, curve: Curve, points: Points, **look: object
) -> None:
    """Draw a cell's line, and the band of its seeds where they differ."""
    among = cells(records)
    x, (mean, low, high) = points[0], (curve.scale * values for values in points[1:])
    if len(x):
        axes.plot(x, mean, label=label_of(records, cell), **palette.line(cell, among) | look)
        if np.any(high > low):
            axes.fill_between(x, low, high, color=palette.colour_of(cell, among), alpha=0.12, linewidth=0)


def _levels(axes: Axes, records: Sequence[Record], curve: Curve, drawn: Sequence[str]) -> None:
    """Draw the final metric of every cell that has no line here as a level."""
    final, among = final_records(records), cells(records)
    for cell in cells(final):
        level = curve.scale * mean_of(final, cell, curve.key)
        if cell not in drawn and np.isfinite(level):
            axes.axhline(
                level,
                color=palette.colour_of(cell, among),
                linewidth=1.3,
                linestyle="--",
                label=label_of(records, cell),
            )
