"""Bytes of the split's messages by arithmetic: what a plan needs to know before anything is sent.

    up    = 128 m + 12 k + J(R, D) + E(N, D) + 2 B (twice, where supervised rows vary from sample to sample)
    down  = 128 m + 12 k + P(R, D) + P(G, D) + 4 M + modules

m messages carry the payloads of k devices. R rows come down to heads and their Jacobians go up; N tokens of B
samples go up, asked for by M places in shards; G gradients of tokens come down. J, E and P are the sizes of
``wire.py``'s formats, sums over rows: so one call counts one device's exchange or all exchanges of a run, and
``task.cost()`` gives R and N of a mean sample. The 12 bytes are the head of a payload (``split_payload.py``);
the 128 are NumPy's, before any array in a Flower message.
"""

from __future__ import annotations

from dataclasses import fields

from fedlam_app.base import sparse
from fedlam_app.base.split_payload import Downlink, Uplink
from fedlam_app.base.wire import FORMATS
from fedlam_app.config import WireConfig

ARRAY_HEAD = 128  # of one array in a message
TOKEN_ID = 2  # uint16
LENGTH = 2  # uint16
PLACE = 4  # uint32


def uplink_bytes(
    wire: WireConfig,
    width: int,
    *,
    rows: int = 0,
    tokens: int = 0,
    samples: int = 0,
    tails: bool = False,
    crossing: int = 0,
    payloads: int = 1,
    messages: int = 1,
) -> int:
    """Return the bytes from devices to server: Jacobians of ``rows``, embeddings of ``samples``.

    ``tokens`` is the number of tokens of all samples; ``tails``: the supervised rows of a sample vary;
    ``crossing`` are the numbers of a token where that is not ``width``.
    """
    if wire.jacobian == "top-k":
        jacobians = sparse.size(rows, width, wire.top_k)
    else:
        jacobians = FORMATS[wire.jacobian].size(rows, width)
    if wire.embedding == "token-ids":
        embeddings = TOKEN_ID * tokens
    else:
        embeddings = FORMATS[wire.embedding].size(tokens, crossing or width)
    lengths = LENGTH * samples * (2 if tails else 1)
    return ARRAY_HEAD * messages + _head(Uplink) * payloads + jacobians + embeddings + lengths


def downlink_bytes(
    wire: WireConfig,
    width: int,
    *,
    rows: int = 0,
    graded: int = 0,
    missing: int = 0,
    modules: int = 0,
    payloads: int = 1,
    messages: int = 1,
) -> int:
    """Return the bytes from server to devices: representations of ``rows``, gradients of ``graded`` tokens.

    ``missing`` samples are asked for; ``modules`` are the bytes of averaged modules.
    """
    form = FORMATS[wire.representation]
    carried = form.size(rows, width) + form.size(graded, width) + PLACE * missing + modules
    return ARRAY_HEAD * messages + _head(Downlink) * payloads + carried


def _head(kind: type[Downlink] | type[Uplink]) -> int:
    """Return the bytes before a payload's parts: the length of each but the last, as uint32."""
    return 4 * (len(fields(kind)) - 1)
