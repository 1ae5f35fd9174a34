"""Names to things: a dictionary whose missing key says what would have been right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def pick(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``registry[name]``; a missing name raises ``ValueError`` in one helpful sentence."""
    if name in registry:
        return registry[name]
    raise ValueError(f"unknown {kind} '{name}'{did_you_mean(name, registry)}")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` or the list of what is allowed, to end an error message with."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; allowed are {', '.join(names)}"
