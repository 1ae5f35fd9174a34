"""What crosses the wire: four typed messages, and the only codec between them and Flower's records.

    server -> SuperNode   TrainOrder, EvaluateOrder     SuperNode -> server   TrainReport, EvaluateReport

A SuperNode is a worker and a device is an integer: one message carries the work of several devices,
in slot order. NumPy arrays become one ``ArrayRecord``, everything else one ``ConfigRecord``. The
payload of a device is its row of ``vectors``; channels, labels and frozen weights have no field here,
so they cannot travel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from numpy.typing import NDArray

SCHEMA = 1  # raise it whenever a field changes its meaning


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """Train these devices: device ``devices[i]`` starts from ``vectors[rows[i]]``."""

    cell: str  # the overrides of the run's configuration that define this experiment, as JSON
    round: int  # 1-based
    devices: list[int]
    rows: list[int]
    vectors: NDArray[np.float32]  # (m, p)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What device ``devices[i]`` learned: its vector, its weight and its scalars."""

    devices: list[int]
    weights: list[float]  # training examples
    losses: list[float]  # mean loss of the local steps, linear
    cpu_s: float
    peak_rss_bytes: int
    vectors: NDArray[np.float32]  # (n, p)


@dataclass(frozen=True, kw_only=True)
class EvaluateOrder:
    """Evaluate model ``rows[i]`` on evaluation chunk ``chunks[i]``."""

    cell: str
    antennas: int  # antennas a user that are scored; 0 is all
    rows: list[int]
    chunks: list[int]
    vectors: NDArray[np.float32]  # (m, p)


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """Sums over the users of each chunk; the task knows the columns."""

    rows: list[int]
    chunks: list[int]
    users: list[int]  # users in each chunk: how ``table`` is cut
    cpu_s: float
    peak_rss_bytes: int
    table: NDArray[np.float64]  # (sum of users, columns)


Record = TrainOrder | TrainReport | EvaluateOrder | EvaluateReport
R = TypeVar("R", TrainOrder, TrainReport, EvaluateOrder, EvaluateReport)


def encode(record: Record) -> RecordDict:
    """Return Flower's form of a record."""
    arrays, config = {}, ConfigRecord({"schema": SCHEMA, "type": type(record).__name__})
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = Array(value)
        else:
            config[field.name] = value
    return RecordDict({"arrays": ArrayRecord(arrays), "config": config})


def decode(content: RecordDict, kind: type[R]) -> R:
    """Return the record of type ``kind``; another type or schema raises ``ValueError``."""
    values: dict[str, Any] = dict(content.config_records["config"])
    schema, name = values.pop("schema"), values.pop("type")
    if (schema, name) != (SCHEMA, kind.__name__):
        raise ValueError(f"expected {kind.__name__} of schema {SCHEMA}, got {name!r} of schema {schema!r}")
    values |= {key: array.numpy() for key, array in content.array_records["arrays"].items()}
    return kind(**values)


def payload_bytes(vector: NDArray[np.float32]) -> int:
    """Return the serialised length of one device's vector (p,) [bytes]: what its radio link carries."""
    return len(Array(vector).data)


def order(record: Record, node: int, action: str, group: str) -> Message:
    """Address a record to a SuperNode; ``action`` is 'train' or 'evaluate'."""
    return Message(encode(record), dst_node_id=node, message_type=action, group_id=group)


def reply(record: Record, to: Message) -> Message:
    """Answer a message with a record."""
    return Message(encode(record), reply_to=to)


def refuse(reason: str, to: Message) -> Message:
    """Answer a message with an error: the sentence that the server will show."""
    return Message(Error(code=0, reason=reason), reply_to=to)
