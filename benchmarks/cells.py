"""Experiments for benchmarks, without Ray: the same app on the in-process grid, two cells at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from fedlam_app.config import Scalar

Record = dict[str, object]


def run_cells(cells: Sequence[Mapping[str, Scalar]], processes: int = 2) -> list[list[Record]]:
    """Run jobs given by their overrides; returns each one's records, in the order of ``cells``."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(run_cell, cells))


def run_cell(overrides: Mapping[str, Scalar]) -> list[Record]:
    """Run one job (``job = "train"`` unless overridden) in this process and return its records."""
    import torch

    from fedlam_app.client_app import app
    from fedlam_app.config import parse
    from fedlam_app.experiments.cells import cells_of
    from fedlam_app.experiments.run import run_cells as run_all
    from fedlam_app.experiments.track import RunFolder
    from fedlam_app.grid import InProcessGrid

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as results:
        flat: dict[str, Scalar] = {"job": "train", **overrides, "results": results}
        config = parse(flat)
        folder = RunFolder.open(config)
        grid = InProcessGrid(app, 1, flat)
        run_all(grid, flat | {"federation.supernodes": 1}, cells_of(config), folder, 1, print)
        return folder.read_metrics()
