"""How long a device works, and what fits into its memory: the roofline, and the memory gate.

    t = max(FLOP / throughput, bytes / memory bandwidth) + set-up
    p c + r q 16 + activations <= RAM / 2

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009. In the gate, p frozen parameters take c bytes each; a rank of LoRA adds q
parameters, each of which takes 16 bytes in training (value, gradient and Adam's two moments, in FP32), and r
is the rank. Half of the RAM is left to the system and to other apps. The gate is solved for r, or for how
many blocks of a split model a device can hold.

Assumptions of this project: the half, and a set-up of 0.1 s. Units: FLOP, B, s.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", np.float32, np.float64)

SETUP_S = 0.1
RAM_SHARE = 0.5
TRAINED_BYTES = 16  # of one trained parameter


def compute_s(
    flops: NDArray[Real] | Real | float,
    bytes_moved: NDArray[Real] | Real | float,
    throughput: NDArray[Real],
    memory: NDArray[Real],
) -> NDArray[Real]:
    """Return the time [s] of each device's work, in the shape and type of ``throughput``.

    ``throughput`` [FLOP/s] and ``memory`` [B/s] are what training reaches, not peaks; the work is one number
    for all devices, or one each.
    """
    return np.add(np.maximum(np.divide(flops, throughput), np.divide(bytes_moved, memory)), SETUP_S)


def feasible_rank(
    ram: NDArray[np.float32],
    *,
    params: float,
    param_bytes: float,
    params_per_rank: float,
    activation_bytes: float,
    most: int,
) -> NDArray[np.int32]:
    """Return the largest rank of LoRA, 0 to ``most``, that each device can train; -1: the model does not fit.

    ``ram`` (N,) [B]. ``params_per_rank`` is the sum of (inputs + outputs) over the adapted linears.
    ValueError for a size that is negative, or ``params_per_rank`` that is not positive.
    """
    _not_negative(params=params, param_bytes=param_bytes, activation_bytes=activation_bytes, most=most)
    return _most(ram, params * param_bytes + activation_bytes, params_per_rank * TRAINED_BYTES, most)


def feasible_cut(
    ram: NDArray[np.float32],
    *,
    params: float,
    params_per_block: float,
    trained_per_block: float,
    param_bytes: float,
    activation_bytes_per_block: float,
    blocks: int,
) -> NDArray[np.int32]:
    """Return how many of ``blocks`` each device can hold and train; -1 where ``params`` alone do not fit.

    ``ram`` (N,) [B]; ``params`` are those that stay on a device under any cut (embedding, head). ValueError
    for a size that is negative, or blocks that take no memory.
    """
    _not_negative(params=params, param_bytes=param_bytes, blocks=blocks)
    _not_negative(params_per_block=params_per_block, trained_per_block=trained_per_block)
    _not_negative(activation_bytes_per_block=activation_bytes_per_block)
    block = params_per_block * param_bytes + trained_per_block * TRAINED_BYTES + activation_bytes_per_block
    return _most(ram, params * param_bytes, block, blocks)


def _most(ram: NDArray[np.float32], fixed: float, each: float, most: int) -> NDArray[np.int32]:
    """Return the largest n in 0..most with fixed + n each <= RAM / 2, and -1 where there is none."""
    if each <= 0:
        raise ValueError(f"the memory that each rank or block takes is {each} bytes; it must be above 0")
    left = ram.astype(np.float64) * RAM_SHARE - fixed
    return np.where(left < 0.0, -1, np.minimum(left // each, most)).astype(np.int32)


def _not_negative(**sizes: float) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} = {size} must not be negative")
