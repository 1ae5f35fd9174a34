"""The one place where strategies meet Flower: pack devices into messages, send, take the replies in order.

N logical devices live on W SuperNodes: a message carries a contiguous slice of devices, and its reply is
taken in the order of sending, whatever the order of arrival and whatever W is, so the result depends on
neither. Where each SuperNode is one device, it gets its own work alone (``sites.py``). What a message says is
the business of the two rounds built on this: ``adapter_round.py`` (devices train the whole model) and
``split_lora.py`` (the large model stays on the edge server).
"""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedlam_app.base.records import (
    EvaluateOrder,
    EvaluateReport,
    ModulesOrder,
    Report,
    SecureOrder,
    SplitOrder,
    SplitReport,
    TrainOrder,
    TrainReport,
    decode,
    order,
)
from fedlam_app.tables.jobs import FederationConfig
from strategies.algorithm import Algorithm
from strategies.hands import Hands, without_radio
from strategies.sites import Sites, exchange, wait_for_nodes

OWNERS = 10  # devices with a part of their own that an evaluation scores, the first ones

R = TypeVar("R", bound=Report)
Packed = Sequence[  # (SuperNode, what it shall do)
    tuple[int, TrainOrder | SplitOrder | ModulesOrder | SecureOrder]
]


@dataclass
class Cost:
    """What a round or an evaluation cost: serialised payload bytes, and CPU and wall time as measured."""

    bytes_down: int = 0
    bytes_up: int = 0
    cpu_s: float = 0.0  # of all devices
    server_cpu_s: float = 0.0  # of the edge server's large model
    peak_rss_bytes: int = 0
    exchanges: int = 0
    exchange_s: float = 0.0  # wall time between sending and the last reply
    waited_s: float = 0.0  # the part of it in which the slowest SuperNode computed
    failures: list[str] = field(default_factory=list)


