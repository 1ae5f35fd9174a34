"""What a run promised of privacy and what it spent: the report's section, from ``privacy/*.json`` alone.

Each file holds an experiment's statement and its devices' ledgers. Of an experiment the device that has
spent most stands for all. Beside its Rényi epsilon, which the ledger enforces, stands the tighter one of
the PRV accountant for the same events: a second look, and no second promise. PRV takes seconds, so its
figures are kept in ``privacy-prv.json``; a ledger of many unlike events, or of a large epsilon, has none.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlam_app.base.store import write_json
from fedlam_app.experiments.track import PRIVACY
from fedlam_app.privacy.accounting import Ledger

CACHE = "privacy-prv.json"
MOST_EVENTS, MOST_EPSILON = 12, 30.0  # unlike events, and epsilon, up to which PRV takes seconds
_WORDS = {
    "unit": "unit",
    "adjacency": "neighbours",
    "released": "released",
    "adversary": "holds against",
    "trusted": "trusted",
    "sampling": "sampling",
    "randomness": "noise",
    "accountant": "accountant",
}


@dataclass(frozen=True)
class Spent:
    """One experiment: its promise, its devices, and the one of them that has spent most."""

    key: str
    promise: Mapping[str, Any]  # a ``Statement``'s record, maybe of an older version
    devices: int
    most: Ledger | None  # nothing spent yet: None


def read(folder: Path) -> list[Spent]:
    """Return every experiment of a run folder that promised something, by name."""
    found = []
    for path in sorted((folder / PRIVACY).glob("*.json")):
        book = json.loads(path.read_text(encoding="utf-8"))
        ledgers = [Ledger.from_json(json.dumps(own)) for own in book["ledgers"].values()]
        most = max(ledgers, key=lambda ledger: ledger.epsilon, default=None)
        found.append(Spent(path.stem, book["statement"], len(ledgers), most))
    return found


def promised(folder: Path) -> str:
    """Return the report's section; nothing for a run that promised nothing."""
    spent = read(folder)
    if not spent:
        return ""
    kinds: dict[str, list[Spent]] = {}  # what differs in the budget alone is said once
    for one in spent:
        kinds.setdefault(json.dumps({**one.promise, "epsilon": 0.0}), []).append(one)
    prv = second_looks(folder, spent)
    blocks = "".join(_block(own, prv) for own in kinds.values())
    return f"<section><h2>What is promised</h2>{blocks}</section>\n"


def second_looks(folder: Path, spent: list[Spent]) -> dict[str, float]:
    """Return the PRV epsilon of each experiment's first spender by key; kept in the folder for next time."""
    path = folder / CACHE
    kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known, found = dict(kept), {}
    for one in spent:
        if one.most is None or not _short(one.most):
            continue
        name = _digest(one.most)
        if name not in known:
            known[name] = one.most.prv()
        found[one.key] = known[name]
    if known != kept:
        write_json(path, known)
    return found


def _short(ledger: Ledger) -> bool:
    """Whether PRV can say something, and soon."""
    some = 0.0 < ledger.epsilon <= MOST_EPSILON
    return some and len({event[:2] for event in ledger.events}) <= MOST_EVENTS


def _digest(ledger: Ledger) -> str:
    """Name what an epsilon follows from."""
    return hashlib.sha256(json.dumps([ledger.events, ledger.pure, ledger.delta]).encode()).hexdigest()[:24]


def _block(own: list[Spent], prv: Mapping[str, float]) -> str:
    """Return one kind of promise and who made it."""
    promise = own[0].promise
    words = "".join(
        f"<tr><th>{name}</th><td>{_(promise[word])}</td></tr>"
        for word, name in _WORDS.items()
        if word in promise
    )
    uncovered = "".join(f"<li>{_(gap)}</li>" for gap in promise["uncovered"])
    head = "".join(f"<th>{name}</th>" for name in ("budget ε", "δ", "spent ε (Rényi)", "ε (PRV)", "devices"))
    rows = "".join(f"<tr><th>{_(one.key)}</th>{_figures(one, prv)}</tr>" for one in own)
    return (
        f"<h3>{_(promise['label'])} ({_(promise['mechanism'])})</h3><table class='keys'>{words}</table>"
        f"<p><strong>Not covered:</strong></p><ul>{uncovered}</ul>"
        f"<div class='wide'><table class='results'><tr><th></th>{head}</tr>{rows}</table></div>"
        "<p class='note'>Spent: the device that has spent most. Rényi is what the ledger enforces; PRV is the"
        " same events counted more tightly (within 0.01), where there are few unlike ones.</p>"
    )


def _figures(one: Spent, prv: Mapping[str, float]) -> str:
    spent = "" if one.most is None else _epsilon(one.most.epsilon)
    tighter = _epsilon(prv[one.key]) if one.key in prv else ""
    budget, delta = one.promise["epsilon"], one.promise["delta"]
    texts = (_epsilon(budget), f"{delta:g}", spent, tighter, str(one.devices))
    return "".join(f"<td>{text}</td>" for text in texts)


def _epsilon(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _(text: Any) -> str:
    return html.escape(str(text))
