"""The large model on the edge server: forward for all devices of a step, backward from their Jacobians.

Where a trusted server runs DP-SGD, each sample stands where a device stood (:class:`PerSample`): the
low-rank paths give it a gradient of its own, g_i = (dr_i / d(A, B))^T J_i, from the same backward, with no
hooks and no second model.
"""

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

GRADIENTS = 2**24  # values of per-sample gradients at a time: 64 MB in float32


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


class PerSample(LargeModel):
    """The same pass, with one representation a sample, whose backward clips every sample's gradient."""

    def forward(
        self, models: NDArray[Any], rows: Sequence[int], tokens: Tokens, owners: NDArray[np.intp]
    ) -> NDArray[Any]:
        own = [rows[owner] for owner in owners.tolist()]
        self._given = models, own, tokens
        return super().forward(models, own, tokens, np.arange(len(own)))

    def clipped(self, jacobians: NDArray[Any], clips: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return sum_i g_i min(1, C_i / ||g_i||) (p,) of the samples shown; ``clips`` (B,) are the C_i.

        ``jacobians`` (B, D) are of each sample's own loss. A gradient that is not finite counts as zero.
        Samples are worked off in parts, so that memory does not grow with the batch.
        """
        models, rows, tokens = self._given
        total = np.zeros(models.shape[1])
        size = max(1, GRADIENTS // models.shape[1])
        for start in range(0, len(jacobians), size):
            part = slice(start, start + size)
            if len(jacobians) > size:
                super().forward(models, rows[part], _some(tokens, part), np.arange(len(rows[part])))
            gradients, _ = self.backward(jacobians[part], False)
            total += clipped_sum(gradients, clips[part])
        return total


def clipped_sum(gradients: NDArray[Any], clips: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sum_i g_i min(1, C_i / ||g_i||) (p,) of gradients (n, p), in float64; not finite is zero."""
    total = np.zeros(gradients.shape[1])
    for gradient, clip in zip(gradients, clips.tolist(), strict=True):
        own = gradient.astype(np.float64)
        norm = float(np.linalg.norm(own))
        if np.isfinite(norm):
            total += own * min(1.0, clip / max(norm, 1e-300))
    return total


def _some(tokens: Tokens, part: slice) -> Tokens:
    """Return a stretch of samples of one representation each."""
    ends = tokens.lengths.cumsum(0)
    own = tokens.lengths[part]
    first, last = int(ends[part][0] - own[0]), int(ends[part][-1])
    rows = None if tokens.rows is None else tokens.rows[part] - first
    return Tokens(tokens.values[first:last], own, rows)
