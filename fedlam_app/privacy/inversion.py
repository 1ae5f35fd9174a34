"""What can be read of a text from what leaves a device: three attacks without any language model.

    clear embeddings      the nearest row of the public word table is the token          (``nearest``)
    one vector a text     the words whose own released vectors lie nearest to the text's  (``best_guesses``)
    gradient of LoRA's A  the words that lie in its row space                  (``span``, ``closest``)

The last rests on dL/dA = s sum_t (B^T delta_t) x_t^T, x_t (D,) the input of the first adapted layer at token
t, delta_t the gradient of its output: every row is a combination of the x_t. Where a text has no more tokens
than there are rows of all gradients that share the input (queries and values: 2 r), the rows span exactly
the x_t, and of all words at all places just those that were there lie in that space (after I. Petrov et al.,
"DAGER", NeurIPS 2024, arXiv:2405.15586). Noise on the gradient, however scaled by activations, turns the
space: the attack dies long before an epsilon is small, so that it fails proves nothing. An attacker with a
language model, or who has seen other texts of the same device, does better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]

ROWS = 1024  # of distances at a time


def nearest(vectors: Floats, table: Floats) -> Ids:
    """Return for each vector (N, D) the row of ``table`` (V, D) that is nearest to it, (N,)."""
    half = (table.astype(np.float64) ** 2).sum(1) / 2.0  # |v - w|^2 / 2 = |v|^2 / 2 - v.w + |w|^2 / 2
    found = []
    for start in range(0, len(vectors), ROWS):
        near = vectors[start : start + ROWS].astype(table.dtype) @ table.T
        found.append((near - half.astype(table.dtype)).argmax(1))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def recovered(guessed: Ids, true: Ids) -> float:
    """Return the share of tokens guessed right at their own place."""
    return float((np.asarray(guessed) == np.asarray(true)).mean())


def best_guesses(released: Floats, candidates: Floats, count: int) -> Ids:
    """Return for each released vector (B, d) the ``count`` candidates (V, d) nearest to it, best first."""
    gaps = ((released[:, None, :] - candidates[None, :, :]) ** 2).sum(2)  # (B, V)
    return np.argsort(gaps, axis=1, kind="stable")[:, :count]


def found_in_texts(guesses: Ids, texts: Sequence[Ids]) -> float:
    """Return the share of all tokens of texts that are among as many guesses as the text has tokens.

    A token that a text has twice must be guessed once.
    """
    right = total = 0
    for row, text in zip(guesses, texts, strict=True):
        own = np.unique(text)
        right += len(np.intersect1d(row[: len(text)], own))
        total += len(own)
    return right / total


# --- the span of LoRA's gradients ----------------------------------------------------------------------


def span(gradients: Sequence[Floats], tokens: int) -> Floats:
    """Return an orthonormal basis (k, D) of what gradients (r, D) that share an input span.

    Of noised gradients, the ``tokens`` strongest directions.
    """
    stacked = np.concatenate([np.asarray(gradient, np.float64) for gradient in gradients])
    _, strengths, directions = np.linalg.svd(stacked, full_matrices=False)
    rank = int((strengths > strengths[0] * 1e-6).sum()) if strengths[0] else 0
    return np.asarray(directions[: min(rank, tokens)])


def closest(candidates: Floats, bases: Sequence[Floats]) -> tuple[Ids, NDArray[np.float64]]:
    """Return for each of n spaces the candidate (V, D) nearest to it, (n,), and its distance, (n,).

    Distances are over a candidate's length: 0 lies inside, 1 stands upright.
    """
    units = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    words, gaps = [], []
    for basis in bases:
        inside = np.square(units @ basis.T.astype(units.dtype)).sum(1)  # (V,)
        words.append(int(inside.argmax()))
        gaps.append(math.sqrt(max(0.0, 1.0 - float(inside.max()))))
    return np.array(words, np.int64), np.array(gaps)
