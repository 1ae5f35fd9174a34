"""What a device has done in its last secure aggregations: on its disk before anything leaves the device.

A session is done once. Asked again in the same words a device answers again, bit for bit (a reply may be lost
on the way); asked for something else it refuses: a second update under the same masks would show the
difference of the two, and a second opening the other secret of a peer. A round that is begun again is a
session of another name.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedlam_app.base.store import atomic_file

SESSIONS = 64  # that are remembered


class Refused(ValueError):
    """What a device will not do."""


class Done:
    """One device's, in one session: digests by what they are of."""

    def __init__(self, path: Path, session: str) -> None:
        self._path = path
        self._all: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self._own = self._all.setdefault(session, {})

    def once(self, **said: str) -> None:
        """Note what is about to be done; ``Refused`` where the session has had it done otherwise."""
        for name, what in said.items():
            if self._own.get(name, what) != what:
                raise Refused(f"it has answered otherwise in this session already ({name})")
        if said.items() <= self._own.items():
            return
        self._own.update(said)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path) as file:
            file.write_text(json.dumps(dict(list(self._all.items())[-SESSIONS:])), encoding="utf-8")

    def must(self, **said: str) -> None:
        """``Refused`` where the session has not had exactly this done."""
        for name, what in said.items():
            if self._own.get(name) != what:
                raise Refused(f"it has done nothing of the kind in this session ({name})")
