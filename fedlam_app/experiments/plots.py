"""Figures of a run, from ``metrics.jsonl`` alone: learning curves, servers, speed, horizon.

Lines are means over seeds, bands their range; colours are in ``palette.py``. Matplotlib is imported inside
(it costs a second) and draws without a display.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlam_app.experiments import palette
from fedlam_app.experiments.palette import FED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, object]


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write every figure that ``records`` have data for as PNG into ``folder``; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(palette.style()):
        for name, draw in (
            ("loss", loss_figure),
            ("servers", servers_figure),
            ("speed", speed_figure),
            ("horizon", horizon_figure),
        ):
            figure = draw(records)
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=160)
                plt.close(figure)
                written.append(path)
    return written


def loss_figure(records: Sequence[Record]) -> Figure | None:
    """Global training loss and held-out NMSE against the round, for every cell that trains; dB."""
    import matplotlib.pyplot as plt

    trained = [cell for cell in cells(records) if len(_curve(records, cell, "nmse_clean_db")[0]) > 1]
    if not trained:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, key, title in (
        (left, "train_loss_db", "Global training loss (union of all shards)"),
        (right, "nmse_clean_db", "Held-out users, against the clean channel"),
    ):
        for cell in trained:
            x, mean, low, high = _curve(records, cell, key)
            if len(x):
                axes.plot(x, mean, label=label_of(records, cell), **palette.line(cell, trained))
                if np.any(high > low):
                    axes.fill_between(
                        x, low, high, color=palette.colour_of(cell, trained), alpha=0.12, linewidth=0
                    )
        axes.set(title=title, xlabel="round", ylabel="loss (dB)" if axes is left else "NMSE (dB)")
    _references(right, records, trained)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, -(-len(labels) // 2)))
    return figure


def servers_figure(records: Sequence[Record]) -> Figure | None:
    """Final held-out NMSE against the number of edge servers, beside the competitors as levels."""
    import matplotlib.pyplot as plt

    final = final_records(records)
    numbers = sorted({int(found[1]) for cell in cells(final) if (found := FED.match(cell))})
    if len(numbers) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    values = [[_number(r["nmse_clean_db"]) for r in final if r["cell"] == f"fed-{n}"] for n in numbers]
    means = [float(np.mean(v)) for v in values]
    place = np.arange(len(numbers))
    axes.plot(place, means, color=palette.FEDERATED, marker="o", markersize=7, linewidth=2.4, zorder=4)
    for x, spread in zip(place, values, strict=True):
        if len(spread) > 1:
            axes.plot([x, x], [min(spread), max(spread)], color=palette.FEDERATED, linewidth=1.2, zorder=3)
    for x, mean in zip(place, means, strict=True):
        axes.annotate(
            _db(mean),
            (x, mean),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            color=palette.FEDERATED,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.8},
        )
    others = [cell for cell in cells(final) if not FED.match(cell)]
    levels = {cell: _mean(final, cell, "nmse_clean_db") for cell in others}
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
        by_speed = {float(key): _number(item) for key, item in _table(record, "nmse_by_speed_db").items()}
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
        return _number(_list(record)[int(slot) - 1])

    figure = _lines(records, final, horizon, value, "future slot", "Held-out users, by the slot predicted")
    figure.axes[0].set_xticks(horizon)
    return figure


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


def _curve(
    records: Sequence[Record], cell: str, key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (rounds, mean, lowest, highest over seeds) of one quantity, where it was measured; each (R,)."""
    by_round: dict[int, dict[object, float]] = {}
    for record in records:
        if record["cell"] == cell and record.get(key) is not None:
            # The last record of a seed's round counts: a final one, scored on more, replaces its sketch.
            by_round.setdefault(int(_number(record["round"])), {})[record.get("seed")] = _number(record[key])
    x = np.array(sorted(by_round), dtype=int)
    stack = [list(by_round[number].values()) for number in x]
    return (
        x,
        np.array([np.mean(values) for values in stack]),
        np.array([min(values) for values in stack]),
        np.array([max(values) for values in stack]),
    )


def _references(axes: Axes, records: Sequence[Record], trained: Sequence[str]) -> None:
    """Draw what does not train as levels."""
    final = final_records(records)
    for cell in cells(final):
        if cell not in trained:
            level = _mean(final, cell, "nmse_clean_db")
            axes.axhline(
                level,
                color=palette.colour_of(cell, trained),
                linewidth=1.3,
                linestyle="--",
                label=label_of(records, cell),
            )


def _right_labels(axes: Axes, texts: Sequence[tuple[float, str, str]]) -> None:
    """Write labels beside the right edge at their heights, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, previous = (high - low) * 0.055, -np.inf
    for height, text, colour in sorted(texts):
        previous = max(height, previous + gap)
        axes.annotate(
            f"{text}  {_db(height)}", (1.0, previous), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=colour, fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _mean(final: Sequence[Record], cell: str, key: str) -> float:
    return float(np.mean([_number(record[key]) for record in final if record["cell"] == cell]))


def _db(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")  # the minus of the axes


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _table(record: Record, key: str) -> Mapping[str, object]:
    value = record[key]
    assert isinstance(value, Mapping)
    return value


def _list(record: Record) -> Sequence[object]:
    value = record["nmse_by_horizon_db"]
    assert isinstance(value, Sequence)
    return value
