"""The best linear forecast learned from other users: one complex ridge regression for all.

From the history of one antenna and its closed-form forecast, at a subcarrier and its neighbours, to the
antenna's future at that subcarrier. The regression needs only two sums over the training data, so devices
that send theirs obtain the pooled solution exactly, in one round and at (P^2 + P F) numbers: the
federated baseline with no gap to central training.
"""

from __future__ import annotations

import numpy as np

from fedlam_app.models.classical import Complex, Predictor, blocks, fb_ar, in_blocks, solve


def ridge_moments(
    history: Complex, target: Complex, forecast: Predictor = fb_ar, reach: int = 2
) -> tuple[Complex, Complex]:
    """Return X^H X (P, P) and X^H Y (P, F), summed over users, antennas and subcarriers.

    A row of X, of P = (T + F)(2 reach + 1) numbers, is the history and the ``forecast`` of one antenna at
    the subcarriers -reach..+reach (the band's edges are repeated); a row of Y is its future. ``target`` is
    (U, A, F, K), clean or noisy.
    """
    future = target.shape[2]
    width = (history.shape[2] + future) * (2 * reach + 1)
    gram, cross = np.zeros((width, width), np.complex128), np.zeros((width, future), np.complex128)
    for users in blocks(len(history)):
        features = _features(history[users], forecast, future, reach).reshape(-1, width)
        wanted = target[users].transpose(0, 1, 3, 2).reshape(-1, future)
        gram += features.conj().T @ features
        cross += features.conj().T @ wanted
    return gram, cross


def ridge_solve(gram: Complex, cross: Complex, ridge: float = 1e-5) -> Complex:
    """Return the weights (P, F); ``ridge`` is relative to the mean of the diagonal of ``gram``."""
    return solve(gram[None], cross[None], ridge)[0]


def ridge_predict(weights: Complex, history: Complex, forecast: Predictor = fb_ar, reach: int = 2) -> Complex:
    """Return the learned map's forecast; ``forecast`` and ``reach`` as in ``ridge_moments``."""
    future = weights.shape[1]

    def predict(block: Complex) -> Complex:
        features = _features(block, forecast, future, reach)
        return (features @ weights.astype(features.dtype)).transpose(0, 1, 3, 2)  # (U, A, F, K)

    return in_blocks(predict, history)


def _features(history: Complex, forecast: Predictor, future: int, reach: int) -> Complex:
    """Return (U, A, K, P): slots seen and forecast, at each subcarrier and its neighbours."""
    slots = np.concatenate([history, forecast(history, future)], axis=2).transpose(0, 1, 3, 2)
    subcarriers = slots.shape[2]
    near = np.arange(subcarriers)[:, None] + np.arange(-reach, reach + 1)  # (K, 2 reach + 1)
    return slots[:, :, np.clip(near, 0, subcarriers - 1)].reshape(*slots.shape[:3], -1)
