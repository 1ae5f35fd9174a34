"""The axes of a sweep as one line of text: Flower's configuration has scalars only.

    privacy.target-epsilon=1,3,8,inf; strategy=fedit,ffa-lora; seed=1,2,3
    train.ranks=4|8,8         within a value '|' is the comma of a list: ranks 4 and 8, or 8 alone

A sweep is the product of its axes. The axis 'seed' is special to readers alone: it repeats every point.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

Axes = dict[str, tuple[str, ...]]  # values by key, in the order in which they were given
Point = dict[str, str]  # one value a key

EPSILON, MECHANISM, SEED = "privacy.target-epsilon", "privacy.mechanism", "seed"
FIXED = ("job", "results", "resume", "task", "device")  # a run has one of each
FIXED_TABLES = ("sweep.", "federation.", "compare.", "case-study.")
_FORM = "it must be key=value,value with axes separated by ';', such as 'train.lr=0.1,0.01; seed=1,2'"


def read_axes(text: str) -> Axes:
    """Return the axes that ``text`` names; ``ValueError``, in one sentence, where it names none."""
    axes: Axes = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, listed = (word.strip() for word in part.partition("="))
        values = tuple(value.strip() for value in listed.split(","))
        if not equals or not re.fullmatch(r"[a-z0-9.-]+", key) or not all(values):
            raise ValueError(f"'sweep.over' has '{part}', which is no axis: {_FORM}")
        if any(mark in part for mark in "'\"\\\n"):
            raise ValueError(f"'sweep.over' has {part!r}: a value must not hold quotes, '\\' or line breaks")
        if key in FIXED or key.startswith(FIXED_TABLES):
            raise ValueError(
                f"'sweep.over' has the axis '{key}', which is the same for a whole run: an axis must be what"
                " one training depends on, and what differs here needs runs of its own"
            )
        if key in axes:
            raise ValueError(f"'sweep.over' has the axis '{key}' twice; all its values must stand together")
        spelled = [spelling(value) for value in values]
        if twice := [value for value in spelled if spelled.count(value) > 1]:
            raise ValueError(f"'sweep.over' has {key} = {twice[0]} twice; every value may stand there once")
        axes[key] = values
    if not axes:
        raise ValueError(f"'sweep.over' = '{text}' has no axis: {_FORM}")
    return axes


def write_axes(axes: Mapping[str, Iterable[str]]) -> str:
    """Return the line that :func:`read_axes` reads."""
    return "; ".join(f"{key}={','.join(values)}" for key, values in axes.items())


def points(axes: Axes) -> Iterator[Point]:
    """Yield the product of the axes, the last one fastest; a seed repeats all of it."""
    ordered = sorted(axes, key=lambda key: key != SEED)
    for values in itertools.product(*(axes[key] for key in ordered)):
        point = dict(zip(ordered, values, strict=True))
        yield {key: point[key] for key in axes}


def spelling(value: str) -> str:
    """Return a value in its one spelling, so that 1.0 and 1 are the same; what is no number stays."""
    try:
        number = float(value)
    except ValueError:
        return value
    if "_" in value or (math.isfinite(number) and number.is_integer() and value.lstrip("-").isdecimal()):
        return value
    return format(number, "g") if float(format(number, "g")) == number else repr(number)


def words(point: Mapping[str, str]) -> str:
    """Return a point as people read it: 'fedit, ε = 3', 'batch-rows = 8, lr = 0.01'."""
    leaves = [key.rpartition(".")[2] for key in point]
    said = []
    for key, value in point.items():
        leaf = key.rpartition(".")[2]
        if key in ("strategy", MECHANISM):
            said.append(f"no privacy ({value})" if (key, value) == (MECHANISM, "none") else value)
        elif key == EPSILON:
            said.append(f"ε = {'∞' if value == 'inf' else value}")
        else:
            said.append(f"{leaf if leaves.count(leaf) == 1 else key} = {value.replace('|', ',')}")
    return ", ".join(said)
