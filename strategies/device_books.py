"""The server's ledgers of its devices, where whole devices are protected and the server adds the noise.

A book is opened with a device's first charge. Where everybody is charged in every step, by the chance of
having taken part, devices whose books say the same share one: a step of a hundred thousand devices costs as
many charges as there are budgets. Books are saved with the run's state. In ``privacy.ledgers`` they outlive
it, as files that are written before anything is released; of two copies the one that has spent more is true,
and runs that have one folder take turns. Without a folder a server that is killed forgets the round that it
was in: begun again it is the same release where the same devices answer, and one too many where others do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.store import atomic_file, cache_root, locked
from fedlam_app.config import RunConfig
from fedlam_app.privacy.accounting import EXACT, BudgetSpent, Ledger, Release, kept
from fedlam_app.privacy.noise import secret
from fedlam_app.tables.privacy import PrivacyConfig

Arrays = dict[str, NDArray[np.generic]]


class Books:
    """One ledger a device."""

    def __init__(self, privacy: PrivacyConfig, devices: Sequence[int], together: bool) -> None:
        """``together``: every release is charged to all who can pay."""
        self.privacy, self.devices, self.together = privacy, list(devices), together
        self.folder = Path(privacy.ledgers) if privacy.ledgers else None
        self.open: dict[int, Ledger] = {}
        found = {k: self._on_disk(k) for k in self.devices} if self.folder else {}
        texts = {k: ledger.to_json() for k, ledger in found.items() if ledger is not None}
        if together:
            blank = {b: self._blank(b).to_json() for b in set(map(privacy.budget, self.devices))}
            texts = {k: texts.get(k, blank[privacy.budget(k)]) for k in self.devices}
        self._take(texts)

    def of(self, device: int) -> Ledger:
        """Return a device's book; a blank one, which is not kept, where it has none yet."""
        return self.open[device] if device in self.open else self._blank(self.privacy.budget(device))

    def least_noise(self, q: float, events: int) -> float:
        """Return the least noise at which ``events`` fit into the rest of the largest finite budget.

        The noise is one for all; whoever has less to spend leaves sooner.
        """
        rest = {id(ledger): ledger for ledger in self.open.values()}.values()
        blank = {self.privacy.budget(k): None for k in self.devices if k not in self.open}
        found = [self._least(ledger, q, events) for ledger in (*rest, *map(self._blank, blank))]
        if not any(found):  # nothing is left anywhere, and nobody will take part: the noise of a first run
            finite = [self.privacy.budget(k) for k in self.devices if math.isfinite(self.privacy.budget(k))]
            found = [self._least(self._blank(budget), q, events) for budget in finite[:1]]
        return min((z for z in found if z), default=0.0)

    def cannot_pay(self, devices: Iterable[int], release: Release) -> set[int]:
        """Return who has not the budget for a release; whoever has paid for its group already, has."""
        known: dict[object, bool] = {}
        broke = set()
        for k in devices:
            ledger = self.open.get(k)
            key = self.privacy.budget(k) if ledger is None else id(ledger)
            if key not in known:
                book = self.of(k)
                paid = book.group == release.group and book.least_z <= release.z
                known[key] = not paid and book.after(release) > book.budget + EXACT
            if known[key]:
                broke.add(k)
        return broke

    def charge(self, devices: Collection[int], release: Release) -> dict[int, str]:
        """Write a release down for these devices, on the disk too; returns their books as JSON."""
        folder = self.folder
        with locked(folder) if folder else nullcontext():
            self._catch_up(devices)
            books = {k: self.open.setdefault(k, self.of(k)) for k in devices}
            for ledger in {id(book): book for book in books.values()}.values():
                ledger.charge(release)
            told = self.texts(devices)
            for k, text in told.items() if folder else ():
                with atomic_file(folder / f"{k}.json") as file:  # type: ignore[operator]
                    file.write_text(text, encoding="utf-8")
        return told

    def texts(self, devices: Iterable[int] | None = None) -> dict[int, str]:
        """Return books as JSON, of these devices or of all that have one."""
        own = {k: self.open[k] for k in (self.open if devices is None else devices)}
        said = {id(book): book.to_json() for book in {id(b): b for b in own.values()}.values()}
        return {k: said[id(book)] for k, book in own.items()}

    def state(self) -> Arrays:
        """Return the arrays that a resumed run continues from."""
        texts = self.texts()
        places = {text: place for place, text in enumerate(dict.fromkeys(texts.values()))}
        owners = [[k, places[text]] for k, text in texts.items()]
        return {
            "privacy.books": np.frombuffer(json.dumps(list(places)).encode(), np.uint8),
            "privacy.owners": np.array(owners, np.int64).reshape(-1, 2),  # (device, place of its book)
        }

    def load(self, state: Arrays) -> None:
        """Continue from :meth:`state`, and take what was its out of ``state``."""
        texts = json.loads(state.pop("privacy.books").tobytes())
        books = {k: texts[place] for k, place in state.pop("privacy.owners").tolist()}
        for k in self.devices if self.folder else ():
            found = self._on_disk(k)
            if found is not None and (k not in books or found.epsilon > Ledger.from_json(books[k]).epsilon):
                books[k] = found.to_json()
        self._take(books)

    # --- helpers ------------------------------------------------------------------------------------

    def _catch_up(self, devices: Collection[int]) -> None:
        """Take in what another experiment has written into these devices' books since."""
        if self.folder is None:
            return
        paths = {k: self.folder / f"{k}.json" for k in devices}
        mine = self.texts(k for k in devices if k in self.open)
        new = [k for k, path in paths.items() if path.is_file() and path.read_text("utf-8") != mine.get(k)]
        found = {k: ledger for k in new if (ledger := self._on_disk(k)) is not None}
        ahead = {k: ledger for k, ledger in found.items() if ledger.epsilon > self.of(k).epsilon}
        if ahead:
            self._take(self.texts() | {k: ledger.to_json() for k, ledger in ahead.items()})

    def _take(self, texts: Mapping[int, str]) -> None:
        """Open these books: one for all who share it where releases are charged together, else one each."""
        shared = {text: Ledger.from_json(text) for text in texts.values()} if self.together else {}
        self.open = {k: shared[text] if shared else Ledger.from_json(text) for k, text in texts.items()}

    def _blank(self, budget: float) -> Ledger:
        return Ledger(budget, self.privacy.delta)

    def _on_disk(self, device: int) -> Ledger | None:
        """Return the book that earlier runs left, at this run's budget."""
        assert self.folder is not None
        path, privacy = self.folder / f"{device}.json", self.privacy
        return kept(path, device, privacy.budget(device), privacy.delta)

    @staticmethod
    def _least(ledger: Ledger, q: float, events: int) -> float:
        try:
            return ledger.calibrate(q, events)
        except BudgetSpent:
            return 0.0


def server_secret(config: RunConfig) -> bytes:
    """Return the 32 bytes that the server's noise comes from."""
    return secret(config.privacy.randomness, config.seed, cache_root(config.data.cache) / "server")
