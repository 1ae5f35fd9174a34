"""A round in adapter space: each device trains the whole model a few steps and hands in its vector.

The rule says what is sent, trained, returned and kept (``Plan``), and what every device keeps for good
(``Entry``). Here that becomes messages: a device of rank r gets and returns r components of each factor, a
part that it keeps never travels, and an entry goes once to a device, with its next order. Where the rule
needs only the weighted sum of many vectors, SuperNodes answer with partial sums (``base/packing.py``); the
radio links are charged for each device's own vector all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.packing import Node, Sum, Tree, flaw, tops
from fedlam_app.base.records import (
    EvaluateOrder,
    TrainOrder,
    TrainReport,
    cut,
    framed_bytes,
    join,
    payload_bytes,
)
from fedlam_app.base.vectors import Vector
from fedlam_app.tables.jobs import FederationConfig
from fedlam_app.wireless.fleet import Load
from strategies.algorithm import Algorithm
from strategies.base import OWNERS, Cost, Federation, Grid
from strategies.cohort import Cohort, Said, scalars
from strategies.hands import Hands
from strategies.participation import Turn
from strategies.payloads import Payloads


class AdapterFederation(Federation):
    """Runs a rule of adapter space over ``devices``, which ascend."""

    def __init__(
        self,
        algorithm: Algorithm,
        cell: str,
        devices: Sequence[int],
        where: FederationConfig,
        hands: Hands | None = None,
    ) -> None:
        super().__init__(algorithm, cell, devices, where, hands)
        self.layout: Layout = algorithm.layout
        self.ids = np.array(devices, np.int64)  # (N,)
        self.heard = np.zeros(len(devices), np.int64)  # the last round that each device finished
        self.holds = np.zeros(len(devices), np.int64)  # how many entries each device has
        self.payloads = Payloads(algorithm, self.ids)
        self.closed = False  # whether a round's results could not be opened (``secure_round.py``)

    def train_round(self, grid: Grid, number: int) -> Cost:
        """Run round ``number`` (1-based) and return its cost."""
        self.cost, self._loss, self._weight = Cost(), 0.0, 0.0
        algorithm, hands = self.algorithm, self.hands
        turn = self.turn = hands.turn(
            number, lambda: self._load(number), lambda devices: self.poll(grid, number, devices)
        )
        models, rows = hands.versions.models(), hands.versions.rows(turn)
        cohort = Cohort(algorithm, number, turn, models, rows)
        heard = hands.begin(turn)
        self.refused = set()
        if turn.ids:
            self._work(grid, cohort)
            excused = self.refused or turn.lost or self.closed or hands.reception.alone
            if self._weight == 0.0 and not excused:
                why = "; ".join(self.cost.failures) or "every device vanished"
                raise RuntimeError(f"no device finished round {number}: {why}")
        if self._weight or hands.reception.alone:  # else the model stays as it is
            hands.reception.end(number)
            algorithm.step()
        if self._weight:
            self.loss = float("nan") if self.withheld else self._loss / self._weight
        heard.loss, heard.norm = cohort.losses, cohort.norms
        hands.settle(heard)
        return self.cost

    def poll(self, grid: Grid, number: int, devices: Sequence[int]) -> dict[int, float]:
        """Return devices' losses on their first batch of round ``number``, at the model they start from.

        Whoever does not answer, or has no finite loss, is missing. Bytes are charged to the current cost.
        """
        models, rows = self.algorithm.models(), self.algorithm.rows(devices)
        nothing = Turn(ids=list(devices), steps=[0] * len(devices), factors=[1.0] * len(devices))
        cohort = Cohort(self.algorithm, number, nothing, models, rows)

        def take(report: TrainReport) -> None:
            for k, loss in zip(report.devices, report.losses, strict=True):
                self._charge(cohort, k, 0)
                self.holds[self._place(k)] = len(self.algorithm.entries())
                if np.isfinite(loss):
                    cohort.losses[k] = loss

        orders = [(node, self._order(own, cohort, {})) for node, own in self.shares(grid, devices)]
        self.ask(grid, number, orders, TrainReport, take)
        return cohort.losses

    def evaluation_order(self, rows: list[int], chunks: list[int], antennas: int) -> EvaluateOrder:
        """Return the order that scores these (model, chunk) pairs; the instrument knows every entry."""
        models, entries = self.algorithm.models(), self.algorithm.entries()
        keeps = self.algorithm.plan(1).keeps
        owners = np.flatnonzero(self.heard)[:OWNERS] if keeps else np.zeros(0, np.int64)
        used, local = np.unique(rows, return_inverse=True)
        return EvaluateOrder(
            cell=self.cell,
            antennas=antennas,
            rows=local.tolist(),
            chunks=chunks,
            keeps=keeps,
            owners=self.ids[owners].tolist(),
            known=self.heard[owners].tolist(),
            vectors=models[used],
            kinds=[entry.kind for entry in entries],
            entry_ranks=[entry.rank for entry in entries],
            first=0,
            entries=join([entry.vector for entry in entries], np.float32)[0],
        )

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the rule's arrays, and what each device has."""
        own = {"federation.devices": np.stack([self.heard, self.holds], axis=1)}
        return {**self.algorithm.state(), **own, **self.hands.state()}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the arrays of an earlier round."""
        self.hands.load(state)
        self.heard, self.holds = state.pop("federation.devices").T.astype(np.int64, order="C")
        self.algorithm.load(state)

    # --- helpers ------------------------------------------------------------------------------------

    def _place(self, devices: int | list[int]) -> NDArray[np.intp]:
        """Return the places of devices in the arrays of all of them."""
        return np.searchsorted(self.ids, devices)

    def _load(self, number: int) -> Load:
        """Return what a round asks of each device: its own payloads, and the work of its steps."""
        up, down = self.payloads.of(number)
        assert self.hands.whole is not None
        return self.hands.whole.load(up, down + self._lacking()[self.holds])

    def _lacking(self) -> NDArray[np.int64]:
        """Return the bytes of the entries that a device lacks, by how many it holds."""
        lengths = [payload_bytes(entry.vector) for entry in self.algorithm.entries()]
        return np.cumsum([0, *lengths[::-1]])[::-1]

    def _work(self, grid: Grid, cohort: Cohort) -> None:
        """Have the devices of a cohort do their work, and give the rule what came of it."""
        apart = self.sites is not None or self.hands.apart
        chunks = {} if apart else cohort.chunks(self.algorithm)
        if chunks:
            self._work_in_sums(grid, cohort, chunks)
            return
        work = [cohort.steps[k] * self.hands.samples(k) for k in cohort.devices]
        shares = self.shares(grid, cohort.devices, work)
        orders = [(node, self._order(own, cohort, {})) for node, own in shares]
        self.ask(grid, cohort.number, orders, TrainReport, lambda report: self._take_vectors(cohort, report))

    def _work_in_sums(self, grid: Grid, cohort: Cohort, chunks: dict[int, int]) -> None:
        """The same by partial sums: a SuperNode gets whole chunks, so that the sums do not depend on it."""
        orders: list[tuple[int, TrainOrder]] = []
        node_of: dict[int, Node] = {}  # of the tree, by device
        for supernode, slots in self.slices(grid, max(chunks.values()) + 1):
            top = tops(slots.tolist())
            own = {k: top[chunk] for k, chunk in chunks.items() if chunk in top}
            node_of |= own
            orders.append((supernode, self._order(list(own), cohort, chunks)))
        sums: dict[Node, Sum | None] = dict.fromkeys(node_of.values())  # from left to right
        self.ask(
            grid,
            cohort.number,
            orders,
            TrainReport,
            lambda report: self._take_sums(cohort, node_of, sums, report),
        )
        tree = Tree()
        for node, part in sums.items():
            tree.add(node, part)
        parts = [part for _, part in tree.nodes if part is not None]
        if parts:
            full = self._weight * cohort.full(cohort.devices[0]).astype(np.float64)
            full[cohort.returned(cohort.devices[0])] = sum(parts[1:], start=parts[0])
            self.hands.reception.fold_sum(full, self._weight)

    def _order(self, devices: list[int], cohort: Cohort, chunks: dict[int, int]) -> TrainOrder:
        """Pack the devices of one SuperNode; devices that start alike share one vector."""
        distinct: dict[bytes, int] = {}
        row_of: dict[tuple[int, int], int] = {}
        vectors: list[Vector] = []
        for k in devices:
            if cohort.kinds[k] not in row_of:
                vector = cohort.sent(k)
                row = row_of[cohort.kinds[k]] = distinct.setdefault(vector.tobytes(), len(vectors))
                if row == len(vectors):
                    vectors.append(vector)
        rows = [row_of[cohort.kinds[k]] for k in devices]
        entries, places = self.algorithm.entries(), self._place(devices)
        lacks = self._lacking()[self.holds[places]]  # (n,) bytes of the entries to come
        down = (np.array([payload_bytes(vector) for vector in vectors])[rows] + lacks).tolist()
        cohort.bytes_down |= dict(zip(devices, down, strict=True))
        self.cost.bytes_down += sum(down)
        first = int(self.holds[places].min())
        noise, free = cohort.turn.privacy(devices)
        joined, sizes = join(vectors, np.float32)
        plan = cohort.plan
        return TrainOrder(
            cell=self.cell,
            round=cohort.number,
            devices=devices,
            rows=rows,
            ranks=[cohort.kinds[k][1] for k in devices],
            known=self.heard[places].tolist(),
            steps=[cohort.steps[k] for k in devices],
            factors=[cohort.factors[k] for k in devices],
            noise=noise,
            free=free,
            chunks=[chunks[k] for k in devices] if chunks else [],
            width=cohort.width(devices[0]) if chunks else 0,
            trains=plan.trains,
            returns=plan.returns,
            keeps=plan.keeps,
            proximal=plan.proximal,
            probe=plan.probe,
            compact=cohort.compact,
            vectors=joined,
            sizes=sizes,
            kinds=[entry.kind for entry in entries[first:]],
            entry_ranks=[entry.rank for entry in entries[first:]],
            first=first,
            entries=join([entry.vector for entry in entries[first:]], np.float32)[0],
        )

    def _take_vectors(self, cohort: Cohort, report: TrainReport) -> None:
        """Give every device's vector to the rule, or name what is wrong with it."""
        self.keep_books(cohort.number, report)
        answers, vectors = scalars(report), cut(report.vectors, report.sizes)
        for (k, said), vector in list(zip(answers.items(), vectors, strict=True)):
            if k in cohort.turn.lost:
                self._charge(cohort, k, said.size)
                continue
            if not np.isfinite(vector).all():
                said = replace(said, norm=np.nan)
            if self._counts(cohort, k, said):
                full = cohort.full(k)
                full[cohort.returned(k)] = vector
                self.hands.fold(self.turn, k, full, said.weight, counted=True)

    def _take_sums(
        self, cohort: Cohort, node_of: dict[int, Node], sums: dict[Node, Sum | None], report: TrainReport
    ) -> None:
        """Keep a SuperNode's sums; whoever is named as a failure is not in them."""
        self.keep_books(cohort.number, report)
        answers = scalars(report)
        members: dict[Node, list[int]] = {}
        for k in sorted(answers):
            members.setdefault(node_of[k], []).append(k)
        if report.sums.shape != (len(members), cohort.width(cohort.devices[0])):
            raise ValueError(f"sums of shape {report.sums.shape} for {len(members)} parts of the cohort")
        for (node, own), total in zip(members.items(), report.sums, strict=True):
            if not np.isfinite(total).all():
                self.failed(f"round {cohort.number}: the sum of devices {own} is not finite")
                for k in own:
                    self._charge(cohort, k, answers[k].size)
                continue
            good = [k for k in own if self._counts(cohort, k, answers[k])]
            if good:
                sums[node] = np.array(total)  # a message's arrays are read-only

    def _counts(self, cohort: Cohort, device: int, said: Said) -> bool:
        """Charge a device's answer and return whether its vector enters the step; name why where not."""
        self._charge(cohort, device, said.size)
        why = flaw(said.size, cohort.width(device), said.weight, said.loss, said.norm)
        if why:
            self.failed(f"round {cohort.number}: device {device} {why}")
            return False
        place = self._place(device)
        self.heard[place], self.holds[place] = cohort.number, len(self.algorithm.entries())
        if not self.withheld:
            cohort.losses[device] = said.loss
        cohort.norms[device] = said.norm
        self._loss, self._weight = self._loss + said.weight * said.loss, self._weight + said.weight
        return True

    def _charge(self, cohort: Cohort, device: int, size: int) -> None:
        """Count what a device's own link carried."""
        cohort.bytes_up[device] = framed_bytes((size,))
        self.cost.bytes_up += cohort.bytes_up[device]
