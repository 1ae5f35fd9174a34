"""Keyed randomness: every draw comes from a generator named by what it is for.

A key is a sequence of integers and words, for example ``(seed, "batch", round, device)``. The same
key gives the same draw in any process, in any order, on any number of workers; two different keys
give independent streams (NumPy's ``SeedSequence`` hashes them).
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = int | str


def rng(*key: Key) -> np.random.Generator:
    """Return the NumPy generator that belongs to ``key``."""
    return np.random.default_rng(np.random.SeedSequence([_word(part) for part in key]))


def seed_of(*key: Key) -> int:
    """Return a 63-bit seed for libraries that take an integer (``torch.manual_seed``)."""
    sequence = np.random.SeedSequence([_word(part) for part in key])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _word(part: Key) -> int:
    """Map a key part to a non-negative integer; words are hashed, so that purposes never collide."""
    if isinstance(part, str):
        return int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big")
    if part < 0:
        raise ValueError(f"a key part must be a non-negative integer or a word, got {part}")
    return int(part)
