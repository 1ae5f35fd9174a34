"""Benchmark figures: written with the state of the machine, printed as one table.

A benchmark measures, states its figures with the bounds that it was asked to hold, and calls
:func:`write_result`; ``benchmarks/results/<name>.json`` is committed. ``python -m benchmarks.record``
prints every figure of every result. A figure without a bound is information and always holds.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedlam_app.base import machine
from fedlam_app.base.store import write_json

RESULTS = Path(__file__).resolve().parent / "results"

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, limit: value <= limit,
    ">=": lambda value, limit: value >= limit,
    "<": lambda value, limit: value < limit,
    ">": lambda value, limit: value > limit,
    "==": lambda value, limit: value == limit,
}

# The load before a measurement: read when the benchmark imports this module, not when it has finished.
_LOAD_BEFORE = os.getloadavg() if hasattr(os, "getloadavg") else (math.nan,) * 3


@dataclass(frozen=True)
class Figure:
    """One measured number beside what was asked of it."""

    issue: str  # which demand it answers, such as "foundation"
    name: str  # what was measured, in words
    value: float
    unit: str
    bound: str = ""  # a relation and a number, such as "<= 0.5"; empty: no demand

    def __post_init__(self) -> None:
        self._relation()

    @property
    def holds(self) -> bool:
        """Whether the value keeps the bound; NaN keeps none."""
        relation = self._relation()
        if relation is None:
            return True
        compare, limit = relation
        return compare(float(self.value), limit)

    def _relation(self) -> tuple[Callable[[float, float], bool], float] | None:
        if not self.bound:
            return None
        sign, _, limit = self.bound.partition(" ")
        try:
            return _RELATIONS[sign], float(limit)
        except (KeyError, ValueError):
            allowed = ", ".join(_RELATIONS)
            raise ValueError(
                f"bound '{self.bound}' of figure '{self.name}' must be one of {allowed}, a space and a number"
            ) from None


def write_result(
    name: str,
    figures: Sequence[Figure],
    *,
    seed: int,
    extra: Mapping[str, object] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write ``<folder>/<name>.json`` atomically and return its path; ``extra`` is any further JSON."""
    path = folder / f"{name}.json"
    write_json(
        path,
        {
            "benchmark": name,
            "seed": seed,
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(folder.parent),
            "machine": machine.processor() | {"load_before": [round(load, 2) for load in _LOAD_BEFORE]},
            "versions": machine.versions(),
            "figures": [
                asdict(figure) | {"value": _finite(float(figure.value)), "holds": bool(figure.holds)}
                for figure in figures
            ],
            "extra": dict(extra or {}),
        },
    )
    return path


def read_results(folder: Path = RESULTS) -> list[tuple[str, Figure]]:
    """Return (benchmark, figure) of every result in ``folder``, by name of the file."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for figure in result["figures"]:
            # Whether it holds follows from the value and the bound: it is not read back.
            kept = {key: figure[key] for key in ("issue", "name", "unit", "bound")}
            value = math.nan if figure["value"] is None else figure["value"]
            rows.append((result["benchmark"], Figure(value=value, **kept)))
    return rows


def main() -> int:
    """Print all figures; the exit code says whether every bound holds."""
    from rich.console import Console
    from rich.table import Table

    rows = read_results()
    table = Table(title=f"{len(rows)} figures, {sum(figure.holds for _, figure in rows)} hold")
    for column, justify in (("benchmark", "left"), ("issue", "left"), ("figure", "left"), ("value", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("unit", "bound", "holds"):
        table.add_column(column)
    before = ""
    for benchmark, figure in rows:
        if before not in ("", benchmark):
            table.add_section()
        verdict = "" if not figure.bound else "[green]yes[/]" if figure.holds else "[bold red]no[/]"
        shown = benchmark if benchmark != before else ""
        table.add_row(
            shown, figure.issue, figure.name, f"{figure.value:.4g}", figure.unit, figure.bound, verdict
        )
        before = benchmark
    Console().print(table)
    return 0 if all(figure.holds for _, figure in rows) else 1


def _finite(value: float) -> float | None:
    """JSON knows no NaN: an unmeasured figure is null."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
