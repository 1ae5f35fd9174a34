"""What a figure depends on besides the code: versions, processor, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fedlam", "flwr", "ray", "torch", "transformers", "peft", "sionna-no-rt", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a number."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def processor() -> dict[str, object]:
    """Return the processor's name, its cores, the system and the threads that were asked for."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def commit(folder: Path) -> str:
    """Return the commit that ``folder`` is at, with ``+`` where files changed since; empty outside git."""
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    return head + "+" if head and _git(folder, "status", "--porcelain", "--untracked-files=no") else head


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""  # no git on this machine
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
