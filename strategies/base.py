"""The round: pack devices into messages, send, fold replies in slot order, step.

This is the one place where an ``Algorithm`` (arithmetic on vectors) meets Flower. N logical devices
live on W SuperNodes: a message carries the ids of a contiguous slice of devices and the vectors that
they start from; its reply carries one row a device. Rows are folded in device order, whatever the
order of arrival and whatever W is, so the result depends on neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedlam_app.base.records import (
    EvaluateOrder,
    EvaluateReport,
    TrainOrder,
    TrainReport,
    decode,
    order,
    payload_bytes,
)
from strategies.algorithm import Algorithm

PULL_INTERVAL_S = 0.01  # Flower's default of 0.1 s would quantise short rounds


@dataclass
class Cost:
    """What a round or an evaluation cost: serialised payload bytes and measured client CPU time."""

    bytes_down: int = 0
    bytes_up: int = 0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    failures: list[str] = field(default_factory=list)

    def client(self, cpu_s: float, peak_rss_bytes: int) -> None:
        """Add one client process's share."""
        self.cpu_s += cpu_s
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes)


class Federation(Strategy):
    """Runs an ``Algorithm`` over devices that live on SuperNodes."""

    def __init__(
        self, algorithm: Algorithm, cell: str, devices: Sequence[int], supernodes: int, timeout_s: float
    ) -> None:
        self.algorithm = algorithm
        self.cell = cell  # JSON of the configuration overrides that define this experiment
        self.devices = list(devices)
        self.supernodes = supernodes
        self.timeout_s = timeout_s
        self.cost = Cost()
        self.loss = float("nan")  # example-weighted mean loss of the last round's local steps
        self._evaluation: tuple[Sequence[int], int] = ((), 0)
        self._tables: NDArray[np.float64] | None = None

    def train_round(self, grid: Grid, number: int) -> Cost:
        """Run round ``number`` (1-based) and return its cost."""
        self.cost = Cost()
        messages = self.configure_train(number, self._arrays(), ConfigRecord(), grid)
        self.aggregate_train(number, _in_order(grid, messages, self.timeout_s))
        return self.cost

    def evaluate(self, grid: Grid, chunks: Sequence[int], antennas: int) -> NDArray[np.float64]:
        """Score every current model on the evaluation chunks: (models, users, columns), chunk by chunk."""
        self.cost = Cost()
        self._evaluation = (chunks, antennas)
        messages = self.configure_evaluate(0, self._arrays(), ConfigRecord(), grid)
        self.aggregate_evaluate(0, _in_order(grid, messages, self.timeout_s))
        assert self._tables is not None
        return self._tables

    # --- Flower's interface -------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pack this round's devices into one message a SuperNode."""
        models, rows = self.algorithm.models(), self.algorithm.rows()
        self.cost.bytes_down += len(rows) * payload_bytes(models[0])
        for node, slots in self._packed(grid, len(self.devices)):
            used, local = np.unique([rows[slot] for slot in slots], return_inverse=True)
            record = TrainOrder(
                cell=self.cell,
                round=server_round,
                devices=[self.devices[slot] for slot in slots],
                rows=local.tolist(),
                vectors=models[used],
            )
            yield order(record, node, "train", str(server_round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the devices' vectors in slot order, then step. Devices that failed are named and left out."""
        loss = weight = 0.0
        for message in replies:
            if message.has_error():
                self._failed(f"round {server_round}: {message.error.reason}")
                continue
            report = decode(message.content, TrainReport)
            self.cost.client(report.cpu_s, report.peak_rss_bytes)
            for device, vector, w, x in zip(
                report.devices, report.vectors, report.weights, report.losses, strict=True
            ):
                self.cost.bytes_up += payload_bytes(vector)
                if not np.isfinite(vector).all():
                    self._failed(f"round {server_round}: device {device} sent a vector that is not finite")
                    continue
                self.algorithm.fold(device, vector, w)
                loss, weight = loss + w * x, weight + w
        if weight == 0.0:
            raise RuntimeError(f"no device finished round {server_round}: {'; '.join(self.cost.failures)}")
        self.algorithm.step()
        self.loss = loss / weight
        return self._arrays(), MetricRecord({"loss": self.loss, "failures": len(self.cost.failures)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Spread (model, chunk) pairs over the SuperNodes; a message carries only the models it needs."""
        chunks, antennas = self._evaluation
        models = self.algorithm.models()
        pairs = [(row, chunk) for row in range(len(models)) for chunk in chunks]
        for node, slots in self._packed(grid, len(pairs)):
            used, local = np.unique([pairs[slot][0] for slot in slots], return_inverse=True)
            record = EvaluateOrder(
                cell=self.cell,
                antennas=antennas,
                rows=local.tolist(),
                chunks=[pairs[slot][1] for slot in slots],
                vectors=models[used],
            )
            yield order(record, node, "evaluate", "evaluate")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Stack the tables of sums, models first; an evaluation is whole or it is an error."""
        tables, answered = [], 0
        for message in replies:
            if message.has_error():
                raise RuntimeError(f"an evaluation failed: {message.error.reason}")
            report = decode(message.content, EvaluateReport)
            self.cost.client(report.cpu_s, report.peak_rss_bytes)
            tables.append(report.table)
            answered += len(report.chunks)
        asked = len(self.algorithm.models()) * len(self._evaluation[0])
        if answered != asked:
            raise RuntimeError(
                f"only {answered} of {asked} evaluation chunks came back within"
                f" federation.timeout-s = {self.timeout_s:g}"
            )
        stacked = np.concatenate(tables)  # (models x users, columns)
        self._tables = stacked.reshape(len(self.algorithm.models()), -1, stacked.shape[1])
        return None

    def summary(self) -> None:
        """Say what runs, in Flower's way."""
        log(INFO, "\t├──> Rule: %s", type(self.algorithm).__name__)
        log(INFO, "\t└──> Devices: %d on %d SuperNodes", len(self.devices), self.supernodes)

    # --- helpers ------------------------------------------------------------------------------------

    def _arrays(self) -> ArrayRecord:
        return ArrayRecord([self.algorithm.models()])

    def _packed(self, grid: Grid, items: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Cut ``items`` slots into contiguous slices, one for each SuperNode."""
        nodes = wait_for_nodes(grid, self.supernodes, self.timeout_s)
        slices = np.array_split(np.arange(items), min(len(nodes), items))
        yield from zip(nodes, slices, strict=False)

    def _failed(self, reason: str) -> None:
        log(WARNING, "%s", reason)
        self.cost.failures.append(reason)


def wait_for_nodes(grid: Grid, expected: int, timeout_s: float) -> list[int]:
    """Return the first ``expected`` SuperNodes; Flower may start the ServerApp before they register."""
    deadline = time.monotonic() + timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"federation.supernodes = {expected}, but only {len(nodes)} registered within {timeout_s} s"
            )
        time.sleep(0.1)
    return nodes[:expected]


def _in_order(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[Message]:
    """Send, then yield the replies in the order of sending, each as soon as its turn has come."""
    if hasattr(grid, "pull_interval"):
        grid.pull_interval = PULL_INTERVAL_S
    waiting = list(grid.push_messages(list(messages)))  # a networked grid reads them twice
    arrived: dict[str, Message] = {}
    deadline = time.monotonic() + timeout_s
    while waiting:
        for message in grid.pull_messages([i for i in waiting if i not in arrived]):
            arrived[message.metadata.reply_to_message_id] = message
        while waiting and waiting[0] in arrived:
            yield arrived.pop(waiting.pop(0))
        if waiting and time.monotonic() > deadline:
            log(WARNING, "%d of the replies did not arrive within %s s", len(waiting), timeout_s)
            for name in waiting:
                if name in arrived:
                    yield arrived[name]
            return
        time.sleep(PULL_INTERVAL_S if waiting else 0.0)
