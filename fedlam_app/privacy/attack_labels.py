"""Which label a sample has, read from its noised Jacobians, and how often that can succeed.

With a linear head of weight W (K, D), known to the server that averages the heads, the Jacobian of a sample
with label y is J_y = W^T (softmax(W r + b) - e_y): the server knows r, so it knows all K that there can be,
and takes the one nearest to the mean of what it got in k releases. Two clipped candidates are at most 2 C
apart, and the mean's noise has the standard deviation z C / sqrt(k) along their difference, hence

    P[the right one of two equally likely labels] <= Phi(sqrt(k) / z),

met where the candidates are opposite and both as long as C. No attack on this release is better: of two
Gaussians of one covariance, the nearer is the likelier (J. Neyman, E. Pearson, 1933).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def likeliest(released: Floats, candidates: Floats) -> NDArray[np.int64]:
    """Return the likeliest label (B,) of samples, from releases (k, B, D) and candidates (K, B, D)."""
    mean = released.astype(np.float64).mean(0)
    gaps = ((candidates.astype(np.float64) - mean) ** 2).sum(2)  # (K, B)
    return np.asarray(gaps.argmin(0))


def jacobians(logits: Floats, weight: Floats, clip: float) -> Floats:
    """Return what a sample's clipped Jacobian would be for each label: logits (B, K) to (K, B, D)."""
    chances = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
    chances /= chances.sum(1, keepdims=True)
    labels = np.eye(chances.shape[1])
    every = np.stack([(chances - label) @ weight for label in labels])
    lengths = np.linalg.norm(every, axis=2, keepdims=True)
    return np.asarray(every * np.minimum(1.0, clip / np.maximum(lengths, 1e-12)))


def bound(noise: float, releases: int = 1) -> float:
    """Return Phi(sqrt(k) / z), the best share of two equally likely labels that can be found."""
    from scipy.special import ndtr

    return float(ndtr(math.sqrt(releases) / noise)) if noise else 1.0
