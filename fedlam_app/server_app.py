"""The ServerApp: configuration, channels, the job's cells, then the adapter, the plots and the report."""

from __future__ import annotations

from logging import INFO, WARNING

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedlam_app import checks
from fedlam_app.base.registry import pick
from fedlam_app.config import parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.finish import finish
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder
from fedlam_app.tasks import TASKS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured job into its results folder."""
    base = dict(context.run_config)
    config = parse(base)
    checks.check(config)
    for line in checks.warnings(config):
        log(WARNING, "%s", line)
    folder = RunFolder.open(config)
    log(INFO, "Results: %s", folder.path)
    cells = cells_of(config)
    for cell in cells:
        own = parse({**base, **cell.overrides})
        pick(TASKS, own.task, "task")(own).prepare()
    for line in checks.promises(config):
        log(INFO, "%s", line)
    run_cells(
        grid,
        base,
        cells,
        folder,
        side_by_side=config.federation.side_by_side,
        say=lambda line: log(INFO, "%s", line),
    )
    finish(folder, config, cells, say=lambda line: log(INFO, "%s", line))
    log(INFO, "Results: %s", folder.path)
