"""FedSGD on the server's LoRA: the weighted mean of the devices' gradients, then one server step.

H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, arXiv:1602.05629 (FedSGD is its limit of one full-batch step); the server's optimisers are those of
``server_optimiser.py``.

    g = sum_k n_k g_k / sum_k n_k,   g <- g min(1, clip / ||g||),   w <- Optimiser(w, g)

The gradient of LoRA factors is averaged, and not the factors, so nothing is lost: with batch sizes as the
weights, g is the gradient of the pooled batch. (mean(B) mean(A) != mean(B A) concerns only rules whose
devices take steps of their own.) The mean is a running sum, in float64: memory is one vector.
:class:`Stacked` is for rules that must see the gradients one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.layout import Layout
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.vectors import Vector
from strategies.algorithm import Algorithm
from strategies.mixing import mixed
from strategies.server_optimiser import Doubles, ServerOptimiser


class FedSgdLora(Algorithm):
    """One vector, on the server. A step that no device answered moves nothing."""

    space: ClassVar[str] = "gradient"
    lora: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(vector, devices, layout)
        config = self.config
        self.optimiser = ServerOptimiser(config.server, config.train.weight_decay)
        self.steps = 0
        self.clear()

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self.total += np.multiply(vector, weight, dtype=np.float64)
        self.weight += weight

    def direction(self) -> Doubles:
        """Return the step's gradient (p,) from what was folded."""
        return self.total / self.weight

    def step(self) -> None:
        if self.weight > 0.0:
            self.descend(self.direction())
        self.clear()
        self.steps += 1

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {**super().state(), "steps": np.array(self.steps), **self.optimiser.state()}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        super().load(state)
        self.steps = int(state["steps"])
        self.optimiser.load(state)

    # --- what the rules that build on this one use or override -------------------------------------------

    def clear(self) -> None:
        """Forget what was folded."""
        self.total: Doubles = np.zeros(self.vector.shape)
        self.weight = 0.0

    def descend(self, gradient: Doubles) -> None:
        """Clip ``gradient`` (p,) to ``train.clip-norm`` and take one server step along it."""
        train = self.config.train
        lr = learning_rate(train.lr, train.rounds, (self.steps + 1) / train.local_steps)
        self.vector = self.optimiser.step(self.vector, clipped(gradient, train.clip_norm), lr)


class Stacked(FedSgdLora):
    """FedSGD with another combination than the mean: a rule is its ``combine``, after ``robust.mix``."""

    linear: ClassVar[bool] = False

    def combine(self, devices: Sequence[int], gradients: Doubles, weights: Doubles) -> Doubles:
        """Return one gradient (p,) for the ``gradients`` (n, p) of the devices that answered."""
        raise NotImplementedError

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        self.answers.append((device, vector.astype(np.float64), weight))
        self.weight += weight

    def direction(self) -> Doubles:
        devices, rows, weights = zip(*self.answers, strict=True)
        gradients, robust = np.stack(rows), self.config.robust  # (n, p)
        if robust.mix:
            gradients = mixed(gradients, robust.byzantine)
        return self.combine(devices, gradients, np.array(weights, np.float64))

    def clear(self) -> None:
        self.answers: list[tuple[int, Doubles, float]] = []
        self.weight = 0.0


def clipped(gradient: Doubles, largest: float) -> Doubles:
    """Return ``gradient`` with a norm of at most ``largest`` (0: as it is), as ``clip_grad_norm_`` does."""
    if largest == 0.0:
        return gradient
    return gradient * min(1.0, largest / (float(np.linalg.norm(gradient)) + 1e-6))
