"""The split round (FedFT): embedding and head on the devices, the large model once, on the edge server.

One exchange makes one step t, of which a round has ``train.local-steps``:

    server   R_k = pool(f(E_k; W, A, B))    one pass over the tokens of all devices of the step
      down   R_k, by unicast, to device k
    device   J_k = dl_k/dR_k                its loss, its labels, its head: none of them leaves it
        up   J_k, and the embeddings of batch t + 1 that the server lacks
    server   g_k = (dR_k/d(A, B))^T J_k     every device's LoRA gradient, from one backward pass
             (A, B) <- rule(g_1, ..., g_K)  ``strategies/fedsgd_lora.py`` and its relatives

Where the embedding trains (the CSI front end), nothing can be cached: dL/dE goes down after the pass, and the
next batch is embedded after that, so a step takes two exchanges. A device that vanishes costs its share: the
weights of those that answered are renormalised by the rule, and its memory goes on from the last word that
came through. Source: the system of "Federated Fine-Tuning for Pre-Trained Foundation Models Over Wireless
Networks", arXiv:2407.02924, whose text gives no pseudocode: the protocol is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.records import (
    EvaluateOrder,
    ModulesOrder,
    ModulesReport,
    SplitOrder,
    SplitReport,
    cut,
    join,
    payload_bytes,
)
from fedlam_app.base.split_payload import Uplink, from_bytes, to_bytes, version
from fedlam_app.config import RunConfig
from fedlam_app.models.split import SplitModel, rows_of
from fedlam_app.tasks.base import Task
from strategies.algorithm import Algorithm
from strategies.base import OWNERS, Cost, Federation, Grid
from strategies.hands import Hands
from strategies.large_model import LargeModel
from strategies.link import Answer, Errand, Ids, Link, Rows
from strategies.modules import Modules
from strategies.participation import Turn

NOTHING = np.zeros(0, np.int64)


class SplitFederation(Federation):
    """Runs a rule of gradient space."""

    def __init__(
        self,
        algorithm: Algorithm,
        cell: str,
        devices: Sequence[int],
        config: RunConfig,
        task: Task,
        model: SplitModel,
        hands: Hands | None = None,
    ) -> None:
        split = config.split
        super().__init__(algorithm, cell, devices, config.federation, hands)
        self.config = config
        self.large = LargeModel(model, split)
        self.link = Link(config, task, model, self.hands.receiver)
        self.modules = Modules(model, split.heads == "averaged")
        self.known: dict[int, int] = {}  # version of each device's memory that its last word made
        self.graded: dict[int, Errand] = {}  # gradients of embeddings, on their way down

    def train_round(self, grid: Grid, number: int) -> Cost:
        """Run round ``number`` (1-based) and return its cost."""
        self.cost, self._loss, self._weight, self._asked, self.refused = Cost(), 0.0, 0.0, 0, set()
        steps = self.config.train.local_steps
        for step in range((number - 1) * steps + 1, number * steps + 1):
            self._step(grid, step)
        if self.graded:
            self._exchange(grid, number * steps, self.graded)
        if self._weight == 0.0 and self._asked and not (self.refused or self.hands.reception.alone):
            why = "; ".join(dict.fromkeys(self.cost.failures)) or "every device vanished"
            raise RuntimeError(f"no device finished round {number}: {why}")
        if self.modules.averaged and number % self.config.split.average_every == 0:
            self._average(grid, number)
        if self._weight:
            self.loss = float("nan") if self.withheld else self._loss / self._weight
        return self.cost

    # --- a step -------------------------------------------------------------------------------------

    def _step(self, grid: Grid, step: int) -> None:
        """Take one server step: gather what lacks, show, collect Jacobians, fold."""
        self.turn = self._turn(step)
        self.heard = self.hands.begin(self.turn)
        self.rows = dict(zip(self.turn.ids, self.hands.versions.rows(self.turn), strict=True))
        cohort = self._cohort(step)
        self._asked += len(cohort)
        errands = self.graded | {}
        for k in cohort:
            if (missing := self.link.lacks(k, step)) is not None:
                errands[k] = replace(errands.get(k, Errand()), wanted=step, missing=missing)
        if errands:
            self._exchange(grid, step, errands)
        present = [k for k in cohort if self.link.lacks(k, step) is None]
        groups = [[k] for k in present] if self.algorithm.sequential else [present]
        for group in groups:
            if group:
                self._pass(grid, step, group, self._ahead(step) if group is groups[-1] else {})
        self._close(step)
        self.algorithm.step()
        self.hands.settle(self.heard)
        self.link.forget(step)

    def _turn(self, step: int) -> Turn:
        """Return who takes part in a step."""
        cached = self.link.caches(step)
        return self.hands.turn(step, lambda: self.hands.meter.load(cached), None)

    def _cohort(self, step: int) -> list[int]:
        """Return who has anything to do in a step."""
        return [k for k in self.turn.ids if self.link.has_batch(k, step)]

    def _close(self, step: int) -> None:
        """End a step's folds, before the rule steps."""
        self.hands.reception.end(step)

    def _pass(self, grid: Grid, step: int, group: list[int], ahead: dict[int, Errand]) -> None:
        """Run the backbone forward for a group of devices, exchange, and learn from what came back."""
        ids = [self.link.ids(k, step) for k in group]
        ends = np.cumsum([len(own) for own in ids])[:-1]  # where each device's samples end
        tokens = self.link.tokens([(k, i) for k, own in zip(group, ids, strict=True) for i in own.tolist()])
        owners = np.repeat(np.arange(len(group)), [len(own) for own in ids])  # of the samples
        models, rows = self.hands.versions.models(), [self.rows[k] for k in group]
        shown = self.large.forward(models, rows, tokens, owners)  # (R, D)
        counts = np.split(rows_of(tokens).cpu().numpy(), ends)  # rows of each sample
        parts = np.split(shown, np.cumsum([own.sum() for own in counts])[:-1])  # (R_k, D)

        errands, seen = dict(ahead), {}
        for k, part, own, each in zip(group, parts, ids, counts, strict=True):
            data, seen[k] = self.link.coded(k, part, own, each)
            ask = ahead.get(k, Errand())
            errands[k] = replace(ask, shown=step, representations=data, rows=len(part))
        answers = self._exchange(grid, step, errands)
        jacobians = [
            answers[k].jacobians if k in answers else np.zeros_like(part)
            for k, part in zip(group, parts, strict=True)
        ]
        for k, answer in answers.items():  # in the order of the devices
            self.link.saw(seen[k])
            if not self.withheld:
                self.heard.loss[k] = answer.loss
            self.modules.worked(k, answer.weight)
            self._loss += answer.weight * answer.loss
            self._weight += answer.weight
        lengths = [own.sum() for own in np.split(tokens.lengths.cpu().numpy(), ends)]
        self._learn(step, group, jacobians, answers, np.cumsum(lengths)[:-1])

    def _learn(
        self, step: int, group: list[int], jacobians: list[Rows], answers: dict[int, Answer], ends: Ids
    ) -> None:
        """Run the backbone backward, and fold every device's gradient; ``ends``: of the devices' tokens."""
        gradients, into_tokens = self.large.backward(np.concatenate(jacobians), self.link.trains(step))
        self.cost.server_cpu_s += self.large.spent_s()
        into = [] if into_tokens is None else np.split(into_tokens, ends)
        for place, (k, gradient) in enumerate(zip(group, gradients, strict=True)):
            if k in answers:
                self.hands.fold(self.turn, k, gradient, answers[k].weight)
                self.heard.norm[k] = float(np.linalg.norm(gradient))
                if into:
                    sent, count = self.link.gradients(into[place]), len(into[place])
                    self.graded[k] = Errand(graded=step, gradients=sent, tokens=count)

    def _ahead(self, step: int) -> dict[int, Errand]:
        """Return what the next step will lack, to be asked for along with this one's Jacobians."""
        train = self.config.train
        last = train.rounds * train.local_steps
        if not self.hands.participation.foresees or self.link.trains(step + 1) or step == last:
            return {}
        cohort = [k for k in self._turn(step + 1).ids if self.link.has_batch(k, step + 1)]
        lacks = {k: self.link.lacks(k, step + 1) for k in cohort}
        return {k: Errand(wanted=step + 1, missing=ids) for k, ids in lacks.items() if ids is not None}

    # --- an exchange --------------------------------------------------------------------------------

    def _exchange(self, grid: Grid, step: int, errands: dict[int, Errand]) -> dict[int, Answer]:
        """Send each device on its errand; returns what was answered well to what was shown."""
        devices, answers = sorted(errands), dict[int, Answer]()
        orders = [(node, self._order(own, errands)) for node, own in self.shares(grid, devices)]

        def take(report: SplitReport) -> None:
            self.keep_books(step, report)
            self.cost.bytes_up += payload_bytes(report.payload)
            payloads = cut(report.payload, report.sizes)
            parts = zip(report.devices, payloads, report.weights, report.losses, strict=True)
            for k, payload, weight, loss in list(parts):  # all or none, where they are not as many
                try:
                    answer = self._read(errands[k], k, from_bytes(payload, Uplink), weight, loss)
                except (KeyError, ValueError) as error:
                    self.failed(f"step {step}: device {k} was left out: {error}")
                    continue
                if answer is not None:
                    answers[k] = answer
                if errands[k].shown or errands[k].graded:  # else it has only embedded, and kept nothing
                    self.known[k] = version(errands[k].shown, errands[k].graded)
                    self.modules.told(k)

        self.ask(grid, step, orders, SplitReport, take)
        if not any(errand.shown for errand in errands.values()):
            self.graded = {}
        return answers

    def _order(self, devices: list[int], errands: dict[int, Errand]) -> SplitOrder:
        """Pack the errands of one SuperNode's devices."""
        downlinks = [
            errands[k].downlink(self.modules.news(k) if self.link.needs_modules(errands[k]) else b"")
            for k in devices
        ]
        for k, down in zip(devices, downlinks, strict=True):
            if errands[k].shown or errands[k].graded:
                self.hands.meter.went_down(k, errands[k].rows, errands[k].tokens, len(down.modules))
        payload, sizes = join([to_bytes(down) for down in downlinks], np.uint8)
        noise, free = self.turn.privacy(devices)
        self.cost.bytes_down += payload_bytes(payload)
        return SplitOrder(
            cell=self.cell,
            devices=devices,
            shown=[errands[k].shown for k in devices],
            graded=[errands[k].graded for k in devices],
            wanted=[errands[k].wanted for k in devices],
            known=[self.known.get(k, 0) for k in devices],
            noise=noise,
            free=free,
            payload=payload,
            sizes=sizes,
        )

    def _read(self, errand: Errand, device: int, up: Uplink, weight: float, loss: float) -> Answer | None:
        """Take in what a device sent; ``ValueError`` where it is not what was asked for."""
        answer = self.link.answer(errand, device, up, weight, loss) if errand.shown else None
        ids, lengths = self.link.keep(device, errand.wanted, up) if errand.wanted else (NOTHING, NOTHING)
        self.hands.meter.came_up(device, errand.rows, ids, lengths, keep=self.link.caches(errand.wanted))
        return answer

    def _average(self, grid: Grid, number: int) -> None:
        """Average the modules of the devices that worked since the last time."""
        devices = [k for k in self.devices if self.modules.share(k) > 0.0]
        orders = [
            (node, ModulesOrder(cell=self.cell, devices=own, known=[self.known.get(k, 0) for k in own]))
            for node, own in self.shares(grid, devices)
        ]

        def take(report: ModulesReport) -> None:
            for k, vector in list(zip(report.devices, report.vectors, strict=True)):
                self.cost.bytes_up += payload_bytes(vector)
                if not self.modules.fold(k, vector):
                    self.failed(f"round {number}: device {k} sent modules of another size, or not finite")

        self.ask(grid, number, orders, ModulesReport, take)
        self.modules.step()

    # --- evaluation and resumption ------------------------------------------------------------------

    def evaluation_order(self, rows: list[int], chunks: list[int], antennas: int) -> EvaluateOrder:
        """Return the order that scores these pairs; personal modules are scored on their devices."""
        owners = [k for k in self.devices if k in self.known][:OWNERS] if self.modules.personal else []
        used, local = np.unique(rows, return_inverse=True)
        return EvaluateOrder(
            cell=self.cell,
            antennas=antennas,
            rows=local.tolist(),
            chunks=chunks,
            keeps="modules" if owners else "",
            owners=owners,
            known=[self.known[k] for k in owners],
            vectors=np.stack([self.modules.whole(vector) for vector in self.algorithm.models()[used]]),
            kinds=[],
            entry_ranks=[],
            first=0,
            entries=np.zeros(0, np.float32),
        )

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the rule's arrays, the modules' and every device's version; not the embeddings.

        A resumed run asks for embeddings again, and counts their bytes again: they are spent again.
        """
        known = {"federation.known": np.array([self.known.get(k, 0) for k in self.devices], np.int64)}
        own = self.modules.state(self.devices) | self.link.state() | self.hands.state()
        return self.algorithm.state() | own | known

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the arrays of an earlier round."""
        self.hands.load(state)
        known = state.pop("federation.known")
        self.known = {k: int(v) for k, v in zip(self.devices, known, strict=True) if v}
        self.modules.load(state, self.devices)
        self.link.load(state)
        self.algorithm.load(state)
