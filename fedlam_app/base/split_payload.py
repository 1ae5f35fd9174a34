"""What one device sends and gets in one exchange of the split, and its bytes.

    Downlink   representations, gradients of the embedding, ids of the embeddings that the server lacks,
               the averaged modules; each may be empty
    Uplink     Jacobians; embeddings with the lengths of their texts and their supervised rows

There is no field for a label, a token or a head in an ``Uplink``: what has no field cannot travel. (Under
``wire.embedding = "token-ids"`` the field ``embeddings`` holds the tokens themselves; that is said aloud
wherever it is chosen.) Activations and gradients are bytes of ``wire.py``; both sides know their shapes.

A payload is the length of every part but the last as uint32, then the parts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Downlink:
    """Server to device."""

    representations: bytes = b""  # (R, D) of the step shown
    gradients: bytes = b""  # (N, D) dL/dE of the step graded
    missing: bytes = b""  # uint32 places in the device's shard; empty where every batch is new
    modules: bytes = b""  # float32 or float64 (q,): the averaged modules


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """Device to server."""

    jacobians: bytes = b""  # (R, D) of the step shown
    lengths: bytes = b""  # uint16 (B,): tokens of each sample sent
    tails: bytes = b""  # uint16 (B,): supervised rows at the end of each sample, where that varies
    embeddings: bytes = b""  # (N, D), N = sum of lengths


P = TypeVar("P", Downlink, Uplink)


def to_bytes(parts: Downlink | Uplink) -> NDArray[np.uint8]:
    """Return a payload as (n,) bytes."""
    values = [getattr(parts, field.name) for field in fields(parts)]
    head = struct.pack(f"<{len(values) - 1}I", *(len(value) for value in values[:-1]))
    return np.frombuffer(b"".join([head, *values]), np.uint8)


def from_bytes(payload: NDArray[np.uint8], kind: type[P]) -> P:
    """Return the parts of a payload (n,); ``ValueError`` where their lengths do not fit it."""
    data, names = payload.tobytes(), [field.name for field in fields(kind)]
    start = 4 * (len(names) - 1)
    if len(data) < start:
        raise ValueError(f"a payload of {len(data)} bytes is shorter than its head of {start}")
    sizes: tuple[int, ...] = struct.unpack(f"<{len(names) - 1}I", data[:start])
    if start + sum(sizes) > len(data):
        raise ValueError(f"a payload of {len(data)} bytes says that its parts have {start + sum(sizes)}")
    values: dict[str, bytes] = {}
    for name, size in zip(names, [*sizes, len(data) - start - sum(sizes)], strict=True):
        values[name] = data[start : start + size]
        start += size
    return kind(**values)


def to_integers(values: NDArray[np.integer], dtype: str = "<u2") -> bytes:
    """Return small non-negative integers as bytes."""
    if len(values) and (values.min() < 0 or values.max() > np.iinfo(dtype).max):
        raise ValueError(f"{dtype} holds 0 to {np.iinfo(dtype).max}, got {values.min()} to {values.max()}")
    return values.astype(dtype).tobytes()


def from_integers(data: bytes, dtype: str = "<u2") -> NDArray[np.int64]:
    """Return what :func:`to_integers` packed; ``ValueError`` where the bytes do not come out even."""
    return np.frombuffer(data, dtype).astype(np.int64)


def position(step: int, local_steps: int) -> tuple[int, int]:
    """Return the round (1-based) and the step in it (0-based) of a step counted from 1."""
    return (step - 1) // local_steps + 1, (step - 1) % local_steps


def version(shown: int, graded: int) -> int:
    """Return the version of a device's memory after an exchange: a step's head moves before its embedding."""
    return 2 * shown if shown else 2 * graded + 1


def jacobian_draw(config: RunConfig, device: int, step: int) -> np.random.Generator | None:
    """Return the draw that rounds a device's Jacobians, known to both ends; ``None``: to nearest.

    Under ``server-dp-sgd`` it is to nearest: of a batch with a sample less, each draw would fall on another.
    """
    alone = config.privacy.mechanism == "server-dp-sgd"
    return rng(config.seed, "jacobian", device, step) if config.wire.stochastic and not alone else None