class Federation(Strategy):
    """Runs an ``Algorithm`` over devices that live on SuperNodes."""

    def __init__(
        self,
        algorithm: Algorithm,
        cell: str,
        devices: Sequence[int],
        where: FederationConfig,
        hands: Hands | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.hands = hands or without_radio(algorithm)
        self.cell = cell  # JSON of the configuration overrides that define this experiment
        self.devices = list(devices)
        self.supernodes = where.supernodes
        self.timeout_s = where.timeout_s
        self.sites = Sites(devices) if where.placement == "sites" else None
        self.cost = Cost()
        self.loss = float("nan")  # weighted mean loss of the last round's steps
        self.withheld = algorithm.config.privacy.withholds  # no loss leaves a device
        self.ledgers: dict[int, str] = {}  # each device's privacy ledger, as it last said
        self.refused: set[int] = set()  # whose budget was spent when they were asked last
        self.hands.reception.tells(self.ledgers, self.failed)
        self._complete = False  # whether all SuperNodes that are expected have been there
        self._orders: Packed = []
        self._take: Callable[[Message], None] = lambda message: None
        self._slowest_s = 0.0
        self._evaluation: tuple[Sequence[int], int] = ((), 0)
        self._tables: NDArray[np.float64] | None = None

    # --- what a round is ----------------------------------------------------------------------------

    @abstractmethod
    def train_round(self, grid: Grid, number: int) -> Cost:
        """Run round ``number`` (1-based) and return its cost."""

    @abstractmethod
    def evaluation_order(self, rows: list[int], chunks: list[int], antennas: int) -> EvaluateOrder:
        """Return the order that scores these (model, chunk) pairs."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays from which a killed run continues after a round."""

    @abstractmethod
    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the arrays of an earlier round."""

    def evaluate(self, grid: Grid, chunks: Sequence[int], antennas: int) -> NDArray[np.float64]:
        """Score every current model on the evaluation chunks: (models, users, columns), chunk by chunk."""
        self.cost = Cost()
        self._evaluation = (chunks, antennas)
        messages = list(self.configure_evaluate(0, ArrayRecord(), ConfigRecord(), grid))
        replies = list(exchange(grid, messages, self.timeout_s))
        self.aggregate_evaluate(0, self._elsewhere(grid, messages, replies))
        assert self._tables is not None
        return self._tables

    def seconds(self) -> float:
        """Return the virtual time so far."""
        return self.hands.participation.seconds()

    def ask(self, grid: Grid, number: int, orders: Packed, kind: type[R], take: Callable[[R], None]) -> None:
        """Send orders and ``take`` the reports in the order of sending; failures are named and left out."""
        self._orders, self._slowest_s = orders, 0.0
        asked = {node: set(one.devices) for node, one in orders}

        def read(message: Message) -> None:
            report = decode(message.content, kind)
            named: list[int] = report.devices  # type: ignore[union-attr]
            mine = asked[message.metadata.src_node_id]
            if len(set(named)) < len(named) or not mine.issuperset(named):
                raise ValueError(
                    f"a SuperNode answered for devices {named}, and was asked about {sorted(mine)}"
                )
            take(self._charged(report))

        self._take = read
        started = time.monotonic()
        messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
        self.aggregate_train(number, exchange(grid, messages, self.timeout_s))
        self.cost.exchanges += 1
        self.cost.exchange_s += time.monotonic() - started
        self.cost.waited_s += self._slowest_s

    def keep_books(self, number: int, report: TrainReport | SplitReport) -> None:
        """Keep what a report says of privacy: the devices' ledgers, and who could not take part any more."""
        self.ledgers |= {k: t for k, t in zip(report.devices, report.ledgers, strict=False) if t}
        self.refused |= set(report.refused)
        for k in report.refused:
            self.failed(f"round {number}: device {k} did nothing: its privacy budget is spent")

    def shares(
        self, grid: Grid, devices: Sequence[int], work: Sequence[float] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (SuperNode, its devices): contiguous slices, or each device at its own site.

        Slices are of like ``work``, by what each device is expected to do; without it, of like numbers.
        """
        if self.sites is None:
            nodes = self._nodes(grid)
            for node, slots in zip(nodes, balanced(work or [1.0] * len(devices), len(nodes)), strict=False):
                yield node, [devices[slot] for slot in slots]
            return
        at = self.sites.places(grid, self._nodes(grid), self.timeout_s, self.failed)
        for device in devices:
            if device in at:
                yield at[device], [device]
            else:
                self.failed(f"device {device} was left out: no SuperNode answers for it")

    def slices(self, grid: Grid, items: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Cut ``items`` slots into contiguous slices, one for each SuperNode."""
        nodes = self._nodes(grid)
        yield from zip(nodes, balanced([1.0] * items, len(nodes)), strict=False)

    def failed(self, reason: str) -> None:
        """Count a failure, and say it."""
        log(WARNING, "%s", reason)
        self.cost.failures.append(reason)

    # --- Flower's interface -------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Turn the orders of this exchange into messages, one a SuperNode."""
        return [order(record, node, "train", str(server_round)) for node, record in self._orders]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take what was answered, in the order of sending."""
        for message in replies:
            if message.has_error():
                self.failed(f"round {server_round}: {message.error.reason}")
                continue
            try:
                self._take(message)
            except Exception as error:  # whatever a SuperNode sends: one that cannot be read did not come
                self.failed(f"round {server_round}: {type(error).__name__}: {error}")
        return None, MetricRecord({"failures": len(self.cost.failures)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Spread (model, chunk) pairs over the SuperNodes; a message carries only the models it needs."""
        chunks, antennas = self._evaluation
        pairs = [(row, chunk) for row in range(len(self.algorithm.models())) for chunk in chunks]
        for node, slots in self.slices(grid, len(pairs)):
            rows = [pairs[slot][0] for slot in slots]
            record = self.evaluation_order(rows, [pairs[slot][1] for slot in slots], antennas)
            yield order(record, node, "evaluate", "evaluate")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Stack the tables of sums, models first; an evaluation is whole or it is an error."""
        tables: list[NDArray[np.float64]] = []  # of each pair: (owners, users, columns)
        for message in replies:
            if message.has_error():
                raise RuntimeError(f"an evaluation failed: {message.error.reason}")
            report = self._charged(decode(message.content, EvaluateReport))
            tables += np.split(report.table, np.cumsum(report.users)[:-1], axis=1)
        models, chunks = len(self.algorithm.models()), len(self._evaluation[0])
        if len(tables) != models * chunks:
            raise RuntimeError(
                f"only {len(tables)} of {models * chunks} evaluation chunks came back within"
                f" federation.timeout-s = {self.timeout_s:g}"
            )
        of_models = [
            np.concatenate(tables[row * chunks : (row + 1) * chunks], axis=1) for row in range(models)
        ]
        self._tables = np.concatenate(of_models)  # (models x owners, all users, columns)
        return None

    def summary(self) -> None:
        """Say what runs, in Flower's way."""
        log(INFO, "\t├──> Rule: %s", type(self.algorithm).__name__)
        log(INFO, "\t└──> Devices: %d on %d SuperNodes", len(self.devices), self.supernodes)

    def _nodes(self, grid: Grid) -> list[int]:
        """Return the SuperNodes that are there: all that are expected at first, and then whoever is left."""
        nodes = wait_for_nodes(grid, 1 if self._complete else self.supernodes, self.timeout_s)
        self._complete = True
        return nodes if self.sites is not None else nodes[: self.supernodes]

    def _elsewhere(self, grid: Grid, messages: list[Message], replies: list[Message]) -> list[Message]:
        """Send what came back as an error to other SuperNodes, once; an evaluation can be done by any."""
        lost = [place for place, message in enumerate(replies) if message.has_error()]
        bad = {messages[place].metadata.dst_node_id for place in lost}
        nodes = [node for node in sorted(grid.get_node_ids()) if node not in bad] if lost else []
        if not nodes:
            return replies
        for place in lost:
            self.failed(f"evaluation, to be done elsewhere: {replies[place].error.reason}")
        again = [
            Message(messages[place].content, node, "evaluate", group_id="evaluate")
            for place, node in zip(lost, itertools.cycle(nodes), strict=False)
        ]
        for place, message in zip(lost, exchange(grid, again, self.timeout_s), strict=True):
            replies[place] = message
        return replies

    def _charged(self, report: R) -> R:
        """Add one SuperNode's share."""
        self._slowest_s = max(self._slowest_s, report.cpu_s)
        self.cost.cpu_s += report.cpu_s
        self.cost.peak_rss_bytes = max(self.cost.peak_rss_bytes, report.peak_rss_bytes)
        return report


def balanced(work: Sequence[float], parts: int) -> list[NDArray[np.int64]]:
    """Cut slots into at most ``parts`` contiguous slices, none empty, whose sums of ``work`` are alike.

    Contiguous, because answers are folded in the order of the slots: the cut must not move a result.
    """
    sizes = np.asarray(work, np.float64)
    # A slot belongs to the slice in which the middle of its work lies.
    middle = np.cumsum(sizes) - sizes / 2.0
    owner = np.clip(np.ceil(middle / max(sizes.sum(), 1e-300) * parts) - 1, 0, parts - 1).astype(np.int64)
    return [np.flatnonzero(owner == part) for part in np.unique(owner)]
