"""The real code of privacy, broken in one place, as happens in practice; and an attack on its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytest import MonkeyPatch

from clients import private, split_private
from clients.ledgers import Ledgers
from clients.split import SplitDevice
from fedlam_app.base.keys import rng
from fedlam_app.config import RunConfig
from fedlam_app.experiments.audited import audit_config, exchange, worker_in
from fedlam_app.experiments.canaries import OneWord
from fedlam_app.privacy import attack_labels
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.privacy.noise import Stream

Break = Callable[[MonkeyPatch], None]


def scaled(patch: MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Break the noise that all mechanisms draw."""
    normal = Stream.normal

    def broken(self: Stream, shape: int | tuple[int, ...], std: float = 1.0) -> NDArray[np.float64]:
        first = shape if isinstance(shape, int) else shape[0]
        return normal(self, shape, std * factor(first))

    patch.setattr(Stream, "normal", broken)


def less_noise(patch: MonkeyPatch) -> None:
    scaled(patch, lambda _: 0.9)


def no_noise(patch: MonkeyPatch) -> None:
    scaled(patch, lambda _: 0.0)


def over_the_batch(patch: MonkeyPatch) -> None:
    scaled(patch, lambda batch: 1.0 / batch)


def used_again(patch: MonkeyPatch) -> None:
    patch.setattr(Ledgers, "stream", lambda self, device, *key: Stream(b"one key for everything"))


def unclipped(patch: MonkeyPatch) -> None:
    patch.setattr(split_private, "clip_samples", lambda rows, counts, clip: rows.double())
    patch.setattr(private, "clipped_sum", lambda gradients, clip: [g.sum(0) for g in gradients])


def half_charged(patch: MonkeyPatch) -> None:
    """Forget that replacing a label moves a gradient by 2 C and not by C."""
    charge = Ledger.charge
    patch.setattr(
        Ledger, "charge", lambda self, release: charge(self, dataclasses.replace(release, z=2.0 * release.z))
    )


def found_labels(config: RunConfig, folder: Path, noise: float, releases: int, samples: int = 4000) -> float:
    """Attack the canaries' labels through a whole exchange each, shown ever so little else each time."""
    keys: dict[str, Any] = {"strategy": "fedsgd-lora", "privacy__mechanism": "jacobian"}
    own = audit_config(config, folder, **keys, privacy__noise_multiplier=noise, train__batch_rows=samples)
    coins = rng(3, "found labels").random(samples) < 0.5
    device = SplitDevice(worker_in(folder, own, canaries := OneWord(own, coins, own.privacy.clip)))
    shown = [np.full((samples, 1), 1e-6 * number, np.float32) for number in range(releases)]
    sent = np.stack([exchange(device, 1, rows) * samples for rows in shown])
    logits = np.zeros((samples, 2))
    candidates = attack_labels.jacobians(logits, np.array([[1.0], [-1.0]]), own.privacy.clip)
    return float((attack_labels.likeliest(sent, candidates) == coins[canaries.drawn()]).mean())
