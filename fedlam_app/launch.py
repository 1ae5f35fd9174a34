"""Submission: from overrides on the command line to a Flower run that has really succeeded.

``flwr run`` is the interface; this module sets what it needs and closes its traps (flwr 1.41):

* it would build a new environment for every run, unless the local SuperLink was started with
  ``FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1``;
* it starts ``flower-superlink`` and friends by name, so the environment's ``bin`` must be on PATH;
* the app runs in another working directory, so paths are made absolute here;
* of two ``--run-config`` with keys of one table the first is lost, so all overrides go in one;
* ``--stream`` exits 0 on a failed run, so the run's status is asked for and decides the exit code;
* it gives its local SuperLink 15 s to start and 0.4 s to answer, which a busy machine may not keep: again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedlam_app import checks
from fedlam_app.base.axes import read_axes, write_axes
from fedlam_app.config import ConfigError, RunConfig, Scalar, defaults, flatten, parse, to_flat
from fedlam_app.experiments import track
from fedlam_app.rules import TEXT_SOURCES

PATH_KEYS = (
    *("results", "data.source", "data.test-source", "data.cache", "model.weights", "text.source"),
    *("fleet.capacity", "fleet.behaviour", "fleet.speeds", "privacy.ledgers"),
)
NO_INSTALL = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
_STARTED = re.compile(rb"Successfully started run (\d+)")
_STATUS_WAIT_S = 60.0
_NOT_UP = b"Failed to start local SuperLink"
_TRIES = 4


def read_overrides(texts: Sequence[str]) -> dict[str, Scalar]:
    """Return the keys of ``"k=v k2='v 2'"`` strings and ``file.toml`` paths, later ones winning.

    A value is TOML where it reads as a TOML scalar, and else a word as it stands:
    ``job=train`` needs no quotes.
    """
    flat: dict[str, Scalar] = {}
    for text in texts:
        if text.endswith(".toml") and "=" not in text:
            flat |= _read_toml(Path(text).expanduser())
            continue
        rest = re.sub(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)", "", text).strip()
        if rest:
            raise ConfigError(
                f"'{rest}' in --run-config is not a key=value; separate pairs by spaces, as in 'a=1 b=2'"
            )
        for key, value in re.findall(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)", text):
            flat[key] = _scalar(value)
    return flat


def resolve(overrides: Mapping[str, Scalar]) -> RunConfig:
    """Return the validated run with its paths absolute and its results folder chosen; touches no file.

    Without ``results`` a fresh run takes the first free of ~/fedlam-runs/<job>, <job>-2, ...; a resumed one
    the last that is taken. Raises ``ConfigError`` where the configuration or the folder is refused.
    """
    flat = dict(overrides)
    if "sweep.over" in flat:
        flat["sweep.over"] = _absolute_axes(str(flat["sweep.over"]))
    for key in PATH_KEYS:
        value = flat.get(key, "")
        if isinstance(value, str) and value and not _is_name(key, value):
            flat[key] = str(Path(value).expanduser().absolute())
    config = parse(flat)
    if not config.results:
        config = parse({**flat, "results": str(_next_folder(config.job, config.resume))})
    track.check(Path(config.results), config)
    checks.check(config)
    checks.check_files(config)
    return config


def app_folder(given: Path | None = None) -> Path:
    """Return the folder that Flower bundles: ``given``, or the checkout that this package runs from.

    Flower bundles a source folder, pyproject.toml beside the packages, so an installed wheel is no app:
    there, name a checkout.
    """
    folder = (given or Path(__file__).parent.parent).expanduser().resolve()
    if not (folder / "pyproject.toml").is_file() or not (folder / "fedlam_app" / "server_app.py").is_file():
        raise ConfigError(
            f"{folder} is no FedLAM checkout (pyproject.toml beside fedlam_app); name one with --app"
        )
    return folder


def command(app: Path, config: RunConfig) -> list[str]:
    """Return the ``flwr run`` command of a validated run, with the keys that differ from the defaults."""
    usual = defaults()
    changed = {key: value for key, value in to_flat(config).items() if value != usual[key]}
    nodes = config.federation.supernodes
    return [
        _executable("flwr"),
        "run",
        str(app),
        "--stream",
        "--run-config",
        " ".join(f"{key}={_quoted(key, value)}" for key, value in changed.items()),
        "--federation-config",
        f"num-supernodes={nodes} client-resources-num-cpus=1",
    ]


def environment() -> dict[str, str]:
    """Return this process's environment with what ``flwr`` needs."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return os.environ | {NO_INSTALL: "1", "PYTHONUNBUFFERED": "1", "PATH": os.pathsep.join(folders)}


