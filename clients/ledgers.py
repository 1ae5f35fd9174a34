"""The ledgers of a site's devices: files beside what the devices remember, and in Flower's client state.

A spend is on the disk before its release leaves the device. A ledger lies in the experiment's own folder, or
in ``privacy.ledgers``, where it outlives the run: there, what earlier runs spent on the same data counts.
Flower keeps a copy in the SuperNode's state; of two copies the one that has spent more is the true one.
In the experiment's own folder lies each device's noise too: it is found once, since what earlier runs have
spent can be told from the ledger only at first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedlam_app.base.store import atomic_file, locked, write_json
from fedlam_app.config import RunConfig
from fedlam_app.privacy.accounting import BudgetSpent, Ledger, Release, kept
from fedlam_app.privacy.noise import Stream, secret


class Ledgers:
    """The books of one experiment's devices, and the secret that their noise comes from."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """``folder`` is the experiment's own, for what its devices remember."""
        own = config.privacy.ledgers
        self.config, self.folder = config, Path(own) if own else folder / "ledgers"
        self._noise, self._secret_at = folder / "noise", folder.parent
        self._secret = b""

    def of(self, device: int) -> Ledger:
        """Return a device's book as it is on the disk; its budget is the configuration's."""
        privacy = self.config.privacy
        budget, delta = privacy.budget(device), privacy.delta
        return kept(self._path(device), device, budget, delta) or Ledger(budget, delta)

    def planned(self, device: int, q: float, events: int) -> float:
        """Return the noise at which so many events at rate ``q`` fit into the rest of a device's budget.

        It is that of the first call for ever after. ``BudgetSpent`` where nothing is left.
        """
        path = self._noise / f"{device}.json"
        if not path.is_file():
            write_json(path, {"z": self.of(device).calibrate(q, events), "q": q, "events": events})
        return float(json.loads(path.read_text(encoding="utf-8"))["z"])

    def charge(self, device: int, release: Release) -> None:
        """Write a release down, before it is made; ``BudgetSpent`` names the device, and nothing is spent."""
        with locked(self.folder):  # another experiment may have the same book
            ledger = self.of(device)
            try:
                ledger.charge(release)
            except BudgetSpent as error:
                raise BudgetSpent(f"device {device}: {error}") from None
            self._save(device, ledger)

    def stream(self, device: int, *key: int | str) -> Stream:
        """Return a device's own noise under a key, which must name all that the noise is added to."""
        privacy = self.config.privacy
        self._secret = self._secret or secret(privacy.randomness, self.config.seed, self._secret_at)
        return Stream(self._secret, device, *key)

    def snapshot(self, devices: list[int]) -> dict[str, str]:
        """Return devices' books as JSON, by the device's name: what Flower's client state keeps."""
        return {str(k): self._path(k).read_text(encoding="utf-8") for k in devices if self._path(k).is_file()}

    def restore(self, books: Mapping[str, str]) -> None:
        """Take in a snapshot: whose copy has spent more than the disk's, wins."""
        with locked(self.folder):
            for name, text in books.items():
                theirs, device = Ledger.from_json(text), int(name)
                if theirs.epsilon > self.of(device).epsilon:
                    self._save(device, theirs)

    def _path(self, device: int) -> Path:
        return self.folder / f"{device}.json"

    def _save(self, device: int, ledger: Ledger) -> None:
        with atomic_file(self._path(device)) as file:
            file.write_text(ledger.to_json(), encoding="utf-8")
