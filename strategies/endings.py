"""What a round waits for: who of the chosen is in time, who is lost, and when the round ends.

Latency, losses and sessions are analytic, so all of this is known before any device is trained, and only
those whose updates arrive are trained at all. In the simulated world more devices work than that:

    chosen = arrived + lost + late,      trained = arrived + lost

*lost* did its work, and its update did not come through (a packet lost, a session that ended); *late*
declined what it could not finish, or is stopped as the round ends, having spent its share of the energy.

    synchronous      waits for everybody; a lost session is noticed when it breaks off
    deadline         as many local steps as fit:  floor(E (T - down - up) / compute), none: late
    over-selection   asks for more than it wants and ends with the last that it wanted (K. Bonawitz et al.,
                     "Towards Federated Learning at Scale: System Design", MLSys 2019, arXiv:1902.01046)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The k chosen devices' rounds as they would go if nobody stopped them, (k,) each."""

    down_s: Seconds  # until the model is there, polls included
    compute_s: Seconds  # all local steps
    up_s: Seconds  # inf: it got no band
    session_s: Seconds  # how long it can be reached yet
    intact: Flags  # whether its packet will come through

    @property
    def time_s(self) -> Seconds:
        """When each update is in."""
        return self.down_s + self.compute_s + self.up_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a round ended."""

    arrived: Flags  # (k,)
    lost: Flags  # (k,)
    steps: NDArray[np.int64]  # (k,) local steps of each that arrived or was lost
    time_s: Seconds  # (k,) when each update was in, or would have been
    worked_s: Seconds  # (k,) how long each was busy
    round_s: float

    @property
    def late(self) -> Flags:
        """Who was stopped."""
        return ~(self.arrived | self.lost)


def synchronous(course: Course, steps: int) -> Ending:
    """Wait for everybody."""
    time_s = course.time_s
    stays = (time_s <= course.session_s) & np.isfinite(time_s)
    arrived = stays & course.intact
    none = ~np.isfinite(time_s)  # it got no band, and would wait for ever: it is not asked
    busy = np.where(none, 0.0, np.minimum(time_s, course.session_s))
    return Ending(
        arrived=arrived,
        lost=~arrived & ~none,
        steps=np.where(none, 0, steps),
        time_s=time_s,
        worked_s=busy,
        round_s=float(busy.max(initial=0.0)),
    )


def deadline(course: Course, steps: int, deadline_s: float) -> Ending:
    """Let each do the steps that fit before the deadline; who can do none declines when it is asked."""
    spare_s = deadline_s - course.down_s - course.up_s
    step_s = np.maximum(course.compute_s / steps, 1e-12)
    fit = np.floor(np.clip(spare_s / step_s * (1.0 + 1e-12), 0.0, steps)).astype(np.int64)
    shorter = Course(
        down_s=course.down_s,
        compute_s=course.compute_s * fit / steps,
        up_s=np.where(fit > 0, course.up_s, np.inf),
        session_s=course.session_s,
        intact=course.intact,
    )
    waited = synchronous(shorter, steps)
    return Ending(
        arrived=waited.arrived,
        lost=waited.lost,
        steps=fit,
        time_s=np.where(fit > 0, waited.time_s, course.time_s),
        worked_s=waited.worked_s,
        round_s=waited.round_s,
    )


def over_selection(course: Course, steps: int, wanted: int) -> Ending:
    """End with the ``wanted``-th update that comes in; the rest is stopped."""
    all_of_them = synchronous(course, steps)
    in_time = np.flatnonzero(all_of_them.arrived)
    if len(in_time) <= wanted:
        return all_of_them
    order = np.lexsort((in_time, all_of_them.time_s[in_time]))  # ties by place
    first = in_time[order[:wanted]]
    round_s = float(all_of_them.time_s[first].max())
    arrived = np.zeros(len(course.up_s), bool)
    arrived[first] = True
    return Ending(
        arrived=arrived,
        lost=all_of_them.lost & (all_of_them.worked_s <= round_s),
        steps=all_of_them.steps,
        time_s=all_of_them.time_s,
        worked_s=np.minimum(all_of_them.worked_s, round_s),
        round_s=round_s,
    )
