"""Membership inference by a loss threshold: what a trained model gives away of who was in its training set.

Whoever trained tends to have the smaller loss. An adversary that knows a sample and the final model says
'member' where the loss l is small (S. Yeom et al., CSF 2018, arXiv:1709.01604). With members' losses m_i and
non-members' n_j:

    AUC                 P(m < n) + P(m = n) / 2, over all pairs; 1/2 is guessing
    its variance        var_i(V_i) / M + var_j(W_j) / N, V_i = P_j(m_i < n_j), W_j = P_i(m_i < n_j) (ties 1/2)
                        (E. DeLong, D. DeLong, D. Clarke-Pearson, Biometrics 1988)
    balanced accuracy   (P(m <= t) + P(n > t)) / 2 at the mean training loss t

Members and non-members must come from one distribution: where they do not (shards of unlike classes against a
test of all), a model that never trained is not at 1/2 either, so its AUC is recorded too (round 0). An attack
bounds privacy from one side alone: near 1/2 is no proof of it, far from 1/2 is proof of a leak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]  # (samples,) nats


@dataclass(frozen=True)
class Attack:
    """How well members were told from non-members, with standard errors; NaN where it cannot be said."""

    auc: float
    auc_se: float
    accuracy: float  # balanced
    accuracy_se: float


def loss_threshold(members: Losses, others: Losses) -> Attack:
    """Attack a model whose losses of ``members`` (M,) and of non-members ``others`` (N,) are given."""
    members, others = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if min(len(members), len(others)) == 0 or np.isnan(members).any() or np.isnan(others).any():
        return Attack(math.nan, math.nan, math.nan, math.nan)  # a model that diverged has no losses
    v = 1.0 - _below(others, members)  # (M,)
    w = _below(members, others)  # (N,)
    threshold = members.mean()
    hits, alarms = float(np.mean(members <= threshold)), float(np.mean(others <= threshold))
    rates = hits * (1.0 - hits) / len(members) + alarms * (1.0 - alarms) / len(others)
    return Attack(
        auc=float(w.mean()),
        auc_se=math.sqrt(_variance(v) / len(v) + _variance(w) / len(w)),
        accuracy=(hits + 1.0 - alarms) / 2.0,
        accuracy_se=math.sqrt(rates) / 2.0,
    )


def _below(values: Losses, at: Losses) -> NDArray[np.float64]:
    """Return for each of ``at`` which share of ``values`` is below it, ties by half."""
    ordered = np.sort(values)
    low, high = (np.searchsorted(ordered, at, side) for side in ("left", "right"))
    return (low + high) / (2.0 * len(values))


def _variance(shares: NDArray[np.float64]) -> float:
    """Return the sample variance; one sample has none."""
    return float(shares.var(ddof=1)) if len(shares) > 1 else 0.0
