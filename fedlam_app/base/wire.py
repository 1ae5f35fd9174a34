"""Number formats of the wire: rows of activations or gradients to bytes and back, with exact sizes.

    fp64 fp32    the bits themselves
    fp16 bf16    round to nearest even; what exceeds the format's largest number becomes that number
    int8 int4    x = s q:   s = bf16(max|x| / L),   q = round(x / s) in [-L, L],   L = 127 or 7

int8 has one scale s a row, which is a token; int4 one for every 32 values of a row, for its steps are coarse
and all Jacobians of a two-class head are parallel, so that their errors would not average out. The scale is
bfloat16 and not fp16, which would lose Jacobians of 1e-7. Without ``draw``
rounding is to nearest, in s as in q: the largest value of a row then has code L, so decoding and encoding
again changes nothing, and |error| <= s/2. With ``draw``, s is rounded up so that nothing is cut off, and q is
floor(x / s) plus one with probability x / s - floor(x / s): E[s q] = x, and |error| < s (D. Alistarh et al.,
QSGD, arXiv:1610.02132, with the row's maximum in place of its norm). Whoever decodes with the same draw u in
[0, 1) subtracts it: s (q + u - 1/2) is unbiased too, its error is uniform in +-s/2 whatever x is, and its
variance s^2/12 is half of s^2/6, the mean where x / s fills its cells: for no byte more (subtractive dither,
L. Roberts 1962; in federated learning N. Shlezinger et al., UVeQFed, arXiv:2006.03262).

A finite value stays finite. A value that is not must be found by whoever receives it: it survives in the
float formats, and in the integer formats it makes all that shares its scale NaN.

Payload, little-endian, row after row: the values; or the scales (2 bytes each), then the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32] | NDArray[np.float64]  # (n, d)
Float32 = NDArray[np.float32]
Bf16 = NDArray[np.uint16]  # the upper half of a float32
Draw = np.random.Generator | None

BLOCK = 32  # values that share a scale in int4

_BF16_NAN = 0x7FC0
_BF16_LEAST = 0x0080  # 2^-126, the smallest normal number
_BF16_LARGEST = float.fromhex("0x1.FEp127")
_FP16_LARGEST = 65504.0


@dataclass(frozen=True)
class Format:
    """One number format: ``decode(encode(x), n, d)`` is x (n, d) up to the format's error."""

    name: str
    _row: Callable[[int], int]  # d -> bytes of a row
    _pack: Callable[[Array, Draw], bytes]
    _unpack: Callable[[bytes, int, int, Draw], Array]

    def encode(self, x: Array, draw: Draw = None) -> bytes:
        """Return the payload of ``x`` (n, d); ``draw`` makes the integer formats unbiased."""
        return self._pack(x, draw)

    def decode(self, data: bytes, n: int, d: int, draw: Draw = None) -> Array:
        """Return the array (n, d), float64 for fp64 and else float32; ``ValueError`` for another length.

        ``draw``, keyed like the one that encoded, halves the variance of the integer formats.
        """
        check_length(self.name, data, n, d, self.size(n, d))
        return self._unpack(data, n, d, draw)

    def size(self, n: int, d: int) -> int:
        """Return the length of the payload of n rows of d values [bytes]."""
        return n * self._row(d)


def check_length(name: str, data: bytes, n: int, d: int, expected: int) -> None:
    """Raise ``ValueError`` unless the payload has the expected length [bytes]."""
    if len(data) != expected:
        raise ValueError(f"a payload of {n} x {d} values in {name} has {expected} bytes, got {len(data)}")


def row_scales(x: Float32, levels: int, up: bool = False) -> Bf16:
    """Return max|x| / levels of each row of ``x`` (n, d) as bfloat16 (n,): nearest, or rounded up.

    NaN where the row is not finite, or so large that levels * scale would not be. Never below 2^-126, so
    that a row of zeros needs no exception and no arithmetic is subnormal. For ``levels`` = 2^m - 1 the
    rounding of the quotient in float32 never undoes ``up``: levels * scale >= max|x| exactly.
    """
    largest = np.abs(np.maximum(x.max(axis=1, initial=0.0), -x.min(axis=1, initial=0.0)))  # (n,), no -0
    scales = np.maximum(to_bf16(largest / np.float32(levels), up), np.uint16(_BF16_LEAST))
    with np.errstate(over="ignore"):
        scales[~np.isfinite(from_bf16(scales) * np.float32(levels))] = _BF16_NAN
    return scales


