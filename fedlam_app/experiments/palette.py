"""How a run's figures look: one colour and one line a cell, the same in every figure.

Colours are Okabe and Ito's (2008), told apart by every kind of colour vision; federated curves share one hue
that deepens with the number of servers. Strategies beyond those colours take spare ones, and then dashes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FED = re.compile(r"fed-(\d+)$")
"""A federated cell and its number of servers."""

_BLUES = ("#a6cde8", "#62a8d6", "#2a7fba", "#0b4a7a")
_INK, _GRID = "#22272e", "#dfe3e8"
_COLOURS = {
    "central": "#009E73",
    "local": "#56308f",
    "llm4cp-local": "#56308f",
    "gru-local": "#E69F00",
    "rnn-local": "#D55E00",
    "lstm-local": "#CC79A7",
    "cnn-local": "#8c6d1f",
    "transformer-local": "#b0413e",
    "ar": "#5b6570",
    "ridge": "#8d97a3",
    "pad": "#a9714b",
    "wiener-ar": "#222222",
    "repeat-last": "#b9c0c8",
    "linear-probe": "#5b6570",
    "majority": "#b9c0c8",
}
_SPARE = ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#8c6d1f", "#b0413e", "#7fa31c")
_ALONE = (0, (5, 1.5))
_STYLES = {"llm4cp-local": _ALONE, "local": _ALONE, "central": (0, (1.2, 1.2))}
_LAPS: tuple[Any, ...] = ("-", (0, (7, 2, 1.5, 2)), (0, (2.5, 1.5)))

FEDERATED = _BLUES[-1]


def colour_of(cell: str, among: Sequence[str]) -> str:
    """Return a cell's colour: the same in every figure of a run."""
    federated = [other for other in among if FED.match(other)]
    if cell in federated:
        depth = (federated.index(cell) + 1) / len(federated)
        return _BLUES[max(0, round(depth * len(_BLUES)) - 1)]
    return _COLOURS.get(cell) or _SPARE[_place(cell, among) % len(_SPARE)]


def line(cell: str, among: Sequence[str]) -> dict[str, Any]:
    """Return matplotlib's keywords of a cell's line."""
    thick = 2.2 if FED.match(cell) else 1.7
    usual = _LAPS[_place(cell, among) // len(_SPARE) % len(_LAPS)]
    return {"color": colour_of(cell, among), "linewidth": thick, "linestyle": dash(cell, usual)}


def dash(cell: str, usual: str) -> Any:
    """Return a cell's dashes, or the usual ones."""
    return _STYLES.get(cell, usual)


def style() -> dict[Any, Any]:
    """Return matplotlib's settings."""
    return {
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.grid": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }


def _place(cell: str, among: Sequence[str]) -> int:
    """Which of the cells without a colour of their own this one is; 0 for the others."""
    unknown = [other for other in among if other not in _COLOURS and not FED.match(other)]
    return unknown.index(cell) if cell in unknown else 0
