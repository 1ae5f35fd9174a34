"""The one release of a device's inputs: a noised vector a sample, made once and never again.

    u_i          clipped public projection of sample i, ||u_i|| <= C                 (``models/pooled.py``)
    u~_i         u_i + N(0, (z C)^2 I_d)
    y~_i         its label by randomised response of epsilon_y                       (``privacy/labels.py``)

A sample replaced by an empty one (u = 0) moves u by C at most, and no two samples share a vector, so a whole
shard costs what one sample does: one Gaussian event of noise z, and the pure epsilon of its label. All that
the run ever learns of inputs and labels follows from u~ and y~; epochs, steps and heads cost nothing more
(post-processing). epsilon_y is ``privacy.label-share`` of the budget, and z the least that fits the rest.

Made once, because a second draw of noise would be a second release: the whole shard is released when the
first of it is asked for, and lies in a file beside the ledger until its texts, or what is asked of privacy,
change. Whoever asks again gets the same bytes. Noise is keyed by sample and by all digits of u_i, so that no
two vectors ever share it. The file is written before the ledger, and the ledger before anything leaves: a
device that is killed in between finds a release that it has not told. A schedule of noise over rounds means
nothing here, and neither does noise of the channel, which digital links do not let through.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clients.adapter import Worker
from clients.split_private import told_labels
from fedlam_app.base.store import atomic_file
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.privacy.accounting import Release
from fedlam_app.privacy.noise import digest

GROUP = "release"  # every sample is in it, once
BATCH = 32  # texts that go through the front together


@dataclass(frozen=True)
class Released:
    """What the server may know of a device's shard, n samples."""

    vectors: NDArray[np.float64]  # (n, d), noised
    z: float  # the noise multiplier they have


class Releases:
    """The releases of one experiment's devices."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.privacy = worker, worker.config.privacy
        self._made: dict[int, Released] = {}

    def of(self, device: int) -> Released:
        """Return a device's release, charged; ``BudgetSpent`` where it may not be made."""
        if device in self._made:
            return self._made[device]
        path = self.worker.ledgers.folder / "released" / f"{device}.npz"
        epsilon = self.privacy.label_epsilon(device)
        _, labels = told_labels(self.worker, device, epsilon)
        private = self._private(device, labels)
        made = _read(path, private)
        if made is None:
            made = self._make(device)
            with atomic_file(path) as file:
                np.savez(file, vectors=made.vectors, z=made.z, private=private)
        # The server reads the ledger, and with it this: it names nothing but what may be known.
        said = digest(made.vectors, made.z, labels)
        release = Release(group=GROUP, part="shard", digest=said, z=made.z, pure=epsilon)
        self.worker.ledgers.charge(device, release)
        self._made[device] = made
        return made

    def _make(self, device: int) -> Released:
        """Clip, project and noise every text of the shard."""
        z, clip = self._noise(device), self.privacy.clip
        vectors = self._clipped(device)
        for i, vector in enumerate(vectors):
            key = digest(vector, z, clip)
            vector += self.worker.ledgers.stream(device, "release-once", i, key).normal(len(vector), z * clip)
        return Released(vectors, z)

    def _clipped(self, device: int) -> NDArray[np.float64]:
        """Return the clipped projections (n, d) of a device's texts: clear, and for this file alone."""
        task, model = self.worker.task, self.worker.model
        assert isinstance(model.embedding, PooledEmbedding)
        places, parts = np.arange(task.examples(device)), []
        with torch.no_grad():
            for start in range(0, len(places), BATCH):
                inputs = task.inputs(model, task.of(device, places[start : start + BATCH]))
                parts.append(model.embedding.vectors(inputs).double().cpu().numpy())
        vectors: NDArray[np.float64] = np.concatenate(parts)
        vectors[~np.isfinite(vectors).all(1)] = 0.0  # such a text says nothing at all
        # Rounding in float32 may leave a norm a little above C.
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        clipped: NDArray[np.float64] = vectors * np.minimum(1.0, self.privacy.clip / np.maximum(norms, 1e-12))
        return clipped

    def _noise(self, device: int) -> float:
        """Return z: as asked for, or the least that leaves the labels their share of what is left."""
        if self.privacy.noise_multiplier:
            return self.privacy.noise_multiplier
        ledger = self.worker.ledgers.of(device)
        if ledger.group == GROUP:  # charged for a file that is gone: the same vectors get the same noise
            return ledger.least_z
        return ledger.calibrate(1.0, 1, pure=self.privacy.label_epsilon(device))

    def _private(self, device: int, labels: str) -> str:
        """Return a name of all that a release is made from; it never leaves the device.

        ``labels`` names the randomised labels, and so the secret that all noise comes from.
        """
        task, model, privacy = self.worker.task, self.worker.model, self.privacy
        assert isinstance(model.embedding, PooledEmbedding)
        whole = task.of(device, np.arange(task.examples(device)))
        front = [buffer.cpu().numpy() for buffer in model.embedding.buffers(recurse=False)]
        asked = (privacy.noise_multiplier, privacy.clip, privacy.budget(device), privacy.label_share)
        texts = (whole.texts.ids.numpy(), whole.texts.lengths.numpy(), whole.targets.numpy())
        return digest(labels, *texts, *front, *asked, self.worker.config.split.device_blocks)


def _read(path: Path, private: str) -> Released | None:
    """Return what a file holds, if it was made from the same."""
    if not path.is_file():
        return None
    with np.load(path) as file:
        if str(file["private"]) != private:
            return None
        return Released(file["vectors"], float(file["z"]))
