"""Secure aggregation: updates as integers under masks that cancel in their sum. Arithmetic alone.

K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017. With
x_k (q + 1,) what device k hands in, and U the devices whose masked vectors arrive, modulo 2^32:

    y_k = x_k + PRG(b_k) + sum_{j > k} PRG(s_kj) - sum_{j < k} PRG(s_kj)      over the neighbours j of k
    sum_U x_k = sum_U y_k - sum_U PRG(b_k) -+ sum_{k in U, j not in U} PRG(s_kj)

s_kj is agreed on by both (X25519, RFC 7748; HKDF-SHA-256, RFC 5869), b_k is k's own; PRG is AES-256 in
counter mode. The server gets b_k of who arrived or the key of who did not, from shares (``shamir.py``) that
only a neighbour could read (AES-GCM). A device's bundle of public words is (seal key, pair key,
SHA-256(b_k)), 32 bytes each: with it the server knows whether a secret that it reconstructed is the true one.

Fixed point. An update is clipped to norm C and multiplied by a power of two,

    scale = 2^floor(log2((2^31 - 1) / (n C))),      x = trunc(scale * min(1, C / ||u||) u)

so that n of them cannot leave 32 bits. Rounding is towards zero and not to the nearest: no norm grows, and
the sensitivity of the sum stays C. Error: below n / scale a coordinate of the sum, so below 2 n C / 2^31 of
the mean, n times 1e-9 of C. The last entry is 1 where ||u|| <= C: its sum is all that an adaptive clip needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlam_app.privacy.noise import Stream
from fedlam_app.privacy.shamir import SHARE_BYTES

KEY_BYTES = 32
BUNDLE_BYTES = 3 * KEY_BYTES
NONCE_BYTES, TAG_BYTES = 12, 16  # of AES-GCM
SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES  # a share of the pair key and one of the self mask
NOTHING = b"\xff" * SHARE_BYTES  # instead of a share that could not be read: no share is that large
KEYS, SHARED, SENT = 1, 2, 3  # what a device has done last: said its keys, shared secrets, sent its vector
MOST = 2**31 - 1  # the largest sum that has a sign

Words = NDArray[np.uint32]  # (q + 1,), modulo 2^32


class Forged(ValueError):
    """Something sealed that does not come from whom it should, or not as it was sent."""


@dataclass(frozen=True)
class Secrets:
    """One device's, in one session."""

    seal: bytes  # X25519 key of what only one neighbour shall read
    pair: bytes  # X25519 key of the masks that cancel
    own: bytes  # b, the seed of the mask of its own

    @classmethod
    def drawn(cls, draw: Callable[[int], bytes]) -> Secrets:
        """Return secrets from ``draw(n)``, which returns n uniform bytes."""
        return cls(draw(KEY_BYTES), draw(KEY_BYTES), draw(KEY_BYTES))

    def bundle(self) -> bytes:
        """Return the public words that go with them."""
        return public(self.seal) + public(self.pair) + commitment(self.own)


def scale_of(clip: float, devices: int) -> float:
    """Return what updates of norm ``clip`` are multiplied by, so that ``devices`` of them fit in 32 bits."""
    scale = 2.0 ** math.floor(math.log2(MOST / (devices * clip)))
    return scale if devices * clip * scale <= MOST else scale / 2.0


def encode(update: NDArray[np.floating], clip: float, scale: float) -> Words:
    """Return an update (q,), clipped and in fixed point, and whether it was within the clip: (q + 1,)."""
    update = update.astype(np.float64)
    norm = float(np.linalg.norm(update))
    values = np.trunc(update * (scale * min(1.0, clip / max(norm, 1e-300))))
    return np.append(values.astype(np.int64), int(norm <= clip)).astype(np.uint32)


def decode(total: Words, scale: float) -> tuple[NDArray[np.float64], int]:
    """Return the sum of the clipped updates (q,), and how many were within the clip."""
    return total[:-1].view(np.int32) / scale, int(total[-1])


def public(secret: bytes) -> bytes:
    """Return the X25519 public key of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def commitment(seed: bytes) -> bytes:
    """Return what is known of a self mask's seed before it is opened."""
    return hashlib.sha256(b"fedlam self mask" + seed).digest()


def agreed(secret: bytes, other: bytes, *about: int | str) -> bytes:
    """Return the 32 bytes that two devices agree on: one's private key and the other's public one.

    ``about`` says what for, the same words on both sides. ``ValueError`` for a public key of low order.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=_named(*about)).derive(shared)


def seal(key: bytes, nonce: bytes, text: bytes, *about: int | str) -> bytes:
    """Return a text that only the holder of ``key`` can read, and bound to what it is about."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return nonce + AESGCM(key).encrypt(nonce, text, _named(*about))


def unseal(key: bytes, sealed: bytes, *about: int | str) -> bytes:
    """Return what was sealed; ``Forged`` where this key did not seal it about this."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _named(*about))
    except (InvalidTag, ValueError):
        raise Forged("it is damaged or forged") from None


def self_mask(seed: bytes, session: str, size: int) -> Words:
    """Return PRG(b) (size,)."""
    return Stream(seed, "self mask", session).integers(size)


def pair_mask(secret: bytes, device: int, other: bytes, peer: int, session: str, size: int) -> Words:
    """Return what ``device`` adds for a peer of the public pair key ``other``; the peer adds its negative."""
    low, high = sorted((device, peer))
    mask = Stream(agreed(secret, other, "pair", session, low, high)).integers(size)
    return mask if device < peer else np.negative(mask)


def masked(words: Words, secrets: Secrets, device: int, peers: Mapping[int, bytes], session: str) -> Words:
    """Return x + masks; ``peers`` are the bundles of the neighbours that share masks in this session."""
    total = words + self_mask(secrets.own, session, len(words))
    for peer, bundle in peers.items():
        total += pair_mask(secrets.pair, device, pair_key(bundle), peer, session, len(words))
    return total


def seal_key(bundle: bytes) -> bytes:
    """Return the public key that a bundle has for sealing."""
    return bundle[:KEY_BYTES]


def pair_key(bundle: bytes) -> bytes:
    """Return the public key that a bundle has for masks that cancel."""
    return bundle[KEY_BYTES : 2 * KEY_BYTES]


def own_commitment(bundle: bytes) -> bytes:
    """Return the commitment to the seed of a device's own mask."""
    return bundle[2 * KEY_BYTES :]


def _named(*about: int | str) -> bytes:
    """Return words and numbers as bytes, no two lists of them alike."""
    words = [str(part).encode() for part in ("fedlam secure aggregation", *about)]
    return b"".join(len(word).to_bytes(4, "big") + word for word in words)
