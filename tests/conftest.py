"""What every test shares: one torch thread, a home of its own, and the way to data outside the tree."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported anywhere: tests are many and small, and run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("fedlam", deadline=None, derandomize=True)
settings.load_profile("fedlam")


@pytest.fixture(autouse=True)
def devices(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of its own for the devices of every test."""
    monkeypatch.setenv("FEDLAM_DEVICES", str(tmp_path_factory.mktemp("devices")))


@pytest.fixture
def shared_data() -> Path:
    """The folder of measured channels, or a skip that says how to get it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDLAM_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no channels of others in {folder}; set FEDLAM_SHARED_DATA")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, so that no test meets the user's runs, caches or Flower."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("FEDLAM_CACHE", str(folder / "cache"))
    monkeypatch.setenv("FLWR_HOME", str(folder / ".flwr"))
    return folder
