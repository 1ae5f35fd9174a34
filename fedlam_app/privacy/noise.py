"""Noise that cannot be foretold: Gaussian draws from AES-256 in counter mode, a key for each purpose.

    key = SHA-256(secret, purpose, ...)          z = sqrt(-2 log u) (cos, sin)(2 pi v)

(G. Box, M. Muller, Annals of Mathematical Statistics, 1958.) A PCG or a Mersenne twister can be wound back
from its output; AES cannot. The same secret and key give the same noise, in any process: a killed release is
repeated bit for bit. So the key must name everything that the noise is added to (see :func:`digest`): were
two different messages sent with one noise, their difference would be clear.

Not covered: attacks on the floating-point numbers themselves (I. Mironov, CCS 2012).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import Key


class Stream:
    """One keyed stream of draws; what was drawn before decides what comes next."""

    def __init__(self, secret: bytes, *key: Key) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        name = hashlib.sha256(secret)
        for part in key:
            word = str(part).encode()
            name.update(len(word).to_bytes(8, "big") + word)
        self._cipher = Cipher(algorithms.AES256(name.digest()), modes.CTR(bytes(16))).encryptor()

    def bytes(self, count: int) -> bytes:
        """Return ``count`` bytes."""
        return self._cipher.update(bytes(count))

    def integers(self, count: int) -> NDArray[np.uint32]:
        """Return uniform 32-bit integers (count,)."""
        return np.frombuffer(self.bytes(4 * count), "<u4")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return draws (count,) from the open interval (0, 1), on a grid of 2^-53."""
        words = np.frombuffer(self.bytes(8 * count), "<u8") >> np.uint64(11)
        return (words.astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, shape: int | tuple[int, ...], std: float = 1.0) -> NDArray[np.float64]:
        """Return independent draws from N(0, std^2) in this shape."""
        count = int(np.prod(shape, dtype=np.int64))
        if std == 0.0:
            return np.zeros(shape)
        half = (count + 1) // 2
        u, v = self.uniform(2 * half).reshape(2, half)
        radius, angle = std * np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)


def digest(*parts: Any) -> str:
    """Return a name of what the parts (arrays, bytes, words, numbers) say: equal parts, equal name."""
    name = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else None
        if isinstance(part, np.ndarray):
            data = part.dtype.str.encode() + str(part.shape).encode() + np.ascontiguousarray(part).tobytes()
        data = repr(part).encode() if data is None else data
        name.update(len(data).to_bytes(8, "big") + data)
    return name.hexdigest()[:32]


def secret(randomness: str, seed: int, folder: Path) -> bytes:
    """Return the 32 bytes that a device's noise comes from: of the run's seed, or of the device's own file.

    The file is made where it is missing, readable by its owner alone.
    """
    if randomness == "seed":
        return hashlib.sha256(f"fedlam noise {seed}".encode()).digest()
    path = folder / "secret"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".secret-")  # readable by its owner alone
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(32))
        with contextlib.suppress(FileExistsError):  # another worker was first: its secret is the secret
            os.link(name, path)
        Path(name).unlink()
    found = path.read_bytes()
    if len(found) != 32:
        raise ValueError(f"{path} holds {len(found)} bytes; a device's secret has 32: remove it")
    return found
