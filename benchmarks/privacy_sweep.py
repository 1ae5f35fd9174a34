"""A sweep in one warm run against a run a cell: `fedlam sweep` through Flower and Ray, wall time a cell.

The small preset: 2,000 Rotten Tomatoes sentences, one block of MiniLM, six steps of DP-SGD on two devices: a
cell trains for seconds, so that what a run costs besides is seen (it learns little: this is about time). One
`fedlam sweep` of 4 epsilons, 3 strategies and 3 seeds (36 cells), from nothing to its report, in a home of
its own; then two of its cells as `fedlam run`, each from nothing too. Axes as arguments replace the three,
for a quick look that writes no result:

    python -m benchmarks.privacy_sweep "privacy.target-epsilon=3,inf" "strategy=fedit" "seed=1"
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.own_flower import own_flower
from benchmarks.record import Figure, write_result
from fedlam_app.experiments.cells import Cell, cells_of
from fedlam_app.experiments.track import read_metrics
from fedlam_app.launch import environment, read_overrides

PRESET = (
    "task=text-classification text.train=2000 text.test=300 text.max-tokens=32 model.blocks=1 model.rank=4"
    " model.lora-on=attention train.devices=2 train.rounds=6 train.local-steps=1 train.batch-rows=100"
    " train.optimiser=sgd train.lr=8.0 train.evaluate-every=6 privacy.mechanism=dp-sgd"
)
AXES = ("privacy.target-epsilon=1,3,8,inf", "strategy=fedit,ffa-lora,rolora", "seed=1,2,3")
ALONE = 2  # cells that are run by themselves
LEAST = 5.0  # times sooner


def fedlam(words: list[str], folder: Path) -> tuple[int, float]:
    """Run a `fedlam` command from nothing; return its exit code and its wall seconds."""
    with own_flower(folder / "flower") as own:
        env = {**os.environ, **environment(), **own, "FEDLAM_DEVICES": str(folder / "devices")}
        started = time.monotonic()
        done = subprocess.run([str(Path(sys.executable).with_name("fedlam")), *words], env=env, check=False)
        return done.returncode, time.monotonic() - started


def finals(results: Path) -> dict[str, dict[str, Any]]:
    """Return the final records of a run folder by key."""
    return {str(record["key"]): record for record in read_metrics(results) if record.get("kind") == "final"}


def alone(cell: Cell, folder: Path) -> tuple[int, float, dict[str, Any]]:
    """Run one cell as a training of its own; return exit code, wall seconds and its final record."""
    results = folder / "run"
    own = " ".join(f"{key}={value}" for key, value in cell.overrides.items())
    code, wall_s = fedlam(["run", "-c", f"{PRESET} {own}", "--results", str(results)], folder)
    return code, wall_s, next(iter(finals(results).values()), {})


def main() -> int:
    """Measure, write ``results/privacy_sweep.json`` where nothing was cut; 0 where every bound holds."""
    from fedlam_app.config import parse

    axes = sys.argv[1:] or list(AXES)
    cells = cells_of(parse({**read_overrides([PRESET]), "job": "sweep", "sweep.over": "; ".join(axes)}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        results = folder / "run"
        code, sweep_s = fedlam(["sweep", *axes, "-c", PRESET, "--results", str(results)], folder)
        found = finals(results)
        page = (results / "report.html").is_file() and (results / "plots" / "sweep.png").is_file()
        chosen = [cells[0], cells[-1]][:ALONE]
        runs = [alone(cell, Path(name) / str(place)) for place, cell in enumerate(chosen)]
    a_cell, a_run = sweep_s / len(cells), sum(wall_s for _, wall_s, _ in runs) / len(runs)
    same = [
        {key: own.get(key) for key in ("accuracy", "loss", "attack_auc", "epsilon")}
        == {key: found.get(cell.key, {}).get(key) for key in ("accuracy", "loss", "attack_auc", "epsilon")}
        for cell, (_, _, own) in zip(chosen, runs, strict=True)
    ]
    figures = [
        Figure("privacy", "cells of the sweep that finished", len(found), "", f"== {len(cells)}"),
        Figure(
            "privacy",
            "all commands succeeded, and the sweep left report and plot",
            float(page and code == 0 and not any(one for one, _, _ in runs)),
            "yes = 1",
            "== 1",
        ),
        Figure(
            "privacy", "a cell alone has the numbers that it has in the sweep", min(same), "yes = 1", "== 1"
        ),
        Figure("privacy", f"one run of {len(cells)} cells, wall, from nothing to the report", sweep_s, "s"),
        Figure("privacy", "of it a cell", a_cell, "s"),
        Figure("privacy", f"a run of one cell, wall, mean of {len(runs)}", a_run, "s"),
        Figure(
            "privacy", "a cell of the sweep sooner than a run of its own", a_run / a_cell, "x", f">= {LEAST}"
        ),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    if axes == list(AXES):
        kept = ("axes", "seed", "accuracy", "epsilon", "attack_auc", "attack_auc_se")
        extra = {
            "preset": PRESET,
            "axes": axes,
            "separate_s": [wall_s for _, wall_s, _ in runs],
            "cells": [{key: record.get(key) for key in kept} for record in found.values()],
        }
        write_result("privacy_sweep", figures, seed=1, extra=extra)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
