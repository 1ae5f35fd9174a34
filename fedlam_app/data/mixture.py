"""Labelled points of a mixture of Gaussians, made for each device on demand: data for very many devices.

A class c is G Gaussians of one width with means on a sphere; an example of it is a point of one of them:

    x = (sqrt(d) u_cg + sigma e) / sqrt(1 + sigma^2),     u_cg uniform, |u_cg| = 1,  e ~ N(0, I_d)

so that a feature has a mean square of 1 at any noise. The sizes and labels of devices are unlike:

    n_k = max(16, n exp(s z_k)),  z_k ~ N(0, 1);     q_k ~ Dir(alpha, ..., alpha) over classes

with n the median size. The Dirichlet draw of each device's own class shares is that of T.-M. H. Hsu, H. Qi,
M. Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
arXiv:1909.06335, here at unequal sizes. With several Gaussians a class no linear map tells the classes apart.

A device's data has a key of its own (seed, device): it is the same in any process, whatever was drawn
before, and however many devices there are. Nothing is held but the sizes, 8 bytes a device.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.config import MixtureConfig
from fedlam_app.data.label_partition import ALPHAS

LEAST = 16  # examples that every device has

Features = NDArray[np.float32]  # (n, d)
Labels = NDArray[np.int64]  # (n,)


@lru_cache(maxsize=4)
def means(mixture: MixtureConfig, seed: int) -> NDArray[np.float64]:
    """Return the directions u_cg of all classes and their Gaussians, (C, G, d), of length one."""
    shape = (mixture.classes, mixture.clusters, mixture.features)
    drawn = rng(seed, "mixture", "means").standard_normal(shape)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


@lru_cache(maxsize=4)
def examples_of_all(mixture: MixtureConfig, devices: int, seed: int) -> NDArray[np.int64]:
    """Return how many examples each of ``devices`` devices has, (devices,); more devices change no size."""
    drawn = rng(seed, "mixture", "examples").standard_normal(devices)
    sizes = np.rint(mixture.examples * np.exp(mixture.spread * drawn))
    counts = np.maximum(LEAST, sizes).astype(np.int64)
    counts.setflags(write=False)
    return counts


def shard(mixture: MixtureConfig, seed: int, device: int, examples: int) -> tuple[Features, Labels]:
    """Return the training examples of a device, sorted by label."""
    draw = rng(seed, "mixture", "shard", device)
    shares = draw.dirichlet(np.full(mixture.classes, np.clip(mixture.dirichlet, *ALPHAS)))
    labels = np.repeat(np.arange(mixture.classes), draw.multinomial(examples, shares))
    return _points(mixture, seed, labels, draw), labels


@lru_cache(maxsize=4)
def held_out(mixture: MixtureConfig, seed: int) -> tuple[Features, Labels]:
    """Return the ``mixture.test`` held-out examples, whose classes are equally likely."""
    draw = rng(seed, "mixture", "test")
    labels = draw.integers(mixture.classes, size=mixture.test)
    return _points(mixture, seed, labels, draw), labels


@lru_cache(maxsize=4)
def pooled(mixture: MixtureConfig, seed: int, devices: int, most: int) -> tuple[Features, Labels]:
    """Return ``most`` examples drawn from the union of all shards, or all where there are fewer."""
    counts = examples_of_all(mixture, devices, seed)
    ends = counts.cumsum()
    total = int(ends[-1])
    draw = rng(seed, "mixture", "pooled")
    chosen = np.arange(total) if total <= most else np.sort(draw.choice(total, most, replace=False))
    owners = np.searchsorted(ends, chosen, side="right")
    parts = []
    for device in np.unique(owners):
        features, labels = shard(mixture, seed, int(device), int(counts[device]))
        places = chosen[owners == device] - (ends[device] - counts[device])
        parts.append((features[places], labels[places]))
    return np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts])


def _points(mixture: MixtureConfig, seed: int, labels: Labels, draw: np.random.Generator) -> Features:
    """Draw a point of each label's class, (n, d)."""
    cluster = draw.integers(mixture.clusters, size=len(labels))
    centres = np.sqrt(mixture.features) * means(mixture, seed)[labels, cluster]
    noise = mixture.noise * draw.standard_normal(centres.shape)
    return ((centres + noise) / np.sqrt(1.0 + mixture.noise**2)).astype(np.float32)
