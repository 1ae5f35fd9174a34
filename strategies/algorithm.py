"""The contract of an aggregation rule: arithmetic on flat vectors, and nothing else.

A rule sees device ids, float32 vectors of length p and weights; Flower, torch, files and clocks stay outside
(``base.py``, ``split_lora.py``). Two families, by what a device hands in:

    adapter    its vector after ``train.local-steps`` steps of its own     (FedIT, FLoRA, FlexLoRA, ...)
    gradient   the gradient of its batch at the vector it was given        (FedSGD, median, FedBuff, ...)

In the gradient family the large model stays on the edge server, the vector is the server's LoRA alone, and
a round is ``train.local-steps`` steps. Both families have the same five methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector
from fedlam_app.config import RunConfig

Vectors = NDArray[np.float32]  # (m, p)


@dataclass(frozen=True)
class Plan:
    """What the devices of a round do with their vector; parts are 'a', 'b' and 'other', joined by '+'."""

    trains: str = "a+b+other"
    returns: str = "a+b+other"
    keeps: str = ""  # stays on the device from one of its rounds to the next, and never travels
    proximal: float = 0.0  # mu of the term mu/2 ||w - w_start||^2
    probe: bool = False  # instead of training, return the first gradient's best factors (see fed_sb)


@dataclass(frozen=True)
class Entry:
    """Something every device keeps once it has received it: LoRA-layout factors of any rank."""

    kind: str  # 'merge': W0 += scale * B A; 'basis': the fixed factors of Fed-SB
    rank: int
    vector: Vector  # A then B of every pair, as the layout orders them, at this rank


class Algorithm:
    """What to send, how to fold, when to step. A rule overrides what differs from plain sending."""

    space: ClassVar[str] = "adapter"
    lora: ClassVar[bool] = False  # needs LoRA factors
    unlike_ranks: ClassVar[bool] = False  # devices may have ranks of their own
    linear: ClassVar[bool] = False  # the step depends on the weighted sum of the vectors alone: see fold_sum
    sequential: ClassVar[bool] = False  # gradients are taken one device at a time, at the newest model
    waits: ClassVar[bool] = True  # a step waits for its whole cohort, and not for the first few
    state_names: ClassVar[
        tuple[str, ...]
    ] = ()  # array attributes that a resumed run needs, beside the models

    limits: NDArray[np.int64] | None = None  # (N,) largest rank that a device's memory allows; None: any
    absent: frozenset[int] = frozenset()  # who takes no part any more
    coins: Callable[[int], NDArray[np.bool_]] | None = None  # (N,) who takes part in a step, by chance

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        """Start every device from ``vector`` (p,)."""
        self.vector, self.devices, self.layout = vector, list(devices), layout
        self._ids = np.asarray(self.devices, np.int64)

    def cohort(self, number: int) -> list[int]:
        """Return the devices of step ``number`` (1-based), in ascending order; all of them by default."""
        wanted = self.config.train.cohort
        here = ~np.isin(self._ids, list(self.absent)) if self.absent else np.ones(len(self._ids), bool)
        if self.coins is not None:
            return self._ids[here & self.coins(number)].tolist()
        ids = self._ids[here]
        if not 0 < wanted < len(ids):
            return ids.tolist()
        draw = rng(self.config.seed, "cohort", number)
        return sorted(draw.choice(ids, wanted, replace=False).tolist())

    def rows(self, cohort: Sequence[int]) -> list[int]:
        """Return, for each device, the row of ``models()`` that it starts from."""
        return [0] * len(cohort)

    def plan(self, number: int) -> Plan:
        """Return what the devices of a round do."""
        return Plan()

    def rank(self, device: int) -> int:
        """Return the LoRA rank of a device: its profile's, or everyone's, as far as its memory goes."""
        ranks = self.config.train.ranks
        own = ranks[device % len(ranks)] if ranks else self.layout.rank
        return own if self.limits is None else min(own, int(self.limits[device]))

    def ranks(self) -> NDArray[np.int64]:
        """Return the LoRA ranks (N,) of all devices, in their order."""
        own = self.config.train.ranks or (self.layout.rank,)
        ranks = np.array(own, np.int64)[self._ids % len(own)]
        return ranks if self.limits is None else np.minimum(ranks, self.limits[self._ids])

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        """Take in one device's result (p,); called in the order of the devices."""
        raise NotImplementedError

    def fold_sum(self, total: NDArray[np.float64], weight: float) -> None:
        """Take in sum_k w_k v_k (p,) and sum_k w_k of several devices instead of each one's result.

        Called where the rule is ``linear``, in the order of the devices.
        """
        raise NotImplementedError

    def step(self) -> None:
        """End the step: turn what was folded into the next models."""
        raise NotImplementedError

    def models(self) -> Vectors:
        """Return the current models (m, p): one global model, or one a device."""
        return self.vector[None]

    def entries(self) -> Sequence[Entry]:
        """Return everything that was ever broadcast to be kept, oldest first; the list only grows."""
        return ()

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        return {"models": self.models(), **{name: getattr(self, name) for name in self.state_names}}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the arrays of an earlier step."""
        self.vector = state["models"][0].astype(self.vector.dtype)
        for name in self.state_names:
            setattr(self, name, state[name])
