"""A view of texts that anybody may know: the principal directions of the pooled vectors of public texts.

    u = V^T (x - m) / s        x (D,) a text's pooled vector; m (D,) and V (D, d): mean and first principal
                               directions of public texts; s: the median length of their V^T (x - m)
    x^ = m + s V u             the way back, the nearest point of the plane through m

Gaussian noise that hides a vector of norm C has z C on each of its coordinates, z C sqrt(d) in all. In the D
dimensions of a transformer that buries the text; in a few directions, along which texts differ most, it does
not. The directions come from public texts alone, so they cost no privacy and may be known to the server.
Units are chosen by public texts too: half of them have |u| <= 1, whatever the backbone, so that
``privacy.clip`` = 1 means the same everywhere. (Principal components: K. Pearson, 1901.)

A projection is made once and kept on disk, under the hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.store import atomic_file, cache_root
from fedlam_app.config import TextConfig
from fedlam_app.data.text import TextSet, load_texts

Doubles = NDArray[np.float64]

PUBLIC_TEXTS = 1000  # at most; a few principal directions of 384 need no more


@dataclass(frozen=True)
class Projection:
    """The public plane and its unit."""

    mean: Doubles  # (D,)
    directions: Doubles  # (D, d), orthonormal columns
    scale: float


def principal(vectors: Doubles, dimensions: int) -> Projection:
    """Return the projection on the first ``dimensions`` principal directions of ``vectors`` (n, D)."""
    n, width = vectors.shape
    if not 1 <= dimensions <= min(n - 1, width):
        raise ValueError(
            f"'privacy.dimensions' = {dimensions} is not allowed with {n} public texts and a backbone of"
            f" width {width}; it must be at most {min(n - 1, width)}"
        )
    mean = vectors.mean(0)
    directions = np.linalg.svd(vectors - mean, full_matrices=False)[2][:dimensions].T  # (D, d)
    # An SVD leaves signs open; devices and server may each have made their own.
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0)
    directions = directions * np.where(largest < 0.0, -1.0, 1.0)
    lengths = np.linalg.norm((vectors - mean) @ directions, axis=1)
    return Projection(mean, directions, max(float(np.median(lengths)), 1e-12))


def public_sample(text: TextConfig, source: str) -> TextSet:
    """Return up to ``PUBLIC_TEXTS`` training texts of a public source, the same for every seed."""
    whole, _ = load_texts(text.model_copy(update={"source": source, "train": 0, "test": 0}), 0)
    chosen = rng("public texts").permutation(len(whole))[:PUBLIC_TEXTS]
    return whole.take(np.sort(chosen))


def public_projection(
    text: TextConfig,
    source: str,
    dimensions: int,
    model: tuple[str | int, ...],
    cache: str,
    features: Callable[[TextSet], Doubles],
) -> Projection:
    """Return the projection that the public texts of ``source`` give, from memory, from disk, or made now.

    ``model`` names all of the frozen front that decides ``features``, which maps texts to vectors (n, D).
    """
    folder = cache_root(cache) / "projections"
    texts = _sample(text, source)
    said = [list(model), dimensions, text.max_tokens, text.pool, list(texts.texts)]
    path = folder / f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        made = principal(features(texts), dimensions)
        with atomic_file(path) as file:
            np.savez(file, mean=made.mean, directions=made.directions, scale=np.array(made.scale))
    return _read(path)


@lru_cache(maxsize=4)
def _sample(text: TextConfig, source: str) -> TextSet:
    return public_sample(text, source)


@lru_cache(maxsize=8)
def _read(path: Path) -> Projection:
    with np.load(path) as file:
        return Projection(file["mean"], file["directions"], float(file["scale"]))
