"""Nobody waits: devices begin when a place is free, and a step is taken when enough of them are back.

J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639:
``train.cohort`` devices are at work at any time; whenever one is back, the policy sends another; the first
``fedbuff.buffer`` whose updates arrive make a step (``versions.py`` says what an old update counts). Events
happen in the order of virtual finishing times, ties by device, whatever the machine does.

A device's whole course is known when it begins, so its work is run when it is due, together with the others
of its step, and not at all where its update will be lost. Each has an equal share of the band while it is at
work: who will be on air beside it is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.wireless.fleet import Load
from strategies.airtime import share
from strategies.endings import synchronous
from strategies.participation import Arrays, Heard, Loads, Poll, Turn
from strategies.selection.base import Outcome
from strategies.wireless import IDLE_WAIT_S, Wireless, enough

JOB = np.dtype(
    [
        ("id", np.int64),
        ("began_s", np.float64),
        ("finish_s", np.float64),
        ("version", np.int64),  # steps that had been taken when it began
        ("arrives", np.bool_),
        ("energy_j", np.float64),
        ("factor", np.float64),
    ]
)


@dataclass
class Back:
    """The devices that a step is made of, in the order in which they came back."""

    number: int
    jobs: NDArray[np.void]  # of JOB
    turn: Turn
    ends_s: float


class Concurrent(Wireless):
    """Wireless work without rounds."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.work = np.zeros(0, JOB)
        self.starts = 0
        self._back: Back | None = None
        self.buffer = self.policy.a_turn = min(self.config.fedbuff.buffer, self.wanted)

    def turn(self, number: int, load: Loads, poll: Poll | None) -> Turn:
        if self._back is None or self._back.number != number:
            self._back = self._wait(number, load(), poll)
        return self._back.turn

    def settle(self, heard: Heard) -> None:
        assert self._back is not None
        back, self._back = self._back, None
        jobs = np.sort(back.jobs, order="id")
        loss, norm = heard.of(jobs["id"])
        outcome = Outcome(
            number=back.number,
            ids=jobs["id"],
            arrived=jobs["arrives"] & ~(np.isnan(loss) & np.isnan(norm)),
            time_s=jobs["finish_s"] - jobs["began_s"],
            energy_j=jobs["energy_j"],
            loss=loss,
            norm=norm,
            examples=self.examples[jobs["id"]].astype(np.float64),
            round_s=back.ends_s - self.now,
        )
        self.now = back.ends_s
        self._learn(outcome, trained=len(jobs))

    def at_work(self) -> set[int]:
        return set(self.work["version"].tolist())

    def state(self) -> Arrays:
        jobs = {f"fleet.work.{name}": np.ascontiguousarray(self.work[name]) for name in JOB.names or ()}
        return {**super().state(), **jobs, "fleet.own.starts": np.array(self.starts)}

    def load(self, state: Arrays) -> None:
        columns = {name: state.pop(f"fleet.work.{name}") for name in JOB.names or ()}
        self.work = np.zeros(len(columns["id"]), JOB)
        for name, column in columns.items():
            self.work[name] = column
        self.starts = int(state["fleet.own.starts"])
        super().load(state)

    # --- helpers ------------------------------------------------------------------------------------

    def _wait(self, number: int, load: Load, poll: Poll | None) -> Back:
        """Send devices out and take them back until enough updates have arrived."""
        now, back = self.now, np.zeros(0, JOB)
        while int(back["arrives"].sum()) < self.buffer:
            reachable = self._send(number, now, load, poll, back["id"])
            if len(self.work) == 0 and len(back):
                break  # everybody there is has been back in this step, and some were lost
            if len(self.work) == 0 and reachable:
                now += IDLE_WAIT_S
                break  # the policy wants nobody now: it may once it has learned that time went by
            if len(self.work) == 0:
                now += IDLE_WAIT_S
                enough(now - self.now)
                continue
            first = np.lexsort((self.work["id"], self.work["finish_s"]))[0]
            now = max(now, float(self.work["finish_s"][first]))
            back = np.append(back, self.work[first])
            self.work = np.delete(self.work, first)
        came = np.sort(back[back["arrives"] | self.all_work], order="id")
        turn = Turn(
            ids=came["id"].tolist(),
            steps=[self.steps] * len(came),
            factors=came["factor"].tolist(),
            versions=came["version"].tolist(),
            number=number,
            lost=came["id"][~came["arrives"]].tolist(),
        )
        return Back(number, back, turn, now)

    def _send(self, number: int, now: float, load: Load, poll: Poll | None, done: NDArray[np.int64]) -> int:
        """Let the policy fill the free places, and return how many it could choose from.

        Nobody is sent twice in one step.
        """
        free = self.wanted - len(self.work)
        if free == 0:
            return 0
        self.starts += 1
        self.fleet.advance(now)
        state, view = self.offered(number, free, load, self.wanted, self.starts)
        idle = np.flatnonzero(~np.isin(view.ids, np.concatenate([self.work["id"], done])))
        state, view = state.at(idle), view.at(idle)
        draw = rng(self.config.seed, "select", self.starts)
        asked = self.asked(state, view, load, poll, draw)
        state, view = asked.state, asked.view
        choice = self.policy.select(state, draw)
        order = np.argsort(choice.places)
        places = choice.places[order]
        air = share(
            self.config, self.fleet, view.at(places), state.at(places), load, np.inf, draw, self.wanted
        )
        ending = synchronous(air.course, self.steps)
        energy_j = air.energy_j(ending, self.steps)
        jobs = np.zeros(len(places), JOB)
        jobs["id"], jobs["began_s"], jobs["version"] = air.ids, now, number - 1
        jobs["finish_s"], jobs["arrives"] = now + asked.time_s + ending.worked_s, ending.arrived
        jobs["energy_j"] = energy_j
        # Without rounds there is no sum to be unbiased: the weights are relative.
        jobs["factor"] = 1.0 if choice.weights is None else choice.weights[order]
        self.fleet.spend(air.ids, energy_j)
        self.work = np.concatenate([self.work, jobs])
        return len(idle)
