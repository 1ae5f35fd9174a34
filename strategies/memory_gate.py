"""Who can take part at all, and at which rank: a model must fit into half of a device's memory.

    adapter space    p c + 16 t + r q 16 + activations <= RAM / 2      the whole model trains on the device
    gradient space   p_dev c + 16 t_dev + blocks + activations <= RAM / 2       embedding, head, first blocks

The gate itself, its half and its 16 bytes of a trained parameter are those of ``wireless/compute.py``. Here
its sizes are counted: p frozen parameters of c bytes (``model.precision``); t that train and are no factors
(front end, head, layer norms); q = sum (inputs + outputs) over the adapted linears, a rank's parameters.
Activations, as they are kept for the backward pass of a batch, are estimated:

    17 values of c bytes for each token, width and block

by the 34 bytes at half precision of V. Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv:2205.05198 (recalled, not re-read), without the scores of the attention, which grow
with the square of the tokens; a model that is no transformer counts as one block, and so does what a device
has of a split beside its blocks.

A rule of unlike ranks gives a device the largest rank that fits, up to its own of ``train.ranks``; under the
others a device that does not hold the common rank takes no part. Departures: rank 0 takes no part either,
as nothing of the backbone would train; batches are of ``train.batch-rows`` samples for everyone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedlam_app.config import RunConfig
from fedlam_app.models.cut import FrontEmbedding
from fedlam_app.models.split import SplitModel
from fedlam_app.rules import has_backbone
from fedlam_app.tasks.base import Cost
from fedlam_app.wireless.compute import TRAINED_BYTES, feasible_cut, feasible_rank
from strategies.algorithm import Algorithm

VALUES = 17  # kept of each token, width and block
VALUE_BYTES = {"float32": 4, "float64": 8}

Able = NDArray[np.bool_] | None
Limits = NDArray[np.int64] | None


def gate(
    config: RunConfig, cost: Cost, model: SplitModel, algorithm: Algorithm, ram: NDArray[np.float32]
) -> tuple[Able, Limits]:
    """Return who can take part (N,), and the largest rank (N,), at least 1, of each; ``ram`` (N,) in bytes.

    Either is ``None`` where memory forbids nobody anything. ValueError where nobody can take part.
    """
    if algorithm.space == "gradient":
        able, limits = feasible_blocks(config, cost, model, ram) >= config.split.device_blocks, None
    else:
        fits = largest_rank(config, cost, model, algorithm, ram)
        wanted = algorithm.ranks()
        least = np.minimum(wanted, 1) if algorithm.unlike_ranks else wanted
        able = fits >= least
        bound = algorithm.unlike_ranks and bool((able & (fits < wanted)).any())
        limits = np.maximum(fits, 1).astype(np.int64) if bound else None
    if not able.any():
        raise ValueError(
            f"no device can hold its part of the model: the largest of 'fleet.profiles' ="
            f" '{config.fleet.profiles}' has {float(ram.max()) / 1e9:g} GB, half of which is for training;"
            f" {_remedy(config, algorithm)}"
        )
    return (None if able.all() else able), limits


def largest_rank(
    config: RunConfig, cost: Cost, model: SplitModel, algorithm: Algorithm, ram: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Return the largest rank (N,) that fits, at most the layout's; -1 where not even the model does.

    Where no linear is adapted, what fits at all fits at rank 0.
    """
    layout = algorithm.layout
    each = sum(pair.inputs + pair.outputs for pair in layout.pairs)
    trained = layout.size - layout.rank * each  # no factors
    depth = config.model.blocks if has_backbone(config) else 1
    return feasible_rank(
        ram,
        params=_count(model) - layout.size,
        param_bytes=VALUE_BYTES[config.model.precision],
        params_per_rank=max(each, 1),
        activation_bytes=TRAINED_BYTES * trained + depth * activation_bytes(config, cost),
        most=layout.rank,
    )


def feasible_blocks(
    config: RunConfig, cost: Cost, model: SplitModel, ram: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Return how many of ``split.device-blocks`` fit beside embedding and head (N,); -1: not even those."""
    value, blocks = VALUE_BYTES[config.model.precision], config.split.device_blocks
    front = model.embedding.front if isinstance(model.embedding, FrontEmbedding) else nn.Module()
    in_blocks, trained_in_blocks = _count(front), _trained(front)
    kept = _count(model.embedding) + _count(model.head) - in_blocks
    trained = _trained(model.embedding) + _trained(model.head) - trained_in_blocks
    fixed = (kept - trained) * value + trained * TRAINED_BYTES + activation_bytes(config, cost)
    return feasible_cut(
        ram,
        params=fixed / value,
        params_per_block=(in_blocks - trained_in_blocks) / max(blocks, 1),
        trained_per_block=trained_in_blocks / max(blocks, 1),
        param_bytes=value,
        activation_bytes_per_block=activation_bytes(config, cost),
        blocks=blocks,
    )


def activation_bytes(config: RunConfig, cost: Cost) -> float:
    """Return the bytes that one block keeps of a batch."""
    value = VALUE_BYTES[config.model.precision]
    return float(VALUES * value * cost.elements_embedding * config.train.batch_rows)


def _remedy(config: RunConfig, algorithm: Algorithm) -> str:
    if algorithm.space == "gradient":
        return f"keep less than 'split.device-blocks' = {config.split.device_blocks}, or smaller batches"
    return (
        f"'model.backbone' = '{config.model.backbone}', 'model.blocks' = {config.model.blocks} or"
        f" 'train.batch-rows' = {config.train.batch_rows} must be smaller, or the strategy one of"
        " gradient space"
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
