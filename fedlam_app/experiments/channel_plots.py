"""Figures that only channel prediction has: by the number of servers, by speed, by the slot predicted.

Points are means over seeds, whiskers their range. Matplotlib is imported inside (it costs a second).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedlam_app.experiments import palette
from fedlam_app.experiments.lookup import cells, final_records, label_of, mean_of
from fedlam_app.experiments.palette import FED
from fedlam_app.experiments.views import Record, decibel, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def servers_figure(records: Sequence[Record]) -> Figure | None:
    """Final held-out NMSE against the number of edge servers, beside the competitors as levels."""
    import matplotlib.pyplot as plt

    final = final_records(records)
    numbers = sorted({int(found[1]) for cell in cells(final) if (found := FED.match(cell))})
    if len(numbers) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    values = [[number(r["nmse_clean_db"]) for r in final if r["cell"] == f"fed-{n}"] for n in numbers]
    means = [float(np.mean(v)) for v in values]
    place = np.arange(len(numbers))
    axes.plot(place, means, color=palette.FEDERATED, marker="o", markersize=7, linewidth=2.4, zorder=4)
    for x, spread in zip(place, values, strict=True):
        if len(spread) > 1:
            axes.plot([x, x], [min(spread), max(spread)], color=palette.FEDERATED, linewidth=1.2, zorder=3)
    for x, mean in zip(place, means, strict=True):
        axes.annotate(
            decibel(mean),
            (x, mean),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            color=palette.FEDERATED,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.8},
        )
    others = [cell for cell in cells(final) if not FED.match(cell)]
    levels = {cell: mean_of(final, cell, "nmse_clean_db") for cell in others}
    for cell, level in levels.items():
        axes.axhline(
            level,
            color=palette.colour_of(cell, others),
            linewidth=1.4,
            linestyle=palette.dash(cell, "--"),
            zorder=2,
        )
    texts = [
        (level, label_of(records, cell), palette.colour_of(cell, others)) for cell, level in levels.items()
    ]
    axes.set_xlim(-0.35, len(numbers) - 0.65)
    _right_labels(axes, texts)
    axes.set_xticks(place, [str(n) for n in numbers])
    axes.set(title="Held-out users, by the number of edge servers", xlabel="edge servers", ylabel="NMSE (dB)")
    return figure


def speed_figure(records: Sequence[Record]) -> Figure | None:
    """Final held-out NMSE against the users' speed."""
    final = [record for record in final_records(records) if record.get("nmse_by_speed_db")]
    speeds = sorted({float(key) for record in final for key in _table(record, "nmse_by_speed_db")})
    if len(speeds) < 2:
        return None

    def value(record: Record, speed: float) -> float:
        by_speed = {float(key): number(item) for key, item in _table(record, "nmse_by_speed_db").items()}
        return by_speed.get(speed, np.nan)

    return _lines(records, final, speeds, value, "speed (km/h)", "Held-out users, by their speed")


def horizon_figure(records: Sequence[Record]) -> Figure | None:
    """Final held-out NMSE of each future slot."""
    final = [record for record in final_records(records) if record.get("nmse_by_horizon_db")]
    slots = min((len(_list(record)) for record in final), default=0)
    if slots < 2:
        return None
    horizon = [float(slot + 1) for slot in range(slots)]

    def value(record: Record, slot: float) -> float:
        return number(_list(record)[int(slot) - 1])

    figure = _lines(records, final, horizon, value, "future slot", "Held-out users, by the slot predicted")
    figure.axes[0].set_xticks(horizon)
    return figure


def _lines(
    records: Sequence[Record],
    final: Sequence[Record],
    x: Sequence[float],
    value: Callable[[Record, float], float],
    xlabel: str,
    title: str,
) -> Figure:
    """One line a cell, its mean over seeds; the legend stands in the order of the lines' right ends."""
    import matplotlib.pyplot as plt

    shown = cells(final)
    means = {
        cell: [float(np.mean([value(record, at) for record in final if record["cell"] == cell])) for at in x]
        for cell in shown
    }
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    for cell in sorted(shown, key=lambda cell: -means[cell][-1]):
        line = palette.line(cell, shown) | {"marker": "o", "markersize": 4.5}
        axes.plot(x, means[cell], label=label_of(records, cell), **line)
    axes.set(title=title, xlabel=xlabel, ylabel="NMSE (dB)")
    figure.legend(loc="outside right center")
    return figure


def _right_labels(axes: Axes, texts: Sequence[tuple[float, str, str]]) -> None:
    """Write labels beside the right edge at their heights, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, previous = (high - low) * 0.055, -np.inf
    for height, text, colour in sorted(texts):
        previous = max(height, previous + gap)
        axes.annotate(
            f"{text}  {decibel(height)}", (1.0, previous), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=colour, fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _table(record: Record, key: str) -> Mapping[str, object]:
    value = record[key]
    assert isinstance(value, Mapping)
    return value


def _list(record: Record) -> Sequence[object]:
    value = record["nmse_by_horizon_db"]
    assert isinstance(value, Sequence)
    return value
