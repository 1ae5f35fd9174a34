"""A round of secure aggregation: the server learns the sum of the clipped updates, and of none of them more.

    keys     each device says its public words                      U1: who answered
    shares   each seals, for its neighbours, shares of its secrets  U2
    masks    each trains and sends its masked update                U3
    open     each of U3 gives one share of each neighbour: of the self mask of who is in U3,
             of the key of who is in U2 alone; the server takes the masks off the sum of U3

What a device does is in ``clients/secure.py``, the arithmetic and its sources in ``privacy/masking.py``, who
is whose neighbour and how many must stay in ``privacy/neighbours.py``. Any device may vanish at any stage.
Where too few stay, the sum cannot be opened: the round has failed, the model is what it was, and the next
round begins from there.

The sum is exact in fixed point, so masks, their keys and the name of a session change no bit of a model: the
name alone is drawn afresh, since a round that is begun again must not meet the masks of the first attempt.
Every device counts 1. The reception gets sum_k (start + clip(u_k)) and the number of devices, and of each
device's norm whether it was within the clip, summed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import numpy as np

from fedlam_app.base.keys import rng
from fedlam_app.base.records import MaskedOrder, SecureOrder, SecureReport, cut, framed_bytes
from fedlam_app.privacy.masking import KEYS, SENT, SHARED, Words, decode, scale_of
from fedlam_app.privacy.neighbours import graph
from fedlam_app.tables.jobs import FederationConfig
from strategies.adapter_round import AdapterFederation
from strategies.algorithm import Algorithm
from strategies.base import Grid
from strategies.cohort import Cohort
from strategies.device_dp import DeviceDp
from strategies.hands import Hands
from strategies.payloads import Bytes, Payloads
from strategies.secure_session import Said, Session, Unopened, overhead


class SecureFederation(AdapterFederation):
    """Runs a rule that averages over masked updates; ``reception.clip`` is the norm that devices clip to."""

    def __init__(
        self,
        algorithm: Algorithm,
        cell: str,
        devices: Sequence[int],
        where: FederationConfig,
        hands: Hands | None = None,
    ) -> None:
        super().__init__(algorithm, cell, devices, where, hands)
        assert isinstance(self.hands.reception, DeviceDp)
        self.reception = self.hands.reception
        self.payloads = MaskedPayloads(algorithm, self.ids)

    def _work(self, grid: Grid, cohort: Cohort) -> None:
        """Have the devices of a cohort do their work under masks, and give the rule its sum."""
        privacy = self.algorithm.config.privacy
        session = Session(secrets.token_hex(16), cohort.devices, privacy.survivors)
        self.closed = False
        try:
            self._share(grid, session, cohort)
            words = self._gather(grid, session, cohort)
            opened = self._asked(grid, session, cohort, "open", session.at_least(SENT))
            self._give(session, cohort, session.sum(words, opened))
        except Unopened as error:
            self.closed = True
            self.failed(f"round {cohort.number}: {error}; the model stays as it is")

    def _share(self, grid: Grid, session: Session, cohort: Cohort) -> None:
        """Have devices agree on keys, and give each other shares of their secrets."""
        if len(set(cohort.kinds.values())) > 1:
            raise Unopened("devices that start from unlike models or have unlike ranks have no common sum")
        session.bundles = self._asked(grid, session, cohort, "keys", cohort.devices)
        session.note(KEYS, session.bundles)
        config = self.algorithm.config
        draw = rng(config.seed, "neighbours", cohort.number)
        session.joined = graph(session.at_least(KEYS), config.privacy.neighbours, draw)
        shares = self._asked(grid, session, cohort, "shares", session.at_least(KEYS))
        session.take_sealed(shares)
        session.note(SHARED, shares)

    def _gather(self, grid: Grid, session: Session, cohort: Cohort) -> dict[int, Words]:
        """Return the masked vectors (q + 1,) that arrive."""
        orders = []
        for node, own in self.shares(grid, session.at_least(SHARED)):
            orders.append((node, session.masking(self._order(own, cohort, {}), self.reception.clip)))
        size = 4 * (cohort.width(cohort.devices[0]) + 1)
        found = self._answers(grid, cohort, orders, lambda k: size)
        found = {k: part for k, part in found.items() if k not in self.hands.lost}
        session.note(SENT, found)
        return {k: np.frombuffer(part, "<u4") for k, part in found.items()}

    def _give(self, session: Session, cohort: Cohort, total: Words) -> None:
        """Give the reception the sum, and note who has done the round."""
        sent, first = session.at_least(SENT), cohort.devices[0]
        update, inside = decode(total, scale_of(self.reception.clip, len(cohort.devices)))
        full = len(sent) * cohort.full(first).astype(np.float64)
        full[cohort.returned(first)] += update
        places = self._place(sent)
        self.heard[places], self.holds[places] = cohort.number, len(self.algorithm.entries())
        cohort.norms |= dict.fromkeys(sent, np.inf)  # who came; how far, nobody knows
        self._weight = float(len(sent))
        self.reception.fold_sum(full, self._weight, inside)

    # --- messages -------------------------------------------------------------------------------------

    def _asked(
        self, grid: Grid, session: Session, cohort: Cohort, stage: str, devices: Sequence[int]
    ) -> Said:
        """Return what devices answer to a stage without training."""
        orders = [
            (node, session.order(self.cell, cohort.number, stage, own))
            for node, own in self.shares(grid, devices)
        ]
        return self._answers(grid, cohort, orders, lambda k: session.length(k, stage))

    def _answers(
        self,
        grid: Grid,
        cohort: Cohort,
        orders: Sequence[tuple[int, SecureOrder | MaskedOrder]],
        length: Callable[[int], int],
    ) -> Said:
        """Return what devices answer, in their order; an answer of another length did not come."""
        found: Said = {}

        def take(report: SecureReport) -> None:
            for why in report.complaints:
                self.failed(f"round {cohort.number}: {why}")
            for k, part in zip(report.devices, cut(report.payload, report.sizes), strict=True):
                self._carried(cohort, k, len(part), 0)
                if len(part) == length(k):
                    found[k] = part.tobytes()
                else:
                    self.failed(f"round {cohort.number}: device {k} sent {len(part)} bytes, not {length(k)}")

        for _, one in orders:
            self._count_down(cohort, one)
        self.ask(grid, cohort.number, orders, SecureReport, take)
        return dict(sorted(found.items()))

    def _count_down(self, cohort: Cohort, order: SecureOrder | MaskedOrder) -> None:
        """Count what each device's own link carries of an order, beside what training takes."""
        if isinstance(order, MaskedOrder):
            sizes = [len(order.keys) // max(1, len(order.peers)) * count for count in order.counts]
        else:
            sizes = order.sizes
        for k, size in zip(order.devices, sizes, strict=True):
            self._carried(cohort, k, 0, size)

    def _carried(self, cohort: Cohort, device: int, up: int, down: int) -> None:
        """Charge a device's link with bytes."""
        for size, own in ((up, cohort.bytes_up), (down, cohort.bytes_down)):
            if size:
                own[device] = own.get(device, 0) + framed_bytes((size,), "|u1")
        self.cost.bytes_up += framed_bytes((up,), "|u1") if up else 0
        self.cost.bytes_down += framed_bytes((down,), "|u1") if down else 0


class MaskedPayloads(Payloads):
    """What a round of masked updates asks of each link: the vector, and all that opens the masks."""

    def of(self, number: int) -> tuple[Bytes, Bytes]:
        config, (up, down) = self.algorithm.config, super().of(number)
        more_up, more_down = overhead(config.train.wanted, config.privacy.neighbours)
        return up + more_up, down + more_down
