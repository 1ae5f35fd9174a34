"""Randomised response over K classes: a label that may be told, for a pure epsilon, as often as one likes.

    P(y~ = y) = p = e^eps / (e^eps + K - 1),      P(y~ = j) = q = 1 / (e^eps + K - 1)   for each j != y

p / q = e^eps, so a true label is believed at most e^eps times more than any other after y~ was seen, and no
delta is needed: pure epsilon, of one label replaced by another. What is computed from y~ costs nothing more,
so a label is randomised once and then used in every epoch. (S. L. Warner, "Randomized Response: A Survey
Technique for Eliminating Evasive Answer Bias", JASA 60, 1965; with K answers all but the true one alike.)

Trained on y~ as if it were y, a model learns to doubt: whoever minimises the likelihood of what was told
knows that P(y~ = j | x) = q + (p - q) P(y = j | x), and minimises

    - log(q + (p - q) softmax(logits)[y~])

whose minimum over many samples is the true P(y | x), and which no flipped label can drive to infinity, as
q > 0. (The forward correction of G. Patrini et al., "Making Deep Neural Networks Robust to Label Noise: A
Loss Correction Approach", CVPR 2017, arXiv:1609.03683, for a chance that is known and not estimated.) The
device computes it in ``clients/split_private.py``. The unbiased weights of N. Natarajan et al., "Learning
with Noisy Labels", NeurIPS 2013, w_j = (1[j = y~] - q) / (p - q), are negative where j != y~, so that their
loss has no lower bound.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlam_app.privacy.noise import Stream

Labels = NDArray[np.int64]


def chances(classes: int, epsilon: float) -> tuple[float, float]:
    """Return (p, q): that a label stays what it is, and that it becomes any one other; (1, 0) without end."""
    other = math.exp(-epsilon)  # e^eps itself may be infinite
    all_together = 1.0 + (classes - 1) * other
    return 1.0 / all_together, other / all_together


def randomised(labels: Labels, classes: int, epsilon: float, stream: Stream) -> Labels:
    """Return the labels (n,) as they may be told; equal labels and an equal stream give equal answers.

    The stream's key must name the labels and the epsilon: two answers to one question, of related noise,
    would be compared.
    """
    labels = np.asarray(labels, np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must be 0 to {classes - 1}, got {labels.min()} to {labels.max()}: they could be"
            " told from their answers"
        )
    draws = stream.uniform(2 * len(labels))
    kept = draws[: len(labels)] < chances(classes, epsilon)[0]
    # Of the K - 1 others, each alike; the draw's grid may round up to 1.
    away = 1 + np.minimum((draws[len(labels) :] * (classes - 1)).astype(np.int64), classes - 2)
    return np.where(kept, labels, (labels + away) % classes)
