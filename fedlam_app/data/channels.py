"""Channel sets made once and kept: generate on all cores, cache on disk, map into memory.

The bytes depend on the recipe (and the versions of Sionna and torch), never on the number of
processes. A set lives in ``<cache>/channels/<hash>/``: one ``.npy`` a field of :class:`ChannelSet`, and
``recipe.json`` with the recipe, library versions, and the size and SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlam_app.base.store import atomic_folder, sha256_of, write_json
from fedlam_app.data.channel_set import ChannelSet
from fedlam_app.data.drops import COLUMNS, ROWS, SCENARIOS, Recipe, drop_batch

__all__ = ["Recipe", "folder_of", "generate", "load_or_generate", "open_cached"]

FORMAT = 1
"""Counts changes of the generator or of the files; an old cache is then made again, not misread."""

BATCHES_PER_WORKER = 32
"""A worker spends about as long importing torch and Sionna as generating this many batches."""

FIELDS = tuple(field.name for field in fields(ChannelSet))


def load_or_generate(
    recipe: Recipe,
    cache: Path,
    workers: int | None = None,
    progress: bool = True,
    check_hashes: bool = False,
) -> ChannelSet:
    """Return the recipe's channels, read-only and memory-mapped, generating them if ``cache`` lacks them.

    ``workers`` processes generate (``None``: as many as pay for their start, at most one a core;
    1: this process). ``progress`` draws a bar on stderr. Sizes of cached files are always verified,
    their SHA-256 where ``check_hashes``. Raises ``ValueError`` where a cached file is damaged.
    """
    folder = folder_of(recipe, cache)
    if not (folder / "recipe.json").exists():
        with atomic_folder(folder) as temporary:
            generate(recipe, temporary, workers, progress)
    return open_cached(folder, check_hashes)


def folder_of(recipe: Recipe, cache: Path) -> Path:
    """Return the folder in which ``cache`` keeps the channels of this recipe."""
    return cache / "channels" / hashlib.sha256(json.dumps(_identity(recipe)).encode()).hexdigest()[:24]


def generate(recipe: Recipe, folder: Path, workers: int | None = None, progress: bool = False) -> None:
    """Generate the recipe's channels into an existing ``folder``; memory stays at a few batches."""
    users, antennas = recipe.users, 2 * ROWS * COLUMNS
    shapes: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
        "history": ((users, antennas, recipe.history_slots, recipe.subcarriers), np.complex64),
        "future": ((users, antennas, recipe.future_slots, recipe.subcarriers), np.complex64),
        "gain_db": ((users,), np.float32),
        "speed_kmh": ((users,), np.float32),
        "scenario": ((users,), f"<U{max(map(len, SCENARIOS))}"),
    }
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    for rows, batch in _batches(recipe, workers, progress):
        for name, file in files.items():
            file[rows] = getattr(batch, name)[: len(rows)]
    for file in files.values():
        file.flush()
    paths = [folder / f"{name}.npy" for name in FIELDS]
    write_json(
        folder / "recipe.json",
        {
            **_identity(recipe),
            "libraries": {name: version(name) for name in ("torch", "numpy")},
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths},
        },
    )


def open_cached(folder: Path, check_hashes: bool = False) -> ChannelSet:
    """Return the channels in a cache folder; ``ValueError`` where a file is not as ``recipe.json`` says."""
    listed = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["files"]
    for name, expected in listed.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != expected["bytes"]:
            damage = f"{name} has {found} bytes instead of {expected['bytes']}"
        elif check_hashes and sha256_of(path) != expected["sha256"]:
            damage = f"{name} has another SHA-256 than when it was written"
        else:
            continue
        raise ValueError(
            f"the channel cache {folder} is damaged ({damage}); delete the folder to make it again"
        )
    return ChannelSet(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS})


def _batches(
    recipe: Recipe, workers: int | None, progress: bool
) -> Iterator[tuple[npt.NDArray[np.intp], ChannelSet]]:
    """Yield every batch with the rows of its users; the last batch of a scenario has fewer rows."""
    from rich.console import Console
    from rich.progress import Progress

    scenarios = recipe.scenarios
    tasks, rows = [], []
    for position, scenario in enumerate(scenarios):
        own = np.arange(position, recipe.users, len(scenarios))
        for number, start in enumerate(range(0, len(own), recipe.batch)):
            tasks.append((recipe, scenario, number))
            rows.append(own[start : start + recipe.batch])
    count = _worker_count(len(tasks), workers)
    # Spawned, because a forked copy of a process that runs torch or Ray threads can deadlock.
    processes = ProcessPoolExecutor(count, mp_context=get_context("spawn")) if count > 1 else nullcontext()
    with (
        processes as pool,
        Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar,
    ):
        line = bar.add_task(f"generating {recipe.scenario} channels", total=recipe.users)
        columns = zip(*tasks, strict=True)
        results = pool.map(drop_batch, *columns) if pool else map(drop_batch, *columns)
        for own, batch in zip(rows, results, strict=True):
            yield own, batch
            bar.advance(line, len(own))


def _worker_count(batches: int, workers: int | None) -> int:
    """Return how many processes to use; more than one only where generating outweighs importing."""
    if workers is None:
        return max(1, min(_cores(), batches // BATCHES_PER_WORKER))
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return min(workers, batches)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(recipe: Recipe) -> dict[str, object]:
    """Return what names a cached set: the recipe, its format, and the generator whose draws it uses."""
    return {
        "format": FORMAT,
        "generator": f"sionna-no-rt {version('sionna-no-rt')}",
        "recipe": asdict(recipe),
    }
