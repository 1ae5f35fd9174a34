"""`fedlam`: run a job or a sweep, rebuild its report, audit its privacy, list names, examine the machine.

Heavy imports (torch, flwr, matplotlib) stay inside the commands: `fedlam --help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from fedlam_app.config import Scalar

app = typer.Typer(
    name="fedlam",
    help="Federated training of large AI models across a wireless edge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunConfigOption = Annotated[
    list[str] | None,
    typer.Option("--run-config", "-c", help="Keys to change, 'k=v k2=v2', or a TOML file; may be repeated."),
]


SupernodesOption = Annotated[
    int | None,
    typer.Option("--supernodes", help="SuperNodes that carry the devices; best: the CPU cores."),
]
ResultsOption = Annotated[
    Path | None, typer.Option("--results", help="Folder of the run; default ~/fedlam-runs/<job>.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the killed run in that folder.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Validate, print the command, start nothing.")]
AppOption = Annotated[
    Path | None,
    typer.Option("--app", help="Checkout that Flower bundles; default: the one that is installed."),
]


@app.command()
def run(
    run_config: RunConfigOption = None,
    supernodes: SupernodesOption = None,
    results: ResultsOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    app_path: AppOption = None,
) -> None:
    """Validate a configuration, run it through `flwr run`, and exit 1 if the run failed."""
    _start(run_config or [], {}, supernodes, results, resume, dry_run, app_path)


@app.command()
def sweep(
    axes: Annotated[
        list[str],
        typer.Argument(help="Axes, 'key=value,value'; 'seed=1,2,3' repeats; '|' is a comma within a value."),
    ],
    run_config: RunConfigOption = None,
    supernodes: SupernodesOption = None,
    results: ResultsOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    app_path: AppOption = None,
) -> None:
    """Train every combination of some keys' values in one warm run; more values may be added later.

    Such as: fedlam sweep "privacy.target-epsilon=1,3,8,inf" "strategy=fedit,ffa-lora" "seed=1,2,3"
    """
    over = {"job": "sweep", "sweep.over": "; ".join(axes)}
    _start(run_config or [], over, supernodes, results, resume, dry_run, app_path)


def _start(
    run_config: list[str],
    job: Mapping[str, Scalar],
    supernodes: int | None,
    results: Path | None,
    resume: bool,
    dry_run: bool,
    app_path: Path | None,
) -> None:
    """Validate, say what will run and what it promises, submit, and exit with the run's code."""
    from fedlam_app import checks, launch
    from fedlam_app.config import ConfigError
    from fedlam_app.experiments.cells import cells_of

    flags: dict[str, Scalar] = dict(job)
    if supernodes is not None:
        flags["federation.supernodes"] = supernodes
    if results is not None:
        flags["results"] = str(results)
    if resume:
        flags["resume"] = True
    try:
        config = launch.resolve(launch.read_overrides(run_config) | flags)
        folder = launch.app_folder(app_path)
        command = launch.command(folder, config)
    except ConfigError as error:
        _refuse(str(error))
    typer.echo(f"results: {config.results}")
    if config.job == "sweep":
        typer.echo(f"cells: {len(cells_of(config))}")
    for line in checks.promises(config):
        typer.echo(line)
    for line in checks.warnings(config):
        typer.secho(f"warning: {line}", fg=typer.colors.YELLOW, err=True)
    if dry_run:
        typer.echo(launch.shown(command))
        return
    from fedlam_app.doctor import superlinks

    for finding in superlinks():
        if not finding.well:
            typer.secho(f"warning: {finding.what}: {finding.detail}", fg=typer.colors.YELLOW, err=True)
    code = launch.submit(folder, config, say=lambda text: typer.echo(text, err=True))
    typer.echo(f"results: {config.results}")
    raise typer.Exit(code)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's results folder.")]) -> None:
    """Rebuild the plots and report.html of a run folder, and print its final table."""
    from rich.console import Console

    from fedlam_app.experiments import report as reporting

    try:
        page = reporting.write_report(folder)
        table = reporting.final_table(reporting.read_run(folder).records)
    except ValueError as error:
        _refuse(str(error))
    Console().print(table)
    typer.echo(str(page))


