"""The fleet takes part: each turn the world moves on, a policy chooses, the band is shared, the clock runs.

    now             the fleet moves to virtual time now: positions, path loss, sessions, batteries
    look            of those that can be reached: gains, times, energies of this round
    poll, select    the policy, with what it asked for paid in time, bytes and energy
    share           an allocator gives the chosen their bands, and so their finishing times
    end             synchronous, deadline or over-selection (``endings.py``): who arrives, who is lost or late
    settle          real payload bytes replace the planned ones; queues, history and batteries are brought up

Everything here is arithmetic on arrays over devices, and nothing is trained for a result that will not come.
The cost of a round is the task's ``cost()`` and the bytes of its messages (``Load``), unless the
configuration says otherwise (``fleet.flops-per-sample``, ``fleet.update-mb``).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.registry import pick
from fedlam_app.config import RunConfig
from fedlam_app.wireless.fleet import Fleet, Load, View
from strategies.airtime import Airtime, ends_by, known, share
from strategies.endings import Ending, deadline, over_selection, synchronous
from strategies.history import History
from strategies.participation import Arrays, Heard, Loads, Participation, Poll, Turn
from strategies.polling import Polled, polled
from strategies.selection import POLICIES
from strategies.selection.base import Outcome, RoundState

CHARGED_AS_SENT = ("dp-sgd", "jacobian", "logit")
IDLE_WAIT_S, LONGEST_WAIT_S = 60.0, 7 * 86400.0  # when nobody can be reached


def enough(waited_s: float) -> None:
    """Raise ``RuntimeError`` where nobody could be reached for longer than a run shall wait."""
    if waited_s > LONGEST_WAIT_S:
        raise RuntimeError(
            f"no device could be reached for {LONGEST_WAIT_S / 86400:g} days of virtual time; see"
            " 'fleet.on-share', 'fleet.battery-floor' and 'wireless.radius-m'"
        )


@dataclass
class Tally:
    """What the run's log says, summed over turns."""

    chosen: int = 0
    trained: int = 0  # worked to the end: arrived + lost
    arrived: int = 0
    lost: int = 0
    late: int = 0
    polled: int = 0
    poll_bytes: float = 0.0
    energy_j: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A turn between its choice and its settlement."""

    number: int
    turn: Turn
    air: Airtime
    ending: Ending


class Wireless(Participation):
    """Devices with radios, computers and batteries, and a policy that chooses among them."""

    def __init__(self, config: RunConfig, steps: int, examples: NDArray[np.float32]) -> None:
        """``steps`` are the local steps of a turn, ``examples`` (N,) the devices' training examples."""
        self.config, self.steps, self.examples = config, steps, examples
        count = len(examples)
        self.fleet = Fleet(config.fleet, config.wireless, count, config.seed, examples)
        kind = pick(POLICIES, config.selection.policy, "selection.policy")
        self.policy = kind(config.selection, count, config.seed)
        self.history = History(count)
        self.link = self.fleet.link
        self.band_hz = config.wireless.band_mhz * 1e6
        self.wanted = min(config.train.wanted, count)
        self.now, self.tally = 0.0, Tally()
        self.by_examples = True  # whether results are weighted by devices' examples, and not by batches
        self.forward = 1.0 / 3.0  # of a training step's work: a poll for the loss runs no backward pass
        self.policy.a_turn = self.wanted
        self.able: NDArray[np.bool_] | None = None  # (N,) whose memory holds the work; None: everyone's
        self.left: frozenset[int] = frozenset()  # who takes no part any more
        # Of these, what has left a device has cost it privacy, lost or not.
        self.all_work = config.privacy.mechanism in CHARGED_AS_SENT
        self._pending: Pending | None = None

    # --- a turn -------------------------------------------------------------------------------------

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        if self._pending is None or self._pending.number != number:
            self._pending = self._choose(number, load(), poll)
        return self._pending.turn

    def settle(self, heard: Heard) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        air, ending = pending.air, pending.ending
        time_s = ending.time_s + np.where(ending.arrived, self._slip_s(air, heard), 0.0)
        lost_s = np.where(ending.lost, ending.worked_s, 0.0).max(initial=0.0)
        round_s = max(float(np.where(ending.arrived, time_s, 0.0).max(initial=0.0)), lost_s)
        if ending.late.all():
            round_s += IDLE_WAIT_S  # nobody could be in time: asking at once would change nothing
        energy_j = air.energy_j(ending, self.steps)
        loss, norm = heard.of(air.ids)
        arrived = ending.arrived & ~(np.isnan(loss) & np.isnan(norm))  # losses may be withheld
        outcome = Outcome(
            number=pending.number,
            ids=air.ids,
            arrived=arrived,
            time_s=time_s,
            energy_j=energy_j,
            loss=np.where(arrived, loss, np.nan),
            norm=np.where(arrived, norm, np.nan),
            examples=self.examples[air.ids].astype(np.float64),
            round_s=round_s,
        )
        self.now += round_s
        self.fleet.spend(air.ids, energy_j)
        self._learn(outcome, trained=int((ending.arrived | ending.lost).sum()))

    @property
    def deserted(self) -> bool:
        able = np.ones(len(self.examples), bool) if self.able is None else self.able.copy()
        able[list(self.left)] = False
        return not able.any()

    def leave(self, devices: Collection[int]) -> None:
        self.left = frozenset(devices)

    def seconds(self) -> float:
        return self.now

    def summary(self) -> dict[str, float]:
        return {**asdict(self.tally), "jain": self.history.jain()}

    def state(self) -> Arrays:
        rooms: dict[str, Arrays] = {
            "world": self.fleet.state(),
            "history": self.history.state(),
            "policy": self.policy.state(),
            "own": {"now": np.array(self.now), "tally": np.array(astuple(self.tally), np.float64)},
        }
        return {f"fleet.{room}.{name}": array for room, own in rooms.items() for name, array in own.items()}

    def load(self, state: Arrays) -> None:
        rooms: dict[str, Arrays] = {"world": {}, "history": {}, "policy": {}, "own": {}}
        for key in [key for key in state if key.startswith("fleet.")]:
            _, room, name = key.split(".", 2)
            rooms[room][name] = state.pop(key)
        self.fleet.load(rooms["world"])
        self.history.load(rooms["history"])
        self.policy.load(rooms["policy"])
        self.now = float(rooms["own"]["now"])
        values = dict(zip(asdict(Tally()), rooms["own"]["tally"].tolist(), strict=True))
        counts = {name: int(value) for name, value in values.items() if not name.endswith(("_j", "_bytes"))}
        self.tally = Tally(**values | counts)

    # --- what concurrent work shares ----------------------------------------------------------------------

    def offered(
        self, number: int, wanted: int, load: Load, places: int = 0, look: int = 0
    ) -> tuple[RoundState, View]:
        """Return who can be reached now, as a policy sees it and as the radio does.

        ``look`` is the number of the draw, where there are several in a turn.
        """
        view = self.fleet.look(look or number, self.wanted, load)
        if self.able is not None:
            view = view.at(np.flatnonzero(self.able[view.ids]))
        if self.left:
            view = view.at(np.flatnonzero(~np.isin(view.ids, list(self.left))))
        seen = number, self.now, wanted, self.band_hz, self.link, view, load, self.history, self.examples
        return known(*seen, places), view

    def asked(
        self, state: RoundState, view: View, load: Load, poll: Poll | None, draw: np.random.Generator
    ) -> Polled:
        """Let the policy poll, and pay for it."""
        part = self.forward / self.steps
        found = polled(self.policy, self.link, part, state, view, load, poll, draw)
        if len(found.energy_j):
            self.fleet.spend(found.view.ids, found.energy_j)
            self.tally.polled += len(found.view.ids)
            self.tally.poll_bytes += found.moved_bytes
            self.tally.energy_j += float(found.energy_j.sum())
        return found

    def _learn(self, outcome: Outcome, trained: int) -> None:
        """Give a round's outcome to whoever learns from it, and to the log; ``trained`` worked to the end."""
        self.policy.feedback(outcome)
        self.history.note(outcome)
        arrived, tally = int(outcome.arrived.sum()), self.tally
        tally.chosen += len(outcome.ids)
        tally.late += len(outcome.ids) - trained
        tally.trained += trained
        tally.arrived += arrived
        tally.lost += trained - arrived
        tally.energy_j += float(outcome.energy_j.sum())

    # --- helpers ------------------------------------------------------------------------------------

    def _choose(self, number: int, load: Load, poll: Poll | None) -> Pending:
        """Let the policy choose, share the band, and see how the round will go."""
        selection = self.config.selection
        more = selection.over if selection.mode == "over-selection" else 1.0
        began = self.now
        while True:
            self.fleet.advance(self.now)
            state, view = self.offered(number, math.ceil(more * self.wanted), load)
            if len(state):
                break
            self.now += IDLE_WAIT_S
            enough(self.now - began)
        draw = rng(self.config.seed, "select", number)
        reachable = float(state.examples.sum(dtype=np.float64))
        asked = self.asked(state, view, load, poll, draw)
        choice = self.policy.select(asked.state, draw)
        order = np.argsort(choice.places)
        state, view = asked.state.at(choice.places[order]), asked.view.at(choice.places[order])
        air = share(
            self.config, self.fleet, view, state, load, ends_by(self.config, state, self.wanted), draw
        )
        course = replace(air.course, down_s=air.course.down_s + asked.time_s)
        air = replace(air, course=course)
        ending = self._ending(air)
        # Fewer steps count for more: FedNova's direction (J. Wang et al., arXiv:2007.07481).
        factors = self.steps / np.maximum(ending.steps, 1)
        if choice.weights is not None:
            factors = factors * choice.weights[order] / np.maximum(1.0 - air.error, 1e-6)
        here = np.flatnonzero(ending.arrived | (ending.lost & self.all_work))
        turn = Turn(
            number=number,
            ids=air.ids[here].tolist(),
            steps=ending.steps[here].tolist(),
            factors=factors[here].tolist(),
            base=reachable / len(self.examples) if choice.weights is not None and self.by_examples else 0.0,
            snr=air.snr[here].tolist() if len(air.snr) else [],
            mean_snr=air.mean_snr[here].tolist() if len(air.snr) else [],
            error=air.error[here].tolist(),
            lost=air.ids[ending.lost].tolist() if self.all_work else [],
        )
        return Pending(number, turn, air, ending)

    def _ending(self, air: Airtime) -> Ending:
        selection = self.config.selection
        if selection.mode == "deadline":
            return deadline(air.course, self.steps, selection.deadline_s)
        if selection.mode == "over-selection":
            return over_selection(air.course, self.steps, self.wanted)
        return synchronous(air.course, self.steps)

    def _slip_s(self, air: Airtime, heard: Heard) -> NDArray[np.float64]:
        """Return how much later (k,) devices were because their payloads were not what was planned."""
        exact = not heard.bytes_up and not heard.bytes_down
        if exact or self.config.fleet.update_mb > 0.0:
            return np.zeros(len(air.ids))
        up, down = heard.bits(air.ids, air.bits_up, air.bits_down)
        later = (up - air.bits_up) / np.maximum(air.rate_bps, 1e-9)
        slower = (down - air.bits_down) * air.download_s / np.maximum(air.bits_down, 1.0)
        return later + slower
