"""Measured devices: readers of FedScale's capacity and behaviour files and of FLASH's speed file.

    capacity    {id: {computation: ms a sample, communication: kb/s}}
    behaviour   {id: {active: [s], inactive: [s], finish_time: s, model}}  on from active[i] to inactive[i]
    speeds      {id: {down_u, down_sigma, up_u, up_sigma}}  kB/s: mean and standard deviation of a user's WiFi

F. Lai et al., "FedScale: Benchmarking Model and System Performance of Federated Learning at Scale", ICML
2022, arXiv:2105.11367; C. Yang et al., "Characterizing Impacts of Heterogeneity in Federated Learning upon
Large-Scale Smartphone Data", WWW 2021, arXiv:2006.06983 (FLASH). All may be JSON or pickle. A pickle may name
any function to call when it is read; here one that names anything at all is refused, which leaves
dictionaries, lists, tuples, strings and numbers. Every bad file is one sentence (``ValueError``).
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
_BAD_PICKLE = (EOFError, AttributeError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """T traces, one after the other: trace r toggles at ``edges_s[first[r]:first[r + 1]]``, first to on."""

    edges_s: Doubles  # (E,)
    first: NDArray[np.int64]  # (T + 1,)
    finish_s: Doubles  # (T,) when it starts again


def read_capacity(path: str) -> tuple[Doubles, Doubles]:
    """Return computation [ms a sample] and communication [kb/s] of the file's D devices, (D,) each."""
    key = "fleet.capacity"
    rows = [_numbers(entry, ("computation", "communication"), key, path) for entry in _entries(path, key)]
    table = np.array(rows)
    _above_zero(table, key, path)
    return table[:, 0], table[:, 1]


def read_speeds(path: str) -> tuple[Doubles, Doubles]:
    """Return means and standard deviations [b/s] of the file's D users, (D, 2) each: up, down."""
    key = "fleet.speeds"
    names = ("up_u", "down_u", "up_sigma", "down_sigma")
    table = np.array([_numbers(entry, names, key, path) for entry in _entries(path, key)])
    _above_zero(table[:, :2], key, path)
    if (table[:, 2:] < 0).any():
        raise ValueError(f"{key} = '{path}' has a negative standard deviation")
    return table[:, :2] * 8e3, table[:, 2:] * 8e3


def read_behaviour(path: str) -> Behaviour:
    """Return the file's traces; sessions that touch or overlap are one."""
    key = "fleet.behaviour"
    edges: list[Doubles] = []
    finishes: list[float] = []
    for entry in _entries(path, key):
        (finish,) = _numbers(entry, ("finish_time",), key, path)
        starts, ends = (_list(entry, name, key, path) for name in ("active", "inactive"))
        fits = len(starts) == len(ends) and (starts <= ends).all() and (np.diff(starts) >= 0).all()
        if not (fits and finish > 0 and (starts >= 0).all() and (ends <= finish).all()):
            raise ValueError(
                f"{key} = '{path}' has a trace that is not in order: as many 'inactive' as 'active', each"
                " 'active' before its 'inactive', ascending, between 0 and a positive 'finish_time'"
            )
        edges.append(_joined(starts, ends))
        finishes.append(finish)
    first = np.cumsum([0, *(len(trace) for trace in edges)])
    return Behaviour(np.concatenate(edges), first.astype(np.int64), np.array(finishes))


def deal(devices: int, entries: int, draw: np.random.Generator) -> NDArray[np.int32]:
    """Return which of a file's entries each device gets (N,): all equally often, in an order drawn."""
    order = draw.permutation(devices)
    return (order % entries).astype(np.int32)


class _Plain(pickle.Unpickler):
    """Reads containers, strings and numbers, and refuses whatever names a class or a function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _entries(path: str, key: str) -> Iterable[dict[str, Any]]:
    """Return the values of the dictionary in a JSON or pickle file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{key} = '{path}' cannot be read: {error.strerror}") from error
    try:
        if content.lstrip()[:1] in (b"{", b"["):
            found = json.loads(content)
        else:
            found = _Plain(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, ValueError, RecursionError, *_BAD_PICKLE) as error:
        raise ValueError(
            f"{key} = '{path}' is neither JSON nor a pickle of plain containers and numbers: {error}"
        ) from error
    if not isinstance(found, dict) or not found or not all(isinstance(e, dict) for e in found.values()):
        raise ValueError(f"{key} = '{path}' must hold a dictionary of at least one id to a dictionary")
    return list(found.values())


def _numbers(entry: dict[str, Any], names: tuple[str, ...], key: str, path: str) -> list[float]:
    values = [entry.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(
                f"{key} = '{path}' has an entry whose '{name}' is {value!r}; it must be a number"
            )
    return [float(value) for value in values if value is not None]


def _list(entry: dict[str, Any], name: str, key: str, path: str) -> Doubles:
    values = entry.get(name)
    if not isinstance(values, list | tuple):
        raise ValueError(f"{key} = '{path}' has an entry whose '{name}' is {values!r}; it must be a list")
    if not all(isinstance(value, int | float) and np.isfinite(value) for value in values):
        raise ValueError(f"{key} = '{path}' has an entry whose '{name}' holds something that is no number")
    return np.array(values, np.float64)


def _above_zero(table: Doubles, key: str, path: str) -> None:
    if not (table > 0).all():
        raise ValueError(f"{key} = '{path}' has the number {table[table <= 0][0]:g} where it must be above 0")


def _joined(starts: Doubles, ends: Doubles) -> Doubles:
    """Return the edges of ascending sessions, those that touch joined, and those of no length left out."""
    edges: list[float] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if edges and start <= edges[-1]:
            edges[-1] = max(edges[-1], end)
        elif end > start:
            edges += [start, end]
    return np.array(edges, np.float64)
