"""A sweep in pictures: the metric against the first numeric axis, and what an attack finds, beside it.

Epsilon comes first where it is an axis: on a logarithmic scale, with infinity (clipped, without noise) at the
right end. Other axes with positive numbers over a decade or more are logarithmic too. Points are means over
seeds, bars the standard deviation; of one seed alone an attack's bar is its standard error. There is a line
for each point of the other axes, and a dashed level for what has no value on the drawn one (no privacy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.axes import EPSILON, words
from fedlam_app.experiments import palette, views
from fedlam_app.experiments.lookup import final_records
from fedlam_app.experiments.sweep_table import axes_of, untrained
from fedlam_app.experiments.views import Record, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Marks = NDArray[np.float64]  # (values, 3): place on the axis, mean, bar
ATTACK = "attack_auc"
_DECADE = 10.0
_ASIDE = 0.008  # of the axis, between the lines' marks


def sweep_figures(records: Sequence[Record]) -> dict[str, Figure | None]:
    """Return the figure of a sweep; nothing for another run, or without a numeric axis of two values."""
    return {"sweep": sweep_figure(records)}


def sweep_figure(records: Sequence[Record]) -> Figure | None:
    """Return the metric, and beside it the attack where there was one, against the sweep's main axis."""
    import matplotlib.pyplot as plt

    final = [record for record in final_records(records) if record.get("axes")]
    key = main_axis(final)
    if key is None:
        return None
    view, curve = views.of_records(records), views.of_records(records).curves[1]
    attacked = any(record.get(ATTACK) is not None for record in final)
    width = 11.0 if attacked else 7.6
    figure, panels = plt.subplots(1, 1 + attacked, figsize=(width, 4.6), layout="constrained", squeeze=False)
    left = panels[0, 0]
    _panel(left, final, key, view.metric, curve.scale)
    left.set(title=curve.title, ylabel=curve.axis)
    if attacked:
        right = panels[0, 1]
        _panel(right, final, key, ATTACK, 1.0)
        level = {"color": "#5b6570", "linewidth": 1.2}
        right.axhline(0.5, linestyle=":", label="guessing", **level)
        right.axhline(untrained(records), linestyle=(0, (1, 4)), label="never trained", **level)
        right.set(title="Membership inference by loss", ylabel="AUC of the attack")
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def main_axis(records: Sequence[Record]) -> str | None:
    """Return the axis to draw along: epsilon, or the first one of numbers alone; two values at least."""
    axes = {key: values for key, values in axes_of(records).items() if len(values) > 1}
    return next((key for key, values in axes.items() if all(map(_is_number, values))), None)


def lines_of(records: Sequence[Record], key: str) -> dict[str, list[Record]]:
    """Return the records of each line, by its label: the rest of the point."""
    lines: dict[str, list[Record]] = {}
    for record in records:
        rest = {axis: value for axis, value in record["axes"].items() if axis != key}
        lines.setdefault(words(rest), []).append(record)
    return lines


def places(values: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Return where values stand on an axis, infinity at its right end, and whether it is logarithmic."""
    finite = sorted(float(value) for value in values if math.isfinite(float(value)))
    wide = bool(finite) and finite[0] > 0 and finite[-1] >= _DECADE * finite[0]
    log = bool(finite) and finite[0] > 0 and (wide or len(finite) < len(values))
    # A step like the mean one before it, and not a smaller one than a factor of 2.
    steps = max(1, len(finite) - 1)
    factor = max(2.0, (finite[-1] / finite[0]) ** (1 / steps)) if log else 1.0
    end = finite[-1] * factor if finite else 1.0
    return {value: float(value) if math.isfinite(float(value)) else end for value in values}, log


def marks(records: Sequence[Record], key: str, figure: str, where: Mapping[str, float]) -> Marks:
    """Return the points of one line, from left to right; what was not measured is left out."""
    found = []
    for value in sorted({record["axes"][key] for record in records}, key=where.__getitem__):
        own = [record for record in records if record["axes"][key] == value]
        scores = np.array([number(record.get(figure)) for record in own])
        if np.isfinite(scores).all():
            error = number(own[0].get(f"{figure}_se"))
            bar = scores.std(ddof=1) if len(own) > 1 else 0.0 if math.isnan(error) else error
            found.append((where[value], scores.mean(), bar))
    return np.array(found, np.float64).reshape(-1, 3)


def _panel(axes: Axes, records: Sequence[Record], key: str, figure: str, scale: float) -> None:
    """Draw every line of one figure of the records."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    values = axes_of(records)[key]
    where, log = places(values)
    among = list(lines_of(records, key))
    span = max(where.values()) / min(where.values()) if log else max(where.values()) - min(where.values())
    for place, (name, own) in enumerate(lines_of(records, key).items()):
        look = palette.line(name, among)
        on_axis = [record for record in own if key in record["axes"]]
        if not on_axis:
            level = scale * float(np.mean([number(record.get(figure)) for record in own]))
            axes.axhline(level, color=look["color"], linewidth=1.3, linestyle="--", label=name)
            continue
        aside = place - (len(among) - 1) / 2.0  # bars side by side
        x, mean, bar = marks(on_axis, key, figure, where).T
        x = x * (span ** (_ASIDE * aside)) if log else x + _ASIDE * aside * span
        look |= {"marker": "o", "markersize": 4.5, "capsize": 3, "elinewidth": 1.1}
        axes.errorbar(x, scale * mean, scale * bar, label=name or None, **look)
    if log:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([where[value] for value in values]))
    axes.set_xticklabels(["∞" if value == "inf" else value for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("target ε (∞: clipped, without noise)" if key == EPSILON else key)


def _is_number(value: str) -> bool:
    try:
        return not math.isnan(float(value))
    except ValueError:
        return False
