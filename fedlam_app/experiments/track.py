"""A run's folder: what was asked, what was measured, and what a killed run needs to go on.

    config.json        resolved configuration, versions, machine, commit; written once
    metrics.jsonl      one JSON object a line, flushed as it is written; the only source of plots and tables
    state/NAME.safetensors   arrays and a little JSON, replaced atomically: always a whole round, never half
    privacy/NAME.json        what was promised, and every device's ledger as the server last heard of it
    plots/, report.html, adapter/   made at the end by others

A record has at least ``cell`` (which experiment of the run, such as 'fed-10'), ``label`` (the same for
people), ``seed``, ``key`` (cell and seed in one word) and ``round``; the last one of a key has ``kind =
'final'``. A folder belongs to one configuration: another one is refused, so nothing that was saved is ever
mixed or lost. A sweep alone may grow: into more values of its axes, with all else equal. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base import machine
from fedlam_app.base.plain import plain
from fedlam_app.base.store import atomic_file, write_json
from fedlam_app.config import ConfigError, RunConfig, Scalar, identity, results_folder, to_flat
from fedlam_app.experiments.cells import cells_of

Metrics = dict[str, Any]

CONFIG, METRICS, STATE = "config.json", "metrics.jsonl", "state"
PRIVACY = "privacy"
_OVER = "sweep.over"


class RunFolder:
    """An open run folder; create it with :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, config: RunConfig) -> RunFolder:
        """Create the folder of ``config``, or open it to resume.

        A fresh run takes a folder that is absent or empty, or that holds this very configuration without
        one saved record. Anything else is left alone: ``ConfigError``.
        """
        path = results_folder(config)
        check(path, config)
        folder = cls(path)
        if (path / CONFIG).is_file() and _grown(path, config):
            about = folder.config()
            saved = {**_saved_config(path), _OVER: config.sweep.over}
            write_json(path / CONFIG, {**about, "config": saved})
        if not (path / CONFIG).is_file():
            write_json(
                path / CONFIG,
                {
                    "config": to_flat(config),
                    "versions": machine.versions(),
                    "machine": machine.processor(),
                    "commit": machine.commit(Path(__file__).parent),
                },
            )
        folder._drop_torn_line()
        return folder

    def config(self) -> dict[str, object]:
        """Return ``config.json``: the keys config, versions, machine, commit."""
        return _read_config(self.path)

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Append one record as one line of strict JSON, flushed; NaN and infinities become null."""
        line = json.dumps(plain(record), allow_nan=False, ensure_ascii=False)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read_metrics(self) -> list[Metrics]:
        """Return every whole record, in the order of writing."""
        return read_metrics(self.path)

    def drop_after(self, key: str, round: int) -> None:
        """Forget the records of ``key`` after ``round``, and its final one: they are measured again."""
        kept = [
            record
            for record in self.read_metrics()
            if _key_of(record) != key or (record.get("kind") != "final" and record["round"] <= round)
        ]
        with atomic_file(self.path / METRICS) as temporary:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
            temporary.write_text("".join(lines), encoding="utf-8")

    def finished(self, key: str) -> bool:
        """Whether ``key`` has its final record: a resumed run skips it."""
        return any(record.get("kind") == "final" and _key_of(record) == key for record in self.read_metrics())

    def save_state(
        self, name: str, arrays: Mapping[str, NDArray[np.generic]], meta: Mapping[str, object]
    ) -> Path:
        """Replace ``state/<name>.safetensors`` atomically by ``arrays`` and the JSON ``meta``."""
        from safetensors.numpy import save_file

        path = self.path / STATE / f"{name}.safetensors"
        with atomic_file(path) as temporary:
            whole = {key: np.asarray(array, order="C") for key, array in arrays.items()}
            save_file(whole, temporary, metadata={"meta": json.dumps(plain(meta))})
        return path

    def save_privacy(self, name: str, book: Mapping[str, object]) -> None:
        """Replace ``privacy/<name>.json``: what an experiment promises, and its devices' ledgers."""
        write_json(self.path / PRIVACY / f"{name}.json", book)

    def load_state(self, name: str) -> tuple[dict[str, NDArray[np.generic]], Metrics] | None:
        """Return (arrays, meta) as they were saved, or ``None`` where nothing was."""
        from safetensors import safe_open

        path = self.path / STATE / f"{name}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            return arrays, json.loads(file.metadata()["meta"])

    def _drop_torn_line(self) -> None:
        """A kill in the middle of a write leaves half a line at the end: cut it off."""
        path = self.path / METRICS
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)


def check(path: Path, config: RunConfig) -> None:
    """Raise ``ConfigError`` unless ``config`` may write into ``path``; touches nothing."""
    if config.resume and not (path / CONFIG).is_file():
        raise ConfigError(
            f"'resume' = true needs a run to resume, and {path} holds none (it has no {CONFIG})"
        )
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"'results' = '{path}' holds files that are not a run's; it must be empty or not exist yet"
        )
    saved = _saved_config(path)
    ours = to_flat(config)
    differing = [
        key
        for key in {**identity(ours), **identity(saved)}
        if key not in saved or key not in ours or saved[key] != ours[key]
    ]
    if differing:
        key, count = differing[0], f"{len(differing)} key{'s'[: len(differing) > 1]}"
        raise ConfigError(
            f"'results' = '{path}' holds another run: its '{key}' is {saved.get(key)!r} and this one's is"
            f" {ours.get(key)!r} ({count} in all); name an empty folder, or resume it with its own keys"
        )
    if not _grown(path, config) and not config.resume and read_metrics(path):
        raise ConfigError(
            f"'results' = '{path}' already holds this run's results; continue it with resume = true,"
            " or name an empty folder"
        )


def _grown(path: Path, config: RunConfig) -> bool:
    """Whether a sweep has cells that the one in ``path`` has not; ``ConfigError`` where it lacks one."""
    over = str(_saved_config(path).get(_OVER, ""))
    if config.job != "sweep" or over == config.sweep.over:
        return False
    before = config.model_copy(update={"sweep": config.sweep.model_copy(update={"over": over})})
    ours = {cell.key for cell in cells_of(config)}
    had = {cell.key: cell.label for cell in cells_of(before)}
    lost = [label for key, label in had.items() if key not in ours]
    if lost:
        raise ConfigError(
            f"'results' = '{path}' holds a sweep over '{over}', of which this one has no '{lost[0]}'"
            f" ({len(lost)} in all); a sweep may grow there, or take an empty folder"
        )
    return len(ours) > len(had)


def read_metrics(path: Path) -> list[Metrics]:
    """Return every whole record of a run folder: a torn last line is skipped, any other is an error."""
    file = path / METRICS
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn, or empty
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: not JSON ({error.msg}); a record must be one line"
            ) from None
    return records


def _read_config(path: Path) -> dict[str, object]:
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path / CONFIG} cannot be read ({error}); it must be a run folder's") from None


def _saved_config(path: Path) -> dict[str, Scalar]:
    saved = _read_config(path).get("config")
    if not isinstance(saved, dict):
        raise ConfigError(f"{path / CONFIG} has no table 'config'; it must be a run folder's")
    return saved


def _key_of(record: Metrics) -> object:
    """A record belongs to its ``key`` (cell and seed), or to its cell where a run has one seed."""
    return record.get("key", record.get("cell"))
