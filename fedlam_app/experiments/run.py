"""Run the cells of a job on one warm federation: train, evaluate, record, save, resume.

Cells do not depend on each other, and a cell with one device keeps only one worker busy, so a few run
side by side; their numbers do not depend on that. A round is saved after its record is written: a run
that is killed between the two measures that round again, and gets the same numbers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.registry import pick
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.experiments import views
from fedlam_app.experiments.cells import Cell
from fedlam_app.experiments.federate import federate
from fedlam_app.experiments.progress import Progress
from fedlam_app.experiments.track import RunFolder
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.privacy.membership import loss_threshold
from fedlam_app.privacy.statement import statement
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.base import Task
from strategies.base import Cost, Federation, Grid

ALL_ANTENNAS = 0
ATTACKED = ("text-classification", "mixture")  # tasks whose rows are samples, the loss first
Say = Callable[[str], None]


def run_cells(
    grid: Grid,
    base: Mapping[str, Scalar],
    cells: Sequence[Cell],
    folder: RunFolder,
    side_by_side: int,
    say: Say,
) -> None:
    """Run every cell that ``folder`` has no final record of; the first failure stops the run."""
    lock = threading.Lock()
    pending = [cell for cell in cells if not folder.finished(cell.key)]
    runs = [_Run(grid, base, cell, folder, lock, say) for cell in pending]
    progress = Progress(sum(run.device_rounds * run.config.train.rounds for run in runs))
    with ThreadPoolExecutor(max(1, side_by_side), thread_name_prefix="cell") as pool:
        futures = [pool.submit(run.run, progress) for run in runs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass
class Totals:
    """What a cell has cost so far; saved with its state, so that a resumed run goes on counting."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    overhead_s: float = 0.0  # wall time of exchanges beyond the slowest SuperNode's work
    failures: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    peak_rss_bytes: int = 0

    def charge(self, cost: Cost, wall_s: float) -> None:
        """Add a round or an evaluation."""
        self.wall_s += wall_s
        self.cpu_s += cost.cpu_s
        self.server_cpu_s += cost.server_cpu_s
        self.overhead_s += cost.exchange_s - cost.waited_s
        self.failures += len(cost.failures)
        self.bytes_up += cost.bytes_up
        self.bytes_down += cost.bytes_down
        self.peak_rss_bytes = max(self.peak_rss_bytes, cost.peak_rss_bytes)