@app.command("ls")
def list_names() -> None:
    """List strategies, policies, tasks, models, and every configuration key with its default."""
    from typing import get_args

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fedlam_app import config
    from fedlam_app.models import backbones, predictors
    from fedlam_app.tables.privacy import PrivacyConfig
    from fedlam_app.tables.wireless import SelectionConfig
    from fedlam_app.tasks import TASKS
    from fedlam_app.wireless.shares import ALLOCATORS
    from strategies import ALGORITHMS
    from strategies.selection import POLICIES

    names = Table(show_header=False, box=None, padding=(0, 2))
    for kind, found in (
        ("strategies", ALGORITHMS),
        ("policies", POLICIES),
        ("modes", get_args(SelectionConfig.model_fields["mode"].annotation)),
        ("allocators", ALLOCATORS),
        ("mechanisms", get_args(PrivacyConfig.model_fields["mechanism"].annotation)),
        ("tasks", TASKS),
        ("models", predictors.PREDICTORS),
        ("backbones", backbones.NAMES),
        ("competitors", config.COMPETITORS),
        ("scenarios", config.SCENARIOS),
    ):
        names.add_row(f"[bold]{kind}[/]", ", ".join(found))
    keys = Table(
        title="Configuration keys (--run-config) and their defaults",
        title_justify="left",
        box=None,
        show_header=False,
    )
    keys.add_column(no_wrap=True, style="bold")
    keys.add_column(overflow="fold")
    for key, default, allowed, meaning in config.describe():
        shown = str(default).lower() if isinstance(default, bool) else repr(default)
        short = len(f"{key}{shown}") < 32
        keys.add_row(f"{key} = {shown}" if short else key, escape(meaning.replace("``", "'")))
        keys.add_row("", f"[dim]{escape(allowed if short else f'{allowed}; default {shown}')}[/]")
    console = Console()
    console.print(names)
    console.print(keys)


@app.command()
def audit(
    run_config: RunConfigOption = None,
    trials: Annotated[int, typer.Option(min=10_000, help="Worlds that a mechanism is tried in.")] = 1_000_000,
    fast: Annotated[bool, typer.Option("--fast", help="Fewer worlds, canaries and texts: a minute.")] = False,
    output: Annotated[Path | None, typer.Option(help="File for everything that was found, as JSON.")] = None,
) -> None:
    """Test the privacy that a configuration claims, or every mechanism; exit 1 if a claim is contradicted."""
    from rich.console import Console

    from fedlam_app import launch
    from fedlam_app.base.store import write_json
    from fedlam_app.config import ConfigError, parse
    from fedlam_app.experiments.audit import refuse, run_audit
    from fedlam_app.experiments.audit_table import rendered

    flat: dict[str, Scalar] = {"job": "train", "task": "text-classification"}
    try:
        config = parse(flat | launch.read_overrides(run_config or []))
        refuse(config)
    except ConfigError as error:
        _refuse(str(error))
    console = Console()
    with console.status("audit") as status:
        found = run_audit(config, min(trials, 100_000) if fast else trials, fast=fast, say=status.update)
    for part in rendered(found):
        console.print(part)
    if output is not None:
        write_json(output, found.record())
    raise typer.Exit(1 if found.contradicted else 0)


@app.command()
def doctor() -> None:
    """Look for what would make a run fail (a stale SuperLink, missing weights); exit 1 on a finding."""
    from rich.console import Console
    from rich.table import Table

    from fedlam_app.doctor import examine

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    well = True
    for finding in examine():
        table.add_row("[green]ok[/]" if finding.well else "[bold red]!![/]", finding.what, finding.detail)
        well = well and finding.well
    Console().print(table)
    raise typer.Exit(0 if well else 1)


def _refuse(reason: str) -> NoReturn:
    """Print one sentence and exit 2, as typer does for wrong options."""
    typer.secho(f"fedlam: {reason}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    sys.exit(app())
