"""What crosses the wire: typed messages, and the only codec between them and Flower's records.

    server -> SuperNode   TrainOrder, SplitOrder, ModulesOrder, EvaluateOrder, SiteOrder, SecureOrder,
                          MaskedOrder
    SuperNode -> server   TrainReport, SplitReport, ModulesReport, EvaluateReport, SiteReport, SecureReport

A SuperNode is a worker and a device is an integer: one message carries the work of several devices,
in slot order. NumPy arrays become one ``ArrayRecord``, everything else one ``ConfigRecord``. What belongs to
one device is its slice of ``vectors`` or of ``payload`` (``sizes`` says where it ends); channels, labels,
tokens and frozen weights have no field here, so they cannot travel. The parts of a split payload are in
``split_payload.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from numpy.typing import NDArray

SCHEMA = 4  # raise it whenever a field changes its meaning


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """Train these devices: device ``devices[i]`` starts from vector ``rows[i]``."""

    cell: str  # the overrides of the run's configuration that define this experiment, as JSON
    round: int  # 1-based
    devices: list[int]
    rows: list[int]
    ranks: list[int]  # LoRA rank of each device; 0: no LoRA
    known: list[int]  # the last round of each device that the server has heard of; 0: none
    steps: list[int]  # local steps of each device; 0 is a poll: the loss of its first batch, nothing else
    factors: list[float]  # what each device's weight is multiplied by
    noise: list[float]  # what each device's noise multiplier is multiplied by; empty: 1
    free: list[float]  # the noise multiplier that its channel adds for nothing, at worst; empty: 0
    chunks: list[int]  # whose sum each vector enters, ascending; empty: every vector travels as it is
    width: int  # values that each device of a chunk hands in; 0 without chunks
    trains: str  # parts: 'a', 'b', 'other', joined by '+'
    returns: str
    keeps: str
    proximal: float
    probe: bool  # hand in the first gradient's factors instead of training
    compact: bool  # the vectors are Fed-SB's, to be expanded with the basis among the entries
    vectors: NDArray[np.float32]  # (sum of sizes,)
    sizes: list[int]
    kinds: list[str]  # entries to keep from now on, the first of them number ``first``
    entry_ranks: list[int]
    first: int
    entries: NDArray[np.float32]  # one after the other


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What device ``devices[i]`` learned: its vector, its weight and its scalars; see ``packing.py``."""

    devices: list[int]
    weights: list[float]  # training examples times the device's factor
    losses: list[float]  # mean loss of the local steps, linear
    norms: list[float]  # of the update; NaN where the vector is not finite or has another shape
    refused: list[int]  # devices whose privacy budget is spent: they did nothing
    ledgers: list[str]  # each device's privacy ledger, as JSON; empty without privacy
    cpu_s: float
    peak_rss_bytes: int
    vectors: NDArray[np.float32]  # (sum of sizes,); empty where the order has chunks
    sizes: list[int]  # values that each device handed in, in a sum or not
    sums: NDArray[np.float64]  # (chunks that a device answered for, width): of weight * vector


@dataclass(frozen=True, kw_only=True)
class SplitOrder:
    """One exchange of the split: what comes down, and what is asked for; step 0 is none."""

    cell: str
    devices: list[int]
    shown: list[int]  # the step whose representations are in the payload
    graded: list[int]  # the step whose gradients of the embedding are in the payload
    wanted: list[int]  # the step whose embeddings shall come up
    known: list[int]  # version of each device's own state that the server's last word from it made; 0: none
    noise: list[float]  # as in a ``TrainOrder``
    free: list[float]
    payload: NDArray[np.uint8]  # (sum of sizes,), each slice a ``Downlink``
    sizes: list[int]


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """The devices' answer; who is missing has vanished."""

    devices: list[int]
    weights: list[float]  # of each batch that was shown; 0 where none was
    losses: list[float]
    refused: list[int]  # as in a ``TrainReport``
    ledgers: list[str]
    cpu_s: float
    peak_rss_bytes: int
    payload: NDArray[np.uint8]  # (sum of sizes,), each slice an ``Uplink``
    sizes: list[int]


@dataclass(frozen=True, kw_only=True)
class ModulesOrder:
    """Hand in the device's modules, to be averaged (``split.heads = "averaged"`` alone)."""

    cell: str
    devices: list[int]
    known: list[int]


@dataclass(frozen=True, kw_only=True)
class ModulesReport:
    """Embedding and head of each device as it trained them: the one message that carries them."""

    devices: list[int]
    cpu_s: float
    peak_rss_bytes: int
    vectors: NDArray[np.floating]  # (n, q)


