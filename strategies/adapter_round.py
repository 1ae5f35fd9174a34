"""A round in adapter space: each device trains the whole model a few steps and hands in its vector.

The rule says what is sent, trained, returned and kept (``Plan``), and what every device keeps for good
(``Entry``). Here that becomes messages: a device of rank r gets and returns r components of each factor, a
part that it keeps never travels, and an entry goes once to a device, with its next order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.records import EvaluateOrder, TrainOrder, TrainReport, cut, join, payload_bytes
from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm, Plan
from strategies.base import OWNERS, Cost, Federation, Grid


class AdapterFederation(Federation):
    """Runs a rule of adapter space."""

    def __init__(
        self,
        algorithm: Algorithm,
        cell: str,
        devices: Sequence[int],
        supernodes: int,
        timeout_s: float,
    ) -> None:
        super().__init__(algorithm, cell, devices, supernodes, timeout_s)
        self.layout: Layout = algorithm.layout
        self.heard: dict[int, int] = {}  # the last round that each device finished
        self.holds: dict[int, int] = {}  # how many entries each device has

    def train_round(self, grid: Grid, number: int) -> Cost:
        """Run round ``number`` (1-based) and return its cost."""
        self.cost, self._loss, self._weight = Cost(), 0.0, 0.0
        algorithm = self.algorithm
        cohort = algorithm.cohort(number)
        plan, models, rows = algorithm.plan(number), algorithm.models(), algorithm.rows(cohort)
        # Fed-SB's compact vectors have a length of their own, without factors to cut.
        compact = models.shape[1] != self.layout.size
        starts = {k: models[row] for k, row in zip(cohort, rows, strict=True)}
        masks = {k: self._mask(k, compact) for k in cohort}
        orders = [
            (node, self._order(number, [cohort[slot] for slot in slots], plan, starts, masks, compact))
            for node, slots in self.slices(grid, len(cohort))
        ]

        def take(report: TrainReport) -> None:
            parts = cut(report.vectors, report.sizes)
            answers = zip(report.devices, parts, report.weights, report.losses, strict=True)
            for k, vector, weight, loss in list(answers):  # all or none, where they are not as many
                returned = masks[k] & (True if compact else self.layout.part(plan.returns))
                full = starts[k] * masks[k]  # what a device of this rank has
                self._fold(number, k, vector, full, returned, weight, loss)

        self.ask(grid, number, orders, TrainReport, take)
        if self._weight == 0.0:
            why = "; ".join(self.cost.failures) or "every device vanished"
            raise RuntimeError(f"no device finished round {number}: {why}")
        algorithm.step()
        self.loss = self._loss / self._weight
        return self.cost

    def evaluation_order(self, rows: list[int], chunks: list[int], antennas: int) -> EvaluateOrder:
        """Return the order that scores these (model, chunk) pairs; the instrument knows every entry."""
        models, entries = self.algorithm.scored(), self.algorithm.entries()
        keeps = self.algorithm.plan(1).keeps
        owners = [k for k in self.devices if k in self.heard][:OWNERS] if keeps else []
        used, local = np.unique(rows, return_inverse=True)
        return EvaluateOrder(
            cell=self.cell,
            antennas=antennas,
            rows=local.tolist(),
            chunks=chunks,
            keeps=keeps,
            owners=owners,
            known=[self.heard[k] for k in owners],
            vectors=models[used],
            kinds=[entry.kind for entry in entries],
            entry_ranks=[entry.rank for entry in entries],
            first=0,
            entries=join([entry.vector for entry in entries], np.float32)[0],
        )

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the rule's arrays, and what each device has."""
        table = np.array([[self.heard.get(k, 0), self.holds.get(k, 0)] for k in self.devices], np.int64)
        return {**self.algorithm.state(), "federation.devices": table}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the arrays of an earlier round."""
        table = state.pop("federation.devices")
        self.heard = {k: int(row[0]) for k, row in zip(self.devices, table, strict=True) if row[0]}
        self.holds = {k: int(row[1]) for k, row in zip(self.devices, table, strict=True)}
        self.algorithm.load(state)

    # --- helpers ------------------------------------------------------------------------------------

    def _mask(self, device: int, compact: bool) -> NDArray[np.bool_]:
        """Return which components of a vector this device has."""
        if compact:
            return np.ones(self.algorithm.models().shape[1], bool)
        return self.layout.within(self.algorithm.rank(device))

    def _order(
        self,
        number: int,
        devices: list[int],
        plan: Plan,
        starts: dict[int, Vector],
        masks: dict[int, NDArray[np.bool_]],
        compact: bool,
    ) -> TrainOrder:
        """Pack the devices of one SuperNode; devices that start alike share one vector."""
        sent = np.ones(1, bool) if compact else ~self.layout.part(plan.keeps)
        distinct: dict[bytes, int] = {}
        rows: list[int] = []
        vectors: list[Vector] = []
        for k in devices:
            vector = starts[k][masks[k] & sent]
            row = distinct.setdefault(vector.tobytes(), len(vectors))
            if row == len(vectors):
                vectors.append(vector)
            rows.append(row)
            self.cost.bytes_down += payload_bytes(vector)
        entries = self.algorithm.entries()
        for k in devices:
            lacks = [entry.vector for entry in entries[self.holds.get(k, 0) :]]
            self.cost.bytes_down += sum(payload_bytes(vector) for vector in lacks)
        first = min(self.holds.get(k, 0) for k in devices)
        joined, sizes = join(vectors, np.float32)
        return TrainOrder(
            cell=self.cell,
            round=number,
            devices=devices,
            rows=rows,
            ranks=[self.algorithm.rank(k) for k in devices],
            known=[self.heard.get(k, 0) for k in devices],
            trains=plan.trains,
            returns=plan.returns,
            keeps=plan.keeps,
            proximal=plan.proximal,
            probe=plan.probe,
            compact=compact,
            vectors=joined,
            sizes=sizes,
            kinds=[entry.kind for entry in entries[first:]],
            entry_ranks=[entry.rank for entry in entries[first:]],
            first=first,
            entries=join([entry.vector for entry in entries[first:]], np.float32)[0],
        )

    def _fold(
        self,
        number: int,
        device: int,
        vector: Vector,
        full: Vector,
        returned: NDArray[np.bool_],
        weight: float,
        loss: float,
    ) -> None:
        """Give one device's result to the rule, or name what is wrong with it."""
        self.cost.bytes_up += payload_bytes(vector)
        if vector.shape != (int(returned.sum()),):
            self.failed(
                f"round {number}: device {device} sent {len(vector)} values instead of {returned.sum()}"
            )
        elif not np.isfinite(vector).all():
            self.failed(f"round {number}: device {device} sent a vector that is not finite")
        elif not (np.isfinite(weight) and np.isfinite(loss) and weight > 0.0):
            self.failed(f"round {number}: device {device} sent a weight of {weight} and a loss of {loss}")
        else:
            full[returned] = vector
            self.algorithm.fold(device, full, weight)
            self.heard[device], self.holds[device] = number, len(self.algorithm.entries())
            self._loss, self._weight = self._loss + weight * loss, self._weight + weight