def to_bf16(x: Float32, up: bool = False) -> Bf16:
    """Return ``x`` as bfloat16: round to nearest even, or, for x >= 0, ``up``."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    half = 0xFFFF if up else 0x7FFF + ((bits >> 16) & 1)
    rounded = ((bits + half) >> 16).astype(np.uint16)
    rounded[np.isnan(x)] = _BF16_NAN  # the addition may have carried a NaN into the sign
    return rounded


def from_bf16(bits: Bf16) -> Float32:
    """Return the float32 numbers whose upper half is ``bits``."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_float32(x: Array) -> Float32:
    """Return ``x`` as float32; what float32 cannot hold becomes infinite, and so is found."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32, copy=False)


def _clip(x: Array, largest: float) -> Array:
    """Return ``x`` with its finite values within +-largest."""
    return np.where(np.isfinite(x), np.clip(x, -largest, largest), x)


def _pack_fp64(x: Array, draw: Draw) -> bytes:
    return x.astype("<f8", copy=False).tobytes()


def _unpack_fp64(data: bytes, n: int, d: int, draw: Draw) -> Array:
    return np.frombuffer(data, "<f8").reshape(n, d).astype(np.float64)


def _pack_fp32(x: Array, draw: Draw) -> bytes:
    return as_float32(x).astype("<f4", copy=False).tobytes()


def _unpack_fp32(data: bytes, n: int, d: int, draw: Draw) -> Array:
    return np.frombuffer(data, "<f4").reshape(n, d).astype(np.float32)


def _pack_fp16(x: Array, draw: Draw) -> bytes:
    return _clip(x, _FP16_LARGEST).astype("<f2").tobytes()


def _unpack_fp16(data: bytes, n: int, d: int, draw: Draw) -> Array:
    return np.frombuffer(data, "<f2").reshape(n, d).astype(np.float32)


def _pack_bf16(x: Array, draw: Draw) -> bytes:
    return to_bf16(as_float32(_clip(x, _BF16_LARGEST))).astype("<u2", copy=False).tobytes()


def _unpack_bf16(data: bytes, n: int, d: int, draw: Draw) -> Array:
    return from_bf16(np.frombuffer(data, "<u2").reshape(n, d))


def _quantise(x: Array, levels: int, draw: Draw) -> tuple[bytes, NDArray[np.int8]]:
    """Return the scales' bytes and the codes (n, d) in [-levels, levels]."""
    x = as_float32(x)
    scales = row_scales(x, levels, up=draw is not None)  # (n,)
    factors = from_bf16(scales)
    with np.errstate(invalid="ignore"):
        codes = np.divide(x, factors[:, None])  # (n, d)
    codes[np.isnan(factors)] = 0.0  # times a NaN scale
    if draw is None:
        np.rint(codes, out=codes)
    else:
        floor = np.floor(codes)
        codes -= floor  # floor(codes + uniform) would be biased, and reach 128: near 127 a sum has few bits
        floor += _uniform(draw, codes.shape) < codes
        codes = floor
    return scales.astype("<u2", copy=False).tobytes(), codes.astype(np.int8)


def _dequantise(data: bytes, codes: NDArray[np.int8], draw: Draw) -> Float32:
    """Return scales times codes (n, d), less the draw, as float32; without one exact, 8 bits times 7."""
    scales = np.frombuffer(data, "<u2", count=len(codes))
    values = codes.astype(np.float32)
    if draw is not None:
        dither = _uniform(draw, codes.shape)
        dither -= 0.5
        dither[scales == _BF16_LEAST] = 0.0  # zeros stay zero
        values += dither
    values *= from_bf16(scales)[:, None]
    return values


def _uniform(draw: np.random.Generator, shape: tuple[int, ...]) -> Float32:
    """Return the draw in [0, 1), the same where a payload is encoded and where it is decoded."""
    return draw.random(shape, np.float32)


def _pack_int8(x: Array, draw: Draw) -> bytes:
    scales, codes = _quantise(x, 127, draw)
    return scales + codes.tobytes()


def _unpack_int8(data: bytes, n: int, d: int, draw: Draw) -> Array:
    return _dequantise(data, np.frombuffer(data, np.int8, offset=2 * n).reshape(n, d), draw)


def _blocks(d: int) -> int:
    """Return how many scales a row of d values has in int4."""
    return -(-d // BLOCK)


def _pack_int4(x: Array, draw: Draw) -> bytes:
    n, d = x.shape
    padded = np.pad(as_float32(x), ((0, 0), (0, -d % BLOCK)))
    blocks: Float32 = padded.reshape(n * _blocks(d), BLOCK)
    scales, parts = _quantise(blocks, 7, draw)
    codes = np.ascontiguousarray(parts.reshape(n, _blocks(d) * BLOCK)[:, :d])
    nibbles = codes.view(np.uint8)
    packed = nibbles[:, 0::2] & 0x0F  # (n, ceil(d / 2)): even columns in the lower half of a byte
    packed[:, : codes.shape[1] // 2] |= nibbles[:, 1::2] << 4
    return scales + packed.tobytes()


def _unpack_int4(data: bytes, n: int, d: int, draw: Draw) -> Array:
    blocks = n * _blocks(d)
    packed = np.frombuffer(data, np.uint8, offset=2 * blocks).reshape(n, (d + 1) // 2)
    codes = np.zeros((n, _blocks(d) * BLOCK), np.int8)
    even, odd = codes[:, :d:2], codes[:, 1:d:2]
    even[:] = (packed << 4).view(np.int8) >> 4  # the shift back extends the sign
    odd[:] = packed.view(np.int8)[:, : d // 2] >> 4
    values: Float32 = _dequantise(data, codes.reshape(blocks, BLOCK), draw).reshape(codes.shape)
    return np.ascontiguousarray(values[:, :d])


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp64", lambda d: 8 * d, _pack_fp64, _unpack_fp64),
        Format("fp32", lambda d: 4 * d, _pack_fp32, _unpack_fp32),
        Format("fp16", lambda d: 2 * d, _pack_fp16, _unpack_fp16),
        Format("bf16", lambda d: 2 * d, _pack_bf16, _unpack_bf16),
        Format("int8", lambda d: 2 + d, _pack_int8, _unpack_int8),
        Format("int4", lambda d: 2 * _blocks(d) + (d + 1) // 2, _pack_int4, _unpack_int4),
    )
}