class _Run:
    """One cell on its way: its task, its totals and its records."""

    def __init__(
        self,
        grid: Grid,
        base: Mapping[str, Scalar],
        cell: Cell,
        folder: RunFolder,
        lock: threading.Lock,
        say: Say,
    ) -> None:
        self.grid, self.cell, self.folder, self.lock, self.say = grid, cell, folder, lock, say
        self.config: RunConfig = parse({**base, **cell.overrides})
        self.totals = Totals()

    @property
    def device_rounds(self) -> int:
        """What a round of this cell costs, in rounds of one device; nothing without training."""
        return 0 if self.cell.classical else self.config.train.devices

    def run(self, progress: Progress) -> None:
        """Produce the cell's records, from where the folder's state ends."""
        self.progress = progress
        self.task: Task = pick(TASKS, self.config.task, "task")(self.config)
        if self.cell.classical:
            wall_s, cpu_s = time.monotonic(), time.thread_time()
            scores = self.task.baseline(self.cell.classical)
            self.totals.charge(Cost(cpu_s=time.thread_time() - cpu_s), time.monotonic() - wall_s)
            self._record(0, {**scores, "kind": "final"})
        else:
            self._train()

    def _train(self) -> None:
        config = self.config
        with self.lock:  # torch's generator is one for all threads: two models built at once would mix draws
            model = self.task.build_model()
            share = model.trainable_share()  # and a fleet counts a model's cost
            federation = federate(config, json.dumps(self.cell.overrides, sort_keys=True), self.task, model)
        done = self._resume(federation)
        self.progress.advance(max(done, 0) * self.device_rounds)
        if done < 0:
            self._record(0, self._evaluate(federation, last=False))
            self._save(federation, 0)
        for round in range(max(done, 0) + 1, config.train.rounds + 1):
            started = time.monotonic()
            cost = federation.train_round(self.grid, round)
            self.totals.charge(cost, time.monotonic() - started)
            self.progress.advance(self.device_rounds)
            last = round == config.train.rounds
            if last or round % config.train.evaluate_every == 0:
                scores = self._evaluate(federation, last)
                own = {"own_loss": federation.loss, "failures": self.totals.failures}
                own |= self._spent(federation)
                own |= {"seconds": federation.seconds(), **federation.hands.participation.summary()}
                final = {"kind": "final", "trainable_share": share} if last else {}
                self._record(round, {**scores, **own, **final})
            self._save(federation, round)

    def _evaluate(self, federation: Federation, last: bool) -> dict[str, Any]:
        """Score the current models: the global loss over all shards, and the held-out users."""
        models = len(federation.algorithm.models())
        some = self.config.train.evaluate_antennas
        # All antennas give the spectral efficiency too; one model a device would make that dear.
        antennas = {"train": some, "test": ALL_ANTENNAS if last and models == 1 else some}
        scores: list[dict[str, Any]] = []
        losses: list[list[NDArray[np.float64]]] = []  # of members, then of non-members, a model each
        for split, count in antennas.items():
            started = time.monotonic()
            tables = federation.evaluate(self.grid, self.task.chunks(split), count)
            self.totals.charge(federation.cost, time.monotonic() - started)
            scores = scores or [{} for _ in tables]
            losses.append([table[:, 0] for table in tables])
            for score, table in zip(scores, tables, strict=True):
                score.update(self.task.metrics(split, table))
        if self.config.task in ATTACKED:
            for score, members, others in zip(scores, *losses, strict=True):
                attack = loss_threshold(members, others)
                score.update({f"attack_{key}": value for key, value in asdict(attack).items()})
        if len(scores) == 1:
            return scores[0]
        keys = views.mean_keys(self.config.task)
        return {**_mean(scores), **{f"{key}_each": [score[key] for score in scores] for key in keys}}

    def _record(self, round: int, scores: Mapping[str, Any]) -> None:
        cell = self.cell
        record = {"key": cell.key, "cell": cell.name, "label": cell.label, "seed": cell.seed, "round": round}
        record |= {"task": self.config.task} | ({"axes": cell.axes} if cell.axes else {})
        with self.lock:
            self.folder.append_metrics({**record, **scores, **asdict(self.totals)})
        said = views.line(self.config.task, scores)
        self.say(f"[{self.progress.text()}] {cell.label}, seed {cell.seed}: round {round}, {said}")

    def _spent(self, federation: Federation) -> dict[str, float]:
        """Return the largest epsilon that a device has spent, where any is."""
        found = [Ledger.from_json(text).epsilon for text in federation.ledgers.values() if text]
        return {"epsilon": max(found)} if found else {}

    def _save(self, federation: Federation, round: int) -> None:
        meta = {"round": round, "totals": asdict(self.totals)}
        if (promised := statement(self.config)) is not None:
            books = {str(k): json.loads(text) for k, text in sorted(federation.ledgers.items()) if text}
            self.folder.save_privacy(self.cell.key, {"statement": promised.record(), "ledgers": books})
        self.folder.save_state(self.cell.key, federation.state(), meta)

    def _resume(self, federation: Federation) -> int:
        """Load the last saved round and forget records after it; -1 where there is none."""
        state = self.folder.load_state(self.cell.key)
        round = -1
        if state is not None:
            arrays, meta = state
            federation.load(arrays)
            round, self.totals = int(meta["round"]), Totals(**meta["totals"])
        with self.lock:
            self.folder.drop_after(self.cell.key, round)
        return round


def _mean(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average every metric over models, in dB where it is in dB, through lists and tables alike."""
    first = scores[0]
    return {key: _average([score[key] for score in scores]) for key in first}


def _average(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _average([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [_average(list(column)) for column in zip(*values, strict=True)]
    return float(np.mean(values))
