"""The baseline that hurts: logistic regression on the frozen backbone's features, nothing else trained.

    min_W,b  (1/n) sum_i -log softmax(W z_i + b)[y_i] + (l2 / 2) ||W||^2,      z standardised on training

L-BFGS to convergence (the problem is convex); l2 is picked on a keyed fifth of the training set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from fedlam_app.base.keys import rng

L2 = (1e-4, 1e-3, 1e-2, 1e-1)

Matrix = NDArray[np.float64]


def linear_probe(
    train: Matrix, labels: NDArray[np.int64], test: Matrix, test_labels: NDArray[np.int64], seed: int
) -> tuple[Matrix, Matrix]:
    """Return tables (texts, 2) of training and test: negative log-likelihood [nat] and hit."""
    mean, std = train.mean(0), train.std(0) + 1e-8
    train, test = (train - mean) / std, (test - mean) / std  # (n, D)
    classes = int(max(labels.max(), test_labels.max())) + 1
    order = rng(seed, "probe").permutation(len(labels))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    losses = [
        _table(_fit(train[kept], labels[kept], classes, l2), train[held], labels[held])[:, 0].mean()
        for l2 in L2
    ]
    weights = _fit(train, labels, classes, L2[int(np.argmin(losses))])
    return _table(weights, train, labels), _table(weights, test, test_labels)


def _fit(features: Matrix, labels: NDArray[np.int64], classes: int, l2: float) -> Matrix:
    """Return weights (D + 1, C), the bias last."""
    inputs = np.concatenate([features, np.ones((len(features), 1))], 1)  # (n, D + 1)
    hot = np.eye(classes)[labels]
    decay = np.ones((inputs.shape[1], 1))
    decay[-1] = 0.0

    def objective(flat: Matrix) -> tuple[float, Matrix]:
        weights = flat.reshape(-1, classes)
        logs = log_softmax(inputs @ weights, axis=1)
        gradient = inputs.T @ (np.exp(logs) - hot) / len(labels) + l2 * decay * weights
        value = -(logs * hot).sum() / len(labels) + 0.5 * l2 * float((decay * weights**2).sum())
        return value, gradient.ravel()

    start = np.zeros(inputs.shape[1] * classes)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(found.x).reshape(-1, classes)


def _table(weights: Matrix, features: Matrix, labels: NDArray[np.int64]) -> Matrix:
    logs = log_softmax(features @ weights[:-1] + weights[-1], axis=1)
    hit = logs.argmax(1) == labels
    return np.stack([-logs[np.arange(len(labels)), labels], hit.astype(float)], 1)
