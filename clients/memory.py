"""What a device remembers between its rounds, and what all of them were told to keep: files of its own.

A device's memory (its head, a part that it keeps, what a sparse link still owes) has a version, named by the
step that made it. The server says which version its last word from the device made; the device goes on from
that one. So a reply that was lost on the way rolls the device back; and a resumed run, which begins with a
round, finds every device where its server left off. Kept are the last two versions and the one that the
round began with. Version 0 is a device that starts.

The folder is ``$FEDLAM_DEVICES``, or ``devices`` in the cache: local to each site of a real federation,
shared by the workers of a simulation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.store import atomic_file, cache_root
from fedlam_app.config import RunConfig, identity, to_flat

Arrays = dict[str, NDArray[np.generic]]


class Memory:
    """The devices of one experiment."""

    def __init__(self, config: RunConfig) -> None:
        root = os.environ.get("FEDLAM_DEVICES")
        # A run is its configuration and its folder: the same configuration run again is another run.
        key = json.dumps([identity(to_flat(config)), config.results], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder = (Path(root) if root else cache_root(config.data.cache) / "devices") / name

    def load(self, device: int, version: int) -> Arrays:
        """Return a device's arrays at a version; empty for a device that starts.

        A version that is not there raises ``ValueError``: another disk, or a folder that was emptied.
        """
        from safetensors.numpy import load_file

        if version == 0:
            return {}
        path = self._path(device, version)
        if not path.is_file():
            raise ValueError(
                f"device {device} has lost what it knew after step {version} ({path} is missing)"
            )
        return dict(load_file(path))

    def save(
        self,
        device: int,
        version: int,
        arrays: Mapping[str, NDArray[np.generic]],
        parent: int,
        before: int = 0,
    ) -> None:
        """Keep a device's arrays as ``version``, beside the one they came from.

        Versions up to ``before`` are of earlier rounds: the one that this round began with stays too.
        """
        from safetensors.numpy import save

        path = self._path(device, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A round's first version left no other of an earlier round than the one that it came from.
        old = [
            file
            for file in path.parent.glob("*.safetensors")
            if (number := int(file.stem)) not in (version, parent) and not number <= before < parent
        ]
        # What is no longer needed is written over: on many file systems that is cheaper than a new file.
        spare = path.with_suffix(".writing")
        if old:
            old[0].replace(spare)
        with spare.open("r+b" if old else "wb") as stream:
            stream.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
            stream.truncate()
        spare.replace(path)
        for file in old[1:]:
            file.unlink(missing_ok=True)

    def _path(self, device: int, version: int) -> Path:
        return self.folder / str(device) / f"{version}.safetensors"


class Kept:
    """The entries that every device was told to keep, in the order in which they were broadcast."""

    def __init__(self, memory: Memory) -> None:
        self.folder = memory.folder / "entries"

    def add(self, number: int, kind: str, rank: int, vector: NDArray[np.float32]) -> None:
        """Keep entry ``number``; a newer one of the same number takes its place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / f"{number}.npz") as file, file.open("wb") as stream:
            np.savez(stream, kind=kind, rank=rank, vector=vector)

    def get(self, number: int) -> tuple[str, int, NDArray[np.float32]]:
        """Return (kind, rank, factors) of entry ``number``."""
        path = self.folder / f"{number}.npz"
        if not path.is_file():
            raise ValueError(f"this site has lost entry {number} that it was told to keep ({path})")
        with np.load(path) as file:
            return str(file["kind"]), int(file["rank"]), file["vector"]
