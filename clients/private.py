"""DP-SGD on the device: what it hands in hides every one of its samples, from the server too.

M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133, algorithm 1, on
whatever trains. At each local step each of the n samples is in the batch by a coin of its own, P = q:

    S = sum_{i in batch} g_i min(1, C / ||g_i||)                                        (per_sample.py)
    g = (S + N(0, z^2 C^2 I)) / (q n),          then a step of the optimiser along g

q is ``privacy.sampling-rate``, or ``train.batch-rows`` / n. The denominator is the expected batch, a
constant: how large the batch really was is private. An empty one is a step too, of noise alone. Coins and
noise come from the device's own stream (``privacy/noise.py``), under a key of all that the sums depend on:
whoever repeats a round gets the same bytes, and whoever asks with another vector gets other noise, and is
charged.

A round of T steps is one entry of the ledger, (q, z) T times, written before the first step; where it would
pass the budget, the device does nothing. z is ``privacy.noise-multiplier``, or the least noise at which the
device's expected share of the rounds to come fits into what is left of its budget. That z is found once and
kept, so that a run that goes as planned has one noise from its first round to its last.

A sample whose gradient is not finite counts as zero, which is within its bound too. Weight decay and
FedProx's pull come after the noise: they depend on no data. ``train.clip-norm`` is not used. What the radio
adds to the vector is no part of z: it comes once a round, and not at each step. How long a step takes, which
a report says in CPU seconds, still tells of the size of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients.loop import optimiser_of
from clients.per_sample import clipped_sum, per_sample
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.vectors import pack
from fedlam_app.config import experiment, sampling_rate
from fedlam_app.privacy.accounting import Release
from fedlam_app.privacy.noise import Stream, digest

if TYPE_CHECKING:
    from clients.adapter import Worker


PASS = 1024  # tokens (or examples) that go through the model at once

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Round:
    """A device's round, as the server orders it."""

    device: int
    number: int
    steps: int
    proximal: float  # FedProx's mu
    noise: float  # what the device's own noise multiplier is multiplied by
    told: str  # digest of what the frozen weights have taken in


def dp_sgd(
    worker: Worker, round: Round, trained: Mapping[str, nn.Parameter], within: Sequence[Tensor]
) -> None:
    """Train ``trained`` in place for the steps of a round, which is charged before anything is done.

    ``trained`` is all of the model that has ``requires_grad``. ``within`` masks each: where it is false the
    device has nothing (its rank is below the model's), and gets no noise. ``BudgetSpent`` where the ledger
    refuses.
    """
    config, task, device, parameters = worker.config, worker.task, round.device, list(trained.values())
    clip, samples = config.privacy.clip, task.examples(device)
    q = sampling_rate(config, samples)
    z = round.noise * multiplier(worker, device, round.number, q)
    has = [mask.cpu().numpy() for mask in within]
    start, mark = pack(worker.parameters), _mark(worker, device)
    name = digest(start, sorted(trained), *has, round, mark, experiment(config))
    release = Release(group=f"round {round.number}", digest=name, z=z, q=q, steps=round.steps)
    worker.ledgers.charge(device, release)
    draw = worker.ledgers.stream(device, "dp-sgd", name, repr(z))

    sizes = task.sizes(device)
    optimiser = optimiser_of(
        parameters, config.train, learning_rate(config.train.lr, config.train.rounds, round.number)
    )
    began = [p.detach().clone() for p in parameters]
    with per_sample(worker.model, trained) as gradients:
        for _ in range(round.steps):
            sums = [torch.zeros_like(p) for p in parameters]
            for ids in chunks(poisson(draw, samples, q), sizes):
                found = gradients(task.losses(worker.model, task.of(device, ids)))
                for total, part in zip(sums, clipped_sum(found, clip), strict=True):
                    total += part
            noises = gaussian(draw, sums, z * clip)
            for p, total, noise, mask, origin in zip(parameters, sums, noises, within, began, strict=True):
                p.grad = (total + noise * mask) / (q * max(1, samples))
                if round.proximal:
                    p.grad.add_(p.detach() - origin, alpha=round.proximal)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def poisson(draw: Stream, samples: int, q: float) -> Ids:
    """Return which samples a step's coins choose, ascending; maybe none."""
    return np.flatnonzero(draw.uniform(samples) < q).astype(np.int64)


def chunks(ids: Ids, sizes: Ids) -> Iterator[Ids]:
    """Cut a batch of any size into parts of about ``PASS`` tokens, samples of like ``sizes`` (n,) together.

    The sum does not depend on it, and there is little padding and a bound to memory; none of nothing.
    """
    if len(ids):
        ordered = ids[np.argsort(sizes[ids], kind="stable")]
        yield from np.array_split(ordered, min(len(ids), -(-int(sizes[ids].sum()) // PASS)))


def gaussian(draw: Stream, like: Sequence[Tensor], std: float) -> list[Tensor]:
    """Return independent draws from N(0, std^2) in the shapes of ``like``."""
    drawn = torch.from_numpy(draw.normal(sum(t.numel() for t in like), std))
    parts = drawn.split([t.numel() for t in like])
    return [part.to(t).view_as(t) for part, t in zip(parts, like, strict=True)]


def multiplier(worker: Worker, device: int, round: int, q: float) -> float:
    """Return z, a device's noise multiplier: as configured, or as found in the first round that asks.

    Its share of the rounds to come is what a cohort drawn at random gives it on average, rounded up; who is
    chosen more often than that is refused at the end. ``BudgetSpent`` where nothing is left.
    """
    config = worker.config
    privacy, train = config.privacy, config.train
    if privacy.noise_multiplier or privacy.noiseless:
        return privacy.noise_multiplier
    rounds = max(1, math.ceil((train.rounds - round + 1) * train.share))
    return worker.ledgers.planned(device, q, rounds * train.local_steps)


def _mark(worker: Worker, device: int) -> str:
    """Return a name of a device's data that tells nothing of it: it may be read in the ledger.

    Were two data sets of one configuration given one noise, the difference of their vectors would be clear.
    """
    batch = worker.task.of(device, np.arange(worker.task.examples(device)))
    return worker.ledgers.stream(device, "data", digest(*_arrays(batch))).bytes(16).hex()


def _arrays(batch: Any) -> Iterator[NDArray[np.generic]]:
    """Yield the arrays of a batch, tuples of tensors and tuples."""
    if isinstance(batch, Tensor):
        yield batch.numpy()
    for part in batch if isinstance(batch, tuple) else ():
        yield from _arrays(part)
