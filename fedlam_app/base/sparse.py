"""Top-k with error feedback: of each row only its largest elements travel, and the rest is sent later.

    payload_t = top_k(x_t + m_t),     m_{t+1} = x_t + m_t - decode(payload_t),     m_0 = 0

so that the sum of what was decoded, plus the memory, is the sum of what was handed in: nothing is lost, only
late. S. U. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv:1809.07599.

A row of d values sends its k = ceil(share d) largest magnitudes: a bfloat16 scale (``wire.py``), k columns as
uint16 and k values as fp16 of value / scale, because fp16 alone would lose Jacobians of 1e-7. A row with a
value that is not finite sends a NaN scale.

Payload, little-endian: the scales (n), then the columns (n, k) in ascending order, then the values (n, k).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.wire import Array, Float32, as_float32, check_length, from_bf16, row_scales

_MOST_COLUMNS = 65536  # what uint16 can name


def encode(x: Array, share: float) -> bytes:
    """Return the payload of the ``share`` of largest magnitudes in each row of ``x`` (n, d)."""
    x = as_float32(x)
    d = x.shape[1]
    if d > _MOST_COLUMNS:
        raise ValueError(f"top-k names columns in 16 bits: a row may have {_MOST_COLUMNS} values, got {d}")
    columns = _largest(x, _kept(share, d))  # (n, k)
    scales = row_scales(x, 1)  # (n,)
    with np.errstate(invalid="ignore"):
        values = (
            np.take_along_axis(x, columns, axis=1) / from_bf16(scales)[:, None]
        )  # (n, k), |value| <= 1.004
    return b"".join(
        (scales.astype("<u2").tobytes(), columns.astype("<u2").tobytes(), values.astype("<f2").tobytes())
    )


def decode(data: bytes, n: int, d: int, share: float) -> Float32:
    """Return the array (n, d), zero where nothing was sent; ``ValueError`` for another payload."""
    check_length("top-k", data, n, d, size(n, d, share))
    k = _kept(share, d)
    factors = from_bf16(np.frombuffer(data, "<u2", count=n))
    columns = np.frombuffer(data, "<u2", count=n * k, offset=2 * n).reshape(n, k)
    values = np.frombuffer(data, "<f2", offset=2 * n + 2 * n * k).reshape(n, k)
    if columns.max(initial=0) >= max(d, 1):
        raise ValueError(f"a top-k payload of rows of {d} values names column {columns.max()}")
    x = np.zeros((n, d), np.float32)
    np.put_along_axis(x, columns.astype(np.intp), values.astype(np.float32) * factors[:, None], axis=1)
    x[np.isnan(factors)] = np.nan
    return x


def size(n: int, d: int, share: float) -> int:
    """Return the length of the payload of n rows of d values [bytes]."""
    return n * (2 + 4 * _kept(share, d))


def with_feedback(x: Array, memory: Float32, share: float) -> tuple[bytes, Float32]:
    """Return the payload of ``x`` + ``memory`` (n, d), and the memory (n, d) of what it left out.

    A row that is not finite is reported once, by its NaNs, and forgotten: kept, it would bar its sample from
    training for ever.
    """
    wanted = as_float32(x) + memory
    payload = encode(wanted, share)
    n, d = wanted.shape
    left = wanted - decode(payload, n, d, share)
    left[~np.isfinite(left).all(axis=1)] = 0.0
    return payload, left


def _kept(share: float, d: int) -> int:
    """Return ceil(share d), at least 1 of d; rounded first, because 0.07 * 100 is a hair over 7."""
    return min(d, max(1, math.ceil(round(share * d, 9))))


def _largest(x: Float32, k: int) -> NDArray[np.intp]:
    """Return the columns (n, k) of the largest magnitudes of each row, in ascending order."""
    d = x.shape[1]
    if k == d:
        return np.broadcast_to(np.arange(d), x.shape)
    return np.sort(np.argpartition(np.abs(x), d - k, axis=1)[:, d - k :], axis=1)
