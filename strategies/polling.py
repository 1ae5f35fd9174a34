"""What a policy asks before it chooses, and what asking costs.

    status   some bytes each way: resources, channel
    loss     the model down, one forward pass of a batch, and a status up; who is then chosen has the model

Everybody who is asked shares the band equally, the slowest ends the poll, and its seconds, bytes and joules
are the round's. In gradient space there is no model to send: the last loss stands, and a status is paid for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlam_app.wireless.fleet import Load, View
from fedlam_app.wireless.power import radio_energy_j
from fedlam_app.wireless.rates import Link
from strategies.airtime import each
from strategies.participation import Poll
from strategies.selection.base import Policy, RoundState

STATUS_BYTES = 64  # with headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Polled:
    """The devices that a policy may choose from, and what finding out cost."""

    state: RoundState
    view: View
    time_s: float = 0.0
    energy_j: NDArray[np.float64]  # (d,) of those who were asked
    moved_bytes: float = 0.0


def polled(
    policy: Policy,
    link: Link,
    forward: float,
    state: RoundState,
    view: View,
    load: Load,
    poll: Poll | None,
    draw: np.random.Generator,
) -> Polled:
    """Ask the candidates of ``policy``, if it polls; a forward pass is ``forward`` of a round's
    computation."""
    if not policy.polls:
        return Polled(state=state, view=view, energy_j=np.zeros(0))
    asked = np.sort(policy.candidates(state, draw))
    state, view = state.at(asked), view.at(asked)
    if len(asked) == 0:
        return Polled(state=state, view=view, energy_j=np.zeros(0))
    # An upload at an equal share of the chosen, cut to a status at an equal share of those who are asked.
    sharing = len(asked) / state.places
    status = 8.0 * STATUS_BYTES / link.efficiency / state.bits.astype(np.float64)
    status_s = state.upload_s * status * sharing
    time_s, energy_j = 2.0 * status_s, radio_energy_j(view.power_w.astype(np.float64), status_s)
    moved = 2.0 * STATUS_BYTES * len(asked)
    if policy.polls == "loss" and poll is not None:
        answers = poll(view.ids.tolist())
        losses = [answers.get(k, -np.inf) for k in view.ids.tolist()]  # the silent come last
        time_s = status_s + view.down_s + view.compute_s * forward
        energy_j = energy_j + view.compute_j * forward
        moved += float(each(load.bits_down, view.ids).sum()) / 8.0
        state = replace(state, loss=np.array(losses, np.float32), fixed_s=state.fixed_s - view.down_s)
        view = replace(view, down_s=np.zeros_like(view.down_s))
    return Polled(state=state, view=view, time_s=float(time_s.max()), energy_j=energy_j, moved_bytes=moved)
