"""What a run leaves behind when its cells are done: the adapter, the plots, the report, the table."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np

from fedlam_app.base.registry import pick
from fedlam_app.base.vectors import unpack
from fedlam_app.config import RunConfig, parse, to_flat
from fedlam_app.experiments.cells import Cell
from fedlam_app.experiments.report import write_report
from fedlam_app.experiments.summary import final_table
from fedlam_app.experiments.track import RunFolder
from fedlam_app.models.export import export
from fedlam_app.tasks import TASKS


def finish(folder: RunFolder, config: RunConfig, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
    """Export the first cell's model, draw the plots, write the report, and say the table."""
    _export(folder, config, cells[0])
    report = write_report(folder.path)
    for line in _rendered(folder).splitlines():
        say(line)
    say(f"Report: {report}")


def _export(folder: RunFolder, config: RunConfig, cell: Cell) -> None:
    """Write the adapter of a trained cell: the largest federation comes first in a case study."""
    own = parse({**to_flat(config), **cell.overrides})
    state = folder.load_state(cell.key)
    if state is None:
        return
    model = pick(TASKS, own.task, "task")(own).build_model()
    unpack(state[0]["models"][0].astype(np.float32), model.trainable().values())
    export(model, folder.path / "adapter", own.model.backbone, own.model.blocks, cell.label)


def _rendered(folder: RunFolder) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=140).print(final_table(folder.read_metrics()))
    return text.getvalue()