def submit(app: Path, config: RunConfig, say: Callable[[str], None] = print) -> int:
    """Run to the end, streaming Flower's log as it comes; return 0 only where the run completed.

    An interrupt (Ctrl-C) stops the run in the SuperLink too, and returns 130.
    """
    started: list[int] = []
    try:
        code = _run(app, config, started, say)
        if not started:
            say(f"flwr run did not start (exit code {code}); `fedlam doctor` looks for the usual reasons")
            return code or 1
        status, details = wait_for_status(started[0])
    except KeyboardInterrupt:
        if started:
            _flwr("stop", str(started[0]))
            again = "sweep AXES" if config.job == "sweep" else "run"
            again = f"fedlam {again} --resume --results {config.results}"
            say(f"stopped run {started[0]}; continue it with: {again}")
        return 130
    if status == "finished:completed":
        return 0
    say(f"run {started[0]} is {status}: {details}")
    return 1


def wait_for_status(run_id: int, patience_s: float = _STATUS_WAIT_S) -> tuple[str, str]:
    """Return (status, details) of a run once it has finished, or its last status after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        status, details = status_of(_flwr("list", "--run-id", str(run_id), "--format", "json"), run_id)
        if status.startswith("finished") or time.monotonic() > deadline:
            return status, details
        time.sleep(1.0)


def status_of(text: str, run_id: int) -> tuple[str, str]:
    """Return (status, details) from the JSON of ``flwr list``; ('unknown', why) without such a run."""
    try:
        answer = json.loads(text)
        runs = {int(run["run-id"]): run for run in answer["runs"]}
        return str(runs[run_id]["status"]), str(runs[run_id]["status-details"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return "unknown", f"`flwr list` answered {text.strip()[:200] or 'nothing'!r}"


def _run(app: Path, config: RunConfig, started: list[int], say: Callable[[str], None]) -> int:
    """Run ``flwr run`` to its end, again where its SuperLink was not up in time; return its exit code."""
    left = _TRIES
    while True:
        process = subprocess.Popen(
            command(app, config), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            said = _relay(process, started)
        finally:
            code = process.wait()  # after an interrupt too: it has heard it as well
        left -= 1
        if started or left == 0 or _NOT_UP not in said:
            return code
        say("the local SuperLink was not up in time; trying again")


def _relay(process: subprocess.Popen[bytes], started: list[int]) -> bytes:
    """Copy a process's output to ours as it comes, byte for byte; add its run id to ``started``.

    Returns what was said until the run started.
    """
    assert process.stdout is not None
    seen = b""
    while chunk := os.read(process.stdout.fileno(), 65536):
        if not started:  # noted before it is shown: whoever sees it may interrupt
            seen += chunk
            if (found := _STARTED.search(seen)) and found.end() < len(seen):
                started.append(int(found[1]))
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return seen


def _flwr(*words: str) -> str:
    done = subprocess.run(
        [_executable("flwr"), *words], env=environment(), capture_output=True, text=True, check=False
    )
    return done.stdout


def _executable(name: str) -> str:
    """The program of this Python's environment, and not another that PATH would find first."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(
            f"'{name}' is not installed beside {sys.executable}; install FedLAM with `make run`"
        )
    return found


def _is_name(key: str, value: str) -> bool:
    """Whether a source is a name; for texts, a word that is no file may be a slip in one."""
    if key == "data.source":
        return value == "sionna"
    if key != "text.source":
        return False
    slip = Path(value).name == value and not Path(value).suffix and not Path(value).expanduser().exists()
    return value in TEXT_SOURCES or value.startswith("hub:") or slip


def _absolute_axes(text: str) -> str:
    """Make the paths among a sweep's values absolute; what is no sweep stays, to be refused."""
    try:
        axes = read_axes(text)
    except ValueError:
        return text
    for key in axes.keys() & set(PATH_KEYS):
        axes[key] = tuple(
            value if _is_name(key, value) else str(Path(value).expanduser().absolute()) for value in axes[key]
        )
    return write_axes(axes)


def _next_folder(job: str, resume: bool) -> Path:
    base = Path.home() / "fedlam-runs"
    number, last = 1, base / job
    while True:
        folder = base / (job if number == 1 else f"{job}-{number}")
        if not folder.exists() or not any(folder.iterdir()):
            return last if resume else folder
        number, last = number + 1, folder


def _read_toml(path: Path) -> dict[str, Scalar]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--run-config {path} cannot be read ({error}); it must be a TOML file") from None
    flat = flatten(table)
    for key, value in flat.items():
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"'{key}' in {path} is a {type(value).__name__}; lists are comma-separated strings"
            )
    return flat  # type: ignore[return-value]


def _scalar(text: str) -> Scalar:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _quoted(key: str, value: Scalar) -> str:
    """Render a value as Flower's ``--run-config`` reads it: TOML, without the escapes that it cannot see."""
    if isinstance(value, str):
        quote = '"' if '"' not in value and "\\" not in value else "'"
        if quote in value or "\n" in value:
            raise ConfigError(
                f"'{key}' = {value!r} cannot be passed on; it must not mix quotes, or break lines"
            )
        return f"{quote}{value}{quote}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def shown(words: Iterable[str]) -> str:
    """Return a command as one would type it."""
    import shlex

    return shlex.join(words)