@dataclass(frozen=True, kw_only=True)
class EvaluateOrder:
    """Evaluate model ``rows[i]`` on evaluation chunk ``chunks[i]``, an instrument outside the protocol."""

    cell: str
    antennas: int  # antennas a user that are scored; 0 is all
    rows: list[int]
    chunks: list[int]
    keeps: str  # the part that each owner has of its own: 'b', or 'modules' of a split; '' is none
    owners: list[int]  # devices that are scored in turn, each with its own part; empty: the vector as it is
    known: list[int]  # version of each owner's memory
    vectors: NDArray[np.floating]  # (m, p)
    kinds: list[str]
    entry_ranks: list[int]
    first: int
    entries: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """Sums over the users of each chunk; the task knows the columns."""

    rows: list[int]
    chunks: list[int]
    users: list[int]  # users in each chunk: how ``table`` is cut
    cpu_s: float
    peak_rss_bytes: int
    table: NDArray[np.float64]  # (owners or 1, sum of users, columns)


@dataclass(frozen=True, kw_only=True)
class SiteOrder:
    """Say which device you are (``federation.placement = "sites"`` alone)."""


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The device that a SuperNode's operator says it is."""

    device: int


@dataclass(frozen=True, kw_only=True)
class SecureOrder:
    """A stage of secure aggregation without training; ``payload`` is as ``clients/secure.py`` says."""

    cell: str
    round: int
    session: str  # one attempt at a round; no two have the same name
    stage: str  # 'keys', 'shares' or 'open'
    devices: list[int]
    peers: list[int]  # whom each device shares masks with, one device after the other
    counts: list[int]  # how many each has
    standing: list[int]  # stages that each peer has finished: 1 keys, 2 shares, 3 its masked vector
    payload: NDArray[np.uint8]  # (sum of sizes,)
    sizes: list[int]


@dataclass(frozen=True, kw_only=True)
class MaskedOrder(TrainOrder):
    """Train, and hand in a masked vector instead of one's own."""

    session: str
    peers: list[int]
    counts: list[int]
    standing: list[int]
    keys: NDArray[np.uint8]  # (sum of counts * BUNDLE_BYTES,) the peers' public words
    clip: float
    summands: int  # vectors that the sum may have


@dataclass(frozen=True, kw_only=True)
class SecureReport:
    """The devices' answer to a stage; who is missing has vanished, or says why it did nothing."""

    devices: list[int]
    complaints: list[str]  # what a device would not do, one sentence each
    cpu_s: float
    peak_rss_bytes: int
    payload: NDArray[np.uint8]  # (sum of sizes,)
    sizes: list[int]


Order = TrainOrder | SplitOrder | ModulesOrder | EvaluateOrder | SecureOrder
Report = TrainReport | SplitReport | ModulesReport | EvaluateReport | SecureReport
Record = Order | Report | SiteOrder | SiteReport
R = TypeVar("R", bound=Record)


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


def kind_of(content: RecordDict) -> str:
    """Return the name of the record in a message."""
    return str(content.config_records["config"]["type"])


def payload_bytes(vector: NDArray[np.generic]) -> int:
    """Return the serialised length of one device's vector or payload [bytes]: what its radio link carries."""
    return framed_bytes(vector.shape, vector.dtype.str)


@functools.lru_cache(maxsize=1024)
def framed_bytes(shape: tuple[int, ...], dtype: str = "<f4") -> int:
    """Return :func:`payload_bytes` of any array of this shape and type: the values do not change it."""
    return len(Array(np.zeros(shape, dtype)).data)


def join(parts: Iterable[NDArray[Any]], dtype: Any) -> tuple[NDArray[Any], list[int]]:
    """Return arrays (n_i,) as one (sum,) and their lengths; :func:`cut` takes them apart."""
    parts = list(parts)
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype, copy=False), [len(p) for p in parts]


def cut(joined: NDArray[Any], sizes: list[int]) -> list[NDArray[Any]]:
    """Return the arrays that :func:`join` joined; sizes that do not fit raise ``ValueError``."""
    if sum(sizes) != len(joined) or min(sizes, default=0) < 0:
        raise ValueError(f"an array of {len(joined)} values cannot be cut into {sizes}")
    return np.split(joined, np.cumsum(sizes)[:-1]) if sizes else []


def order(record: Record, node: int, action: str, group: str) -> Message:
    """Address a record to a SuperNode; ``action`` is 'train', 'evaluate' or 'query'."""
    return Message(encode(record), dst_node_id=node, message_type=action, group_id=group)


def reply(record: Record, to: Message) -> Message:
    """Answer a message with a record."""
    return Message(encode(record), reply_to=to)


def refuse(reason: str, to: Message) -> Message:
    """Answer a message with an error: the sentence that the server will show."""
    return Message(Error(code=0, reason=reason), reply_to=to)
