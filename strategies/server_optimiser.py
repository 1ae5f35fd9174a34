"""The edge server's optimiser: one step of a vector along a gradient, moments in float64.

    sgd      b <- mu b + g                                  w <- w - lr b
    adam     m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
             w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    adamw    the same, after w <- (1 - lr decay) w
    yogi     m as above,  v <- v - (1 - b2) sign(v - g^2) g^2     w <- w - lr m / (sqrt(v) + eps)
    adagrad  m as above,  v <- v + g^2                            w <- w - lr m / (sqrt(v) + eps)

sgd, adam and adamw are PyTorch's arithmetic, bias correction included, so that a federation equals a
centralised run. yogi and adagrad are FedYogi and FedAdagrad of S. J. Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, arXiv:2003.00295, algorithm 2: without bias correction, ``server.epsilon`` is its
tau, and v starts at its smallest allowed value tau^2.

Departures from that paper: the pseudo-gradient is a true gradient, since devices take no step of their own;
its FedAdam has no bias correction, which ours has. Only ``adamw`` decays weights.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector
from fedlam_app.tables.split import ServerConfig

Doubles = NDArray[np.float64]


class ServerOptimiser:
    """The rule named by ``server.optimiser``; ``weight_decay`` is adamw's."""

    def __init__(self, server: ServerConfig, weight_decay: float) -> None:
        self._server, self._weight_decay = server, weight_decay
        self._steps = 0
        # One number each until the first step: it broadcasts over a vector of any length.
        self._first: Doubles = np.zeros(())
        self._second: Doubles = np.array(
            server.epsilon**2 if server.optimiser in ("yogi", "adagrad") else 0.0
        )

    def step(self, vector: Vector, gradient: NDArray[np.floating], lr: float) -> Vector:
        """Return the vector (p,) after one step along ``gradient`` (p,), in the vector's own type."""
        server, w, g = self._server, vector.astype(np.float64), gradient.astype(np.float64)
        self._steps += 1
        if server.optimiser == "sgd":
            self._first = server.momentum * self._first + g
            return (w - lr * self._first).astype(vector.dtype)
        self._first = self._first + (1.0 - server.beta_1) * (g - self._first)
        square = g * g
        mean_over, root_over = 1.0, 1.0  # bias corrections
        if server.optimiser == "adagrad":
            self._second = self._second + square
        elif server.optimiser == "yogi":
            self._second = self._second - (1.0 - server.beta_2) * np.sign(self._second - square) * square
        else:
            self._second = server.beta_2 * self._second + (1.0 - server.beta_2) * square
            mean_over = 1.0 - server.beta_1**self._steps
            root_over = math.sqrt(1.0 - server.beta_2**self._steps)
        if server.optimiser == "adamw":
            w *= 1.0 - lr * self._weight_decay
        w -= (lr / mean_over) * self._first / (np.sqrt(self._second) / root_over + server.epsilon)
        return w.astype(vector.dtype)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the moments and the count of steps."""
        return {
            "optimiser-steps": np.array(self._steps),
            "optimiser-first": self._first,
            "optimiser-second": self._second,
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the moments of an earlier step."""
        self._steps = int(state["optimiser-steps"])
        self._first = state["optimiser-first"].astype(np.float64)
        self._second = state["optimiser-second"].astype(np.float64)
