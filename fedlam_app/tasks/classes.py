"""How a classifier is scored, whatever it classifies: cross-entropy and accuracy, from sums an example."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sums(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """Return cross-entropy, and one where the largest logit is right, of each example: (B, 2).

    ``logits`` is (B, C), ``targets`` (B,).
    """
    logits = logits.double().cpu()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(1) == targets).double()
    return torch.stack([loss, right], 1).numpy()


def metrics(split: str, table: NDArray[np.float64]) -> dict[str, Any]:
    """Return a split's metrics from the rows of :func:`sums`, (B, 2)."""
    loss, right = table.mean(0)
    if split == "train":
        return {"train_loss": float(loss)}
    return {"accuracy": float(right), "loss": float(loss)}
