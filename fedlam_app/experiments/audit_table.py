"""What `fedlam audit` prints: a table of claims and tests, one of attacks, and what no test can see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlam_app.experiments.audit import BLIND, Audit, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

CONSISTENT = "[green]consistent[/]"
CONTRADICTED = "[bold red]CONTRADICTED[/]"


def rendered(audit: Audit) -> Iterator[RenderableType]:
    """Yield what is printed of an audit, in order."""
    yield _claims(audit)
    for row in audit.rows:
        for sentence in _said(row):
            yield f"  {row.test}, canary of {row.setting}: {sentence}"
    yield ""
    yield _attacks(audit)
    for attack in audit.attacks:
        if attack.contradicts:
            yield f"  {attack.what}, {attack.setting}: [bold red]CONTRADICTS the claim[/]"
    for reason in audit.skipped:
        yield f"[yellow]not done[/]: {reason}"
    yield "\n[bold]What these tests cannot see[/]"
    for blind in BLIND:
        yield f"- {blind}"
    if audit.contradicted:
        yield "\n[bold red]At least one test CONTRADICTS a claim.[/]"
    else:
        yield "\n[bold]All tests are consistent with the claims, which they do not prove.[/]"


def _said(row: Row) -> Iterator[str]:
    """Yield what the table has no room for."""
    if row.reasons:
        yield f"[bold red]CONTRADICTS the claim[/]: {'; '.join(row.reasons)}"
    elif row.more.get("ceiling", math.inf) < row.claimed:
        yield f"could not refute any claim above {row.more['ceiling']:.3g}"


def _claims(audit: Audit) -> RenderableType:
    from rich.table import Table

    table = Table(
        title="Claims, and what is proved against them", title_justify="left", box=None, padding=(0, 1)
    )
    for column in ("test", "canary"):
        table.add_column(column, no_wrap=True)
    for column in ("noise", "claim", "ledger", "Gauss", "free"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("claim is", no_wrap=True)
    table.add_row(*("[dim]" + unit + "[/]" for unit in ("", "", "z", "ε", "ε", "ε ≥", "ε ≥", "")))
    for row in audit.rows:
        numbers = (row.noise, row.claimed, row.ledger, row.gaussian, row.free)
        verdict = CONTRADICTED if row.reasons else CONSISTENT
        table.add_row(row.test, row.setting, *map(_shown, numbers), verdict)
    return table


def _attacks(audit: Audit) -> RenderableType:
    from rich.table import Table

    table = Table(title="Attacks", title_justify="left", box=None, padding=(0, 1))
    table.add_column("from", overflow="fold")
    for column in ("recovered", "of", "allowed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("claim is", no_wrap=True)
    before = ""
    for attack in audit.attacks:
        if attack.what != before:
            table.add_row(f"[bold]{attack.what}[/]", "", "", "", "")
        before, claimed = attack.what, not math.isnan(attack.limit)
        allowed = f"{100.0 * min(1.0, attack.limit):.1f} %" if claimed else ""
        verdict = (CONTRADICTED if attack.contradicts else CONSISTENT) if claimed else "[dim]not made[/]"
        share = f"{100.0 * attack.recovered:.1f} %"
        table.add_row(f"  {attack.setting}", share, str(attack.samples), allowed, verdict)
    return table


def _shown(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"
