"""The large model on the edge server: forward for all devices of a step, backward from their Jacobians."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlam_app.models.backbones import Backbone
from fedlam_app.models.batched import BatchedBackbone
from fedlam_app.models.split import SplitModel, Tokens
from fedlam_app.tables.split import SplitConfig


class LargeModel:
    """The backbone of ``model``, with adapters that differ from device to device, and its CPU time."""

    def __init__(self, model: SplitModel, split: SplitConfig) -> None:
        assert isinstance(model.backbone, Backbone)
        self.backbone = BatchedBackbone(model.backbone, split.kept_tokens, plain=not split.batched)
        self._spent_s = 0.0

    def forward(
        self, models: NDArray[Any], rows: Sequence[int], tokens: Tokens, owners: NDArray[np.intp]
    ) -> NDArray[Any]:
        """Return the representations (R, D) of all devices; device i has adapters ``models[rows[i]]``.

        ``owners`` (B,) says whose each sample is.
        """
        began = time.process_time()
        shown = self.backbone.forward(models, list(rows), tokens, owners)
        self._spent_s += time.process_time() - began
        return np.asarray(shown.cpu().numpy())

    def backward(
        self, jacobians: NDArray[Any], want_tokens: bool
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return every device's gradient (K, p) and, where the embedding trains, dL/dE (N, D)."""
        began = time.process_time()
        gradients, into = self.backbone.backward(torch.from_numpy(jacobians), want_tokens)
        self._spent_s += time.process_time() - began
        return gradients, None if into is None else into.cpu().numpy()

    def spent_s(self) -> float:
        """Return the CPU seconds since the last call."""
        spent, self._spent_s = self._spent_s, 0.0
        return spent
