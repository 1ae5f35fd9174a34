"""What a device does so that its labels cannot be told from what it sends up at the second cut.

``privacy.mechanism`` says how, with g_i = dl_i/dR_i of sample i's loss (not of the batch's mean), C =
``privacy.clip``, z the noise multiplier and B the batch:

    jacobian              g~_i = clip_C(g_i) + N(0, (z C)^2 I)            up: g~_i / B       head: frozen
    logit                 d~_i = clip_C(softmax(W r_i + b) - e_{y_i}) + N(0, (z C)^2 I_K)
                          up: W^T d~_i / B       head: sum_i d~_i r_i^T / B, of any kind
    randomised-response   y~_i = y_i or, by a chance fixed by epsilon, another; once, for the whole run

All three are the Gaussian mechanism or randomised response (``privacy/labels.py``), placed at the cut; what
they promise is in ``privacy/statement.py``. With a linear head g_i = W^T (softmax(W r_i + b) - e_{y_i}), all
of y_i is in K - 1 dimensions: ``logit`` pays for K noises where ``jacobian`` pays for D, and whatever follows
from d~ (Jacobian, step of the head) is free. ``randomised-response`` pays once, however many epochs there
are. Losses, which tell of labels, stay here in the first two, and are those of y~ in the third.

Sensitivity. Neighbours differ in one label, and both have a release, so clipped values may lie 2 C apart:
the ledger is charged z C / (2 C) = z / 2. In logit space a label moves d_i by ||e_y - e_y'|| = sqrt(2), and
clipping is a projection, which never moves apart: min(2 C, sqrt(2)). Batches are visible, so there is no
amplification (q = 1); a sample comes once an epoch, so an epoch is one event and k epochs have
mu = 2 sqrt(k) / z. R may be chosen by an adversary: the clip holds for any R, a gradient that is not finite
counts as zero, and another R at the same step is another release.

What the server makes of it (J_i = dr_i/dtheta, D x P), the cascade:

    u~ = (1/B) sum_i J_i^T g~_i,     Cov(u~) = (z C / B)^2 sum_i J_i^T J_i,
    E||noise||^2 = (z C / B)^2 sum_i ||J_i||_F^2

for backward is linear in g~. The noise so comes multiplied by activations and lives in at most D dimensions a
sample. It hides labels and nothing else: given clear embeddings, J_i is known to whoever has them; u~ is no
function of g~ alone, and its row space gives away who took part whatever z is. Nor does it hide who takes
part, the sizes of batches, or the tokens, which the embeddings are.

Channel noise (``privacy.count-channel-noise``) is subtracted from the noise of ``jacobian`` alone: on W^T d~
it would not be isotropic in logit space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.adapter import Worker
from fedlam_app.base.records import SplitOrder
from fedlam_app.base.split_payload import position
from fedlam_app.base.vectors import pack
from fedlam_app.config import experiment
from fedlam_app.privacy.accounting import Release
from fedlam_app.privacy.clip import clip_samples
from fedlam_app.privacy.labels import chances, randomised
from fedlam_app.privacy.noise import digest
from fedlam_app.tasks.text_classification import TextClassification

NOISED = ("jacobian", "logit")
RELABELLED = ("randomised-response", "release-once")


@dataclass(frozen=True)
class Event:
    """One showing of representations to one device, and what the order says of its noise."""

    device: int
    step: int
    factor: float = 1.0  # of the device's own noise multiplier
    free: float = 0.0  # noise over C that the channel adds, at worst

    @classmethod
    def of(cls, order: SplitOrder, place: int) -> Event:
        """Return that of the ``place``-th device of an order; noise that is no number is a ``ValueError``."""
        factor = order.noise[place] if order.noise else 1.0
        free = order.free[place] if order.free else 0.0
        if not (math.isfinite(factor) and factor > 0.0 and math.isfinite(free) and free >= 0.0):
            raise ValueError(
                f"noise must be multiplied by a positive number and free of 0 or more, got"
                f" {factor} and {free}"
            )
        return cls(order.devices[place], order.shown[place], factor, free)


class PrivateCut:
    """The second cut of one experiment's devices; without a mechanism of its own it only runs backward."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.task, self.privacy = worker, worker.task, worker.config.privacy
        self.mechanism, self.local_steps = self.privacy.mechanism, worker.config.train.local_steps

    # --- labels -------------------------------------------------------------------------------------

    def relabelled(self, batch: Any, event: Event) -> Any:
        """Return a batch as the device may train on it: with its labels randomised, where that is the way.

        ``release-once`` has charged for labels and inputs together, when it released the inputs.
        """
        if self.mechanism not in RELABELLED:
            return batch
        epsilon = self.privacy.label_epsilon(event.device)
        told, name = told_labels(self.worker, event.device, epsilon)
        if self.mechanism == "randomised-response":
            release = Release(group="labels", part="labels", digest=name, pure=epsilon)
            self.worker.ledgers.charge(event.device, release)
        return batch._replace(targets=torch.from_numpy(told[self._ids(event)]).to(batch.targets))

    # --- backward -----------------------------------------------------------------------------------

    def backward(
        self, output: Tensor, leaf: Tensor, batch: Any, counts: list[int], event: Event
    ) -> tuple[float, NDArray[np.floating]]:
        """Return what may be told of the loss, and the Jacobians (R, D) as they go up.

        ``output`` is the head's, of the representations ``leaf`` (R, D), of which ``counts`` (B,) are each
        sample's. The head's gradient is left in its parameters. ``BudgetSpent`` where nothing may leave.
        """
        loss = self._loss(output, batch, event)
        if self.mechanism not in NOISED:
            # A trusted server clips each sample's own gradient, which its batch's size must not scale.
            scale = self.task.weight(batch) if self.mechanism == "server-dp-sgd" else 1.0
            (loss * scale).backward()
            assert leaf.grad is not None
            return 0.0 if self.privacy.withholds else float(loss.detach()), leaf.grad.cpu().numpy()
        samples = self.task.weight(batch)
        # Of the sum: the gradient at each sample's rows is that of its own loss, as no row meets another's.
        at = leaf if self.mechanism == "jacobian" else output
        (own,) = torch.autograd.grad(loss * samples, at, retain_graph=self.mechanism == "logit")
        noised = self._noised(own, counts, leaf, batch, event) / samples
        if self.mechanism == "jacobian":
            return 0.0, noised.cpu().numpy()
        output.backward(noised)
        for p in self.worker.model.head.parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                p.grad = None  # the server showed what is not finite: the head rests
        assert leaf.grad is not None
        return 0.0, leaf.grad.cpu().numpy()

    def _loss(self, output: Tensor, batch: Any, event: Event) -> Tensor:
        """Return a batch's mean loss: the task's, or that of labels which were randomised."""
        p, q = chances(output.shape[-1], self.privacy.label_epsilon(event.device))
        if q == 0.0:
            return self.task.criterion(output, batch)
        of_true = torch.log_softmax(output, 1).gather(1, batch.targets.to(output.device)[:, None])  # (B, 1)
        return -torch.logaddexp(of_true + math.log(p - q), torch.full_like(of_true, math.log(q))).mean()

    def _noised(self, rows: Tensor, counts: list[int], leaf: Tensor, batch: Any, event: Event) -> Tensor:
        """Return clipped gradients with their noise, charged: all that is ever made of them."""
        clip = self.privacy.clip
        apart = 2.0 * clip  # the largest distance of two clipped gradients
        if self.mechanism == "logit":
            apart = min(apart, math.sqrt(2.0))
        z = self._planned(event.device, apart / clip) * event.factor  # over ``apart``
        std = z * apart
        if self.mechanism == "jacobian" and self.privacy.count_channel_noise:
            std = math.sqrt(max(0.0, std**2 - (event.free * clip) ** 2))
        seen, head = leaf.detach().cpu().numpy(), pack(self.worker.model.head.parameters())
        said = digest(self.mechanism, event.step, self._ids(event), seen, head, clip, std)
        epoch = (event.step - 1) // self._steps_an_epoch
        release = Release(
            # Of this run: another's epochs cut the samples into other batches.
            group=f"{experiment(self.worker.config)} epoch {epoch}",
            part=f"step {event.step}",
            digest=said,  # the server reads it in the ledger, so it names no label
            z=z,
        )
        self.worker.ledgers.charge(event.device, release)
        key = digest(said, batch.targets.cpu().numpy())
        noise = self.worker.ledgers.stream(event.device, self.mechanism, event.step, key)
        clipped = clip_samples(rows, counts, clip)
        noised = clipped + torch.from_numpy(noise.normal(tuple(rows.shape), std)).to(clipped)
        return noised.to(rows)

    def _planned(self, device: int, apart: float) -> float:
        """Return the noise over the sensitivity, ``apart`` C: one for the whole run, whatever is spent."""
        if self.privacy.noise_multiplier > 0.0:
            return self.privacy.noise_multiplier / apart
        train = self.worker.config.train
        epochs = math.ceil(train.rounds * train.local_steps / self._steps_an_epoch)
        return self.worker.ledgers.planned(device, 1.0, epochs)

    # --- helpers ------------------------------------------------------------------------------------

    @property
    def _steps_an_epoch(self) -> int:
        assert isinstance(self.task, TextClassification)
        return self.task.steps_an_epoch

    def _ids(self, event: Event) -> NDArray[np.int64]:
        """Return the places in the device's shard of a step's samples."""
        ids = self.task.ids(event.device, *position(event.step, self.local_steps))
        assert ids is not None
        return ids


def told_labels(worker: Worker, device: int, epsilon: float) -> tuple[NDArray[np.int64], str]:
    """Return all labels of a device, in the order of its shard, as they may be told; always the same ones.

    Also returned is a name for the ledger of what determines them, of which nothing can be read: the noise's
    first bytes. Nothing is charged here.
    """
    task = worker.task
    assert isinstance(task, TextClassification)
    labels = np.asarray(task.texts[0].labels)[task.shards[device]]
    classes = len(task.texts[0].names)
    stream = worker.ledgers.stream(device, "labels", digest(labels, task.shards[device], classes, epsilon))
    name = stream.bytes(16).hex()
    return randomised(labels, classes, epsilon, stream), name
