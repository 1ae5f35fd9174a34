"""What a turn asks of a device: floating-point work, and bits up and down, from the task's cost and the wire.

    adapter space   r_k-part of the vector down and up;  E steps of the whole model on the device
    gradient space  representations down; Jacobians, and embeddings the server lacks, up; embedding and head
                    on the device, the backbone on the edge server

A training step costs a forward pass and a backward pass of twice its work; where what is frozen needs no
gradient of its own (LoRA, layer norms), once. ``fleet.flops-per-sample`` and ``fleet.update-mb`` replace the
model's own cost, so that a small model can stand for a large one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.split_bytes import downlink_bytes, uplink_bytes
from fedlam_app.config import RunConfig
from fedlam_app.models.split import SplitModel
from fedlam_app.rules import TEXT_TASKS
from fedlam_app.tasks.base import Cost
from fedlam_app.wireless.fleet import Load

FLOAT_BYTES = 4
Doubles = NDArray[np.float64]


def samples_a_step(config: RunConfig, examples: Doubles) -> Doubles:
    """Return how many samples (N,) a device's batch holds; of texts, as many as its shard is large."""
    rows = float(config.train.batch_rows)
    if config.task in TEXT_TASKS:
        return rows * examples / examples.mean()
    return np.full(len(examples), rows)


class WholeLoad:
    """Adapter space: a device trains the whole model."""

    def __init__(self, config: RunConfig, cost: Cost, model: SplitModel, examples: Doubles) -> None:
        """``examples`` (N,) are the devices'."""
        self.config, steps = config, config.train.local_steps
        self.samples = steps * samples_a_step(config, examples)  # (N,) of a round
        whole = passes(config) * (cost.flops_device + cost.flops_server)
        self.flops = (whole * self.samples).astype(np.float32)
        weights = FLOAT_BYTES * sum(p.numel() for p in model.parameters())
        self.bytes_moved = passes(config) * weights * steps  # once a pass

    def load(self, bytes_up: Doubles, bytes_down: Doubles) -> Load:
        """Return the load of a round whose payloads are these bytes (N,)."""
        load = Load(
            flops=self.flops,
            bytes_moved=self.bytes_moved,
            bits_up=(8.0 * bytes_up).astype(np.float32),
            bits_down=(8.0 * bytes_down).astype(np.float32),
            broadcast=True,
        )
        return _pretended(self.config, load, self.samples)


def split_load(
    config: RunConfig,
    cost: Cost,
    width: int,
    examples: Doubles,
    fresh: Doubles,
    wanted: int,
    modules: int,
    crossing: int = 0,
) -> Load:
    """Return the load of a step in gradient space.

    ``fresh`` (N,) is the expected share of a device's batch whose embeddings the server lacks, ``wanted`` how
    many devices share the edge server, ``modules`` the bytes of averaged modules a step, ``crossing`` the
    numbers of a token at the first cut where that is not ``width``.
    """
    samples = samples_a_step(config, examples)
    crossing = crossing or width
    rows, tokens = cost.elements_representation / width, cost.elements_embedding / crossing
    wire = config.wire

    def up(rows: float, tokens: float, samples: float) -> float:
        """Bits of one payload; the formats' sizes are sums over rows, so that means may be put in."""
        sent = uplink_bytes(
            wire,
            width,
            rows=round(rows),
            tokens=round(tokens),
            samples=round(samples),
            crossing=crossing,
            messages=0,
        )
        return 8.0 * sent

    fixed, many = up(0, 0, 0), 1000.0
    row_bits = (up(many, 0, 0) - fixed) / many
    token_bits = (up(0, many, 0) - fixed) / many
    sample_bits = (up(0, 0, many) - fixed) / many
    bits_up = (
        fixed + samples * (rows * row_bits + fresh * (tokens * token_bits + sample_bits)) + 8.0 * modules
    )
    shown = 8.0 * downlink_bytes(wire, width, rows=1000, messages=0) / 1000.0
    server_flops = passes(config) * cost.flops_server * samples.mean() * wanted
    load = Load(
        flops=(3.0 * cost.flops_device * samples).astype(np.float32),
        bytes_moved=0.0,  # embedding and head fit a device's cache
        bits_up=bits_up.astype(np.float32),
        bits_down=(samples * rows * shown).astype(np.float32),
        server_s=server_flops / (1e9 * config.fleet.server_gflops),
        broadcast=False,
    )
    return _pretended(config, load, samples)


def passes(config: RunConfig) -> float:
    """Return the work of a training step over that of a forward pass."""
    whole = config.model.tuning == "full" or config.fleet.flops_per_sample > 0.0
    if config.model.tuning == "none":
        return 1.0
    return 3.0 if whole else 2.0


def _pretended(config: RunConfig, load: Load, samples: Doubles) -> Load:
    """Return the load of the model that the configuration wants to be thought of."""
    fleet = config.fleet
    if fleet.flops_per_sample > 0.0:
        flops = (fleet.flops_per_sample * samples).astype(np.float32)
        load = replace(load, flops=flops, bytes_moved=0.0)
    if fleet.update_mb > 0.0:
        bits = np.full(len(samples), 8e6 * fleet.update_mb, np.float32)
        load = replace(load, bits_up=bits, bits_down=bits)
    return load
