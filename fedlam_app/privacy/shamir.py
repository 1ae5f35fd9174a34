"""Secret sharing: 32 bytes become one share for each holder; any t give them back, t - 1 tell nothing.

A. Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979. Over the field of P = 2^256 + 297,
the smallest prime that holds 32 bytes:

    f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1}   mod P,    a_i uniform
    share of holder k = f(k),  k = 1, 2, ...          secret = f(0) = sum_k f(k) prod_{j != k} j / (j - k)

For any t - 1 shares and any secret there is exactly one f, so they say nothing of which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def share(
    secret: bytes, threshold: int, holders: Sequence[int], draw: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Return the share of each holder (a positive number); any ``threshold`` of them give ``secret``.

    ``draw(n)`` returns n uniform bytes.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret to be shared must have {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= len(holders):
        raise ValueError(f"{threshold} of {len(holders)} shares cannot open a secret; it must be 1 to all")
    if len(set(holders)) < len(holders) or min(holders) < 1 or max(holders) >= PRIME:
        raise ValueError(f"holders of shares must be different positive numbers, got {list(holders)}")
    # 64 bytes, reduced: further from uniform by 2^-255 at most.
    slopes = [int.from_bytes(draw(64), "big") % PRIME for _ in range(threshold - 1)]
    polynomial = [int.from_bytes(secret, "big"), *slopes]
    return {k: _value(polynomial, k).to_bytes(SHARE_BYTES, "big") for k in holders}


def reconstruct(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of exactly as many shares as open it, by holder.

    Shares that do not belong together give another secret, or a ``ValueError`` where that has no 32 bytes:
    whoever reconstructs must be able to tell (by a public key, or a commitment).
    """
    values = {k: int.from_bytes(part, "big") for k, part in shares.items()}
    weights = _at_zero(tuple(values))
    found = sum(value * weight for value, weight in zip(values.values(), weights, strict=True)) % PRIME
    if found >= 2 ** (8 * SECRET_BYTES):
        raise ValueError(f"the shares of {sorted(shares)} do not belong together")
    return found.to_bytes(SECRET_BYTES, "big")


def _value(polynomial: Sequence[int], x: int) -> int:
    found = 0
    for coefficient in reversed(polynomial):
        found = (found * x + coefficient) % PRIME
    return found


@functools.lru_cache(maxsize=1024)
def _at_zero(holders: tuple[int, ...]) -> list[int]:
    """Return Lagrange's weights at 0."""
    weights = []
    for k in holders:
        above, below = 1, 1
        for j in holders:
            if j != k:
                above, below = above * j % PRIME, below * (j - k) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights
