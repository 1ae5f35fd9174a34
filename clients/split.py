"""Device work in a split: embed, finish the pass with the own head, send back Jacobians.

An exchange may bring three things, in this order. ``graded``: dL/dE of a batch that this device embedded,
where its embedding trains. ``shown``: representations of a batch; the device computes its loss and
J = dl/dR, and steps its head. ``wanted``: a batch to embed. Labels, tokens and the modules stay here.

    J = dl(head_theta(R), y) / dR,      theta <- theta - lr (dl/dtheta + mu (theta - theta_average))

The device's modules (embedding and head, what of them trains) are its own, in its memory; ``modules`` in an
order replaces them by the average of all devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.adapter import Worker
from clients.faults import tampered, vanishes
from clients.memory import Arrays
from clients.released import Releases
from clients.split_private import Event, PrivateCut
from fedlam_app.base import sparse
from fedlam_app.base.keys import seed_of
from fedlam_app.base.records import ModulesOrder, SplitOrder, cut
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.split_payload import (
    Downlink,
    Uplink,
    from_bytes,
    from_integers,
    jacobian_draw,
    position,
    to_bytes,
    to_integers,
    version,
)
from fedlam_app.base.vectors import pack, unpack
from fedlam_app.base.wire import FORMATS
from fedlam_app.models.split import Tokens, flat, rows_of
from fedlam_app.models.text import Texts


@dataclass
class Answer:
    """What one device sends back."""

    device: int
    weight: float
    loss: float
    payload: NDArray[np.uint8]


class SplitDevice:
    """The device side of a split experiment, serving any of its devices."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.config, self.task, self.model = worker, worker.config, worker.task, worker.model
        if self.config.privacy.mechanism == "dp-sgd" or self.config.privacy.secure:
            raise ValueError("DP-SGD and masks hide nothing of what crosses a split")
        self.local_steps = self.config.train.local_steps
        self.cut = PrivateCut(worker)
        self.once = Releases(worker) if self.config.privacy.mechanism == "release-once" else None
        self.modules = list(self.model.device_side().values())
        self.embedding_trains = any(p.requires_grad for p in self.model.embedding.parameters())
        self.first = worker.initial[worker.modules]  # (q,) the modules of a device that starts
        wire = self.config.wire
        self.remembers = bool(self.modules) or wire.jacobian == "top-k" or wire.delta

    def answer(self, order: SplitOrder, place: int) -> Answer | None:
        """Return what the ``place``-th device of an order sends; ``None`` where it vanishes first."""
        device, shown, graded = order.devices[place], order.shown[place], order.graded[place]
        if shown and vanishes(self.config, device, shown):
            return None
        down = from_bytes(cut(order.payload, order.sizes)[place], Downlink)
        parent = order.known[place]
        memory = self.worker.memory.load(device, parent) if self.remembers else {}
        average = np.frombuffer(down.modules, self.worker.initial.dtype)
        if len(average):
            memory["average"] = memory["kept"] = average
        if self.modules:
            unpack(memory.get("kept", self.first), self.modules)
        if graded:
            self._descend_embedding(device, graded, down.gradients)
        weight = loss = 0.0
        jacobians = b""
        if shown:
            weight, loss, jacobians = self._finish(Event.of(order, place), down.representations, memory)
        sent = self._embed(device, order.wanted[place], down.missing) if order.wanted[place] else Uplink()
        if shown or graded:
            if self.modules:
                memory["kept"] = pack(self.modules)
            if self.remembers:
                round, _ = position(shown or graded, self.local_steps)
                before = version(0, (round - 1) * self.local_steps)  # the largest of the rounds before
                self.worker.memory.save(device, version(shown, graded), memory, parent, before)
        parts = Uplink(
            jacobians=jacobians, lengths=sent.lengths, tails=sent.tails, embeddings=sent.embeddings
        )
        return Answer(device, weight, loss, to_bytes(parts))

    def hand_in(self, order: ModulesOrder) -> NDArray[np.floating]:
        """Return every device's modules (n, q), to be averaged."""
        known = zip(order.devices, order.known, strict=True)
        return np.stack([self.worker.memory.load(k, v).get("kept", self.first) for k, v in known])

    # --- the three parts of an exchange --------------------------------------------------------------

    def _finish(self, event: Event, data: bytes, memory: Arrays) -> tuple[float, float, bytes]:
        """Return the batch's weight, its loss and the coded Jacobians; step the head in place."""
        device, step = event.device, event.step
        batch, tokens, side = self._embedded(device, step, graph=False)
        batch = self.cut.relabelled(batch, event)
        counts = rows_of(tokens).tolist()  # (B,)
        found = self._decode(data, counts, tokens.values.shape[1], device, step, memory)
        leaf = torch.from_numpy(found).to(tokens.values).requires_grad_(True)  # (R, D)
        # A task whose samples all have one length has a head that takes them so.
        seen = leaf.unflatten(0, (len(counts), -1)) if self.task.selection == "all" else leaf
        loss, jacobian = self.cut.backward(self.model.head(seen, side), leaf, batch, counts, event)
        self._descend(self._rate(step), memory.get("average"), self.model.head.parameters())
        jacobian = tampered(self.config, device, jacobian)
        data = self._encode(jacobian, counts, device, step, memory)
        return self.task.weight(batch), loss, data

    def _descend_embedding(self, device: int, step: int, data: bytes) -> None:
        """Step the embedding on the gradient that came back for a batch."""
        _, tokens, _ = self._embedded(device, step, graph=True)
        form = FORMATS[self.config.wire.representation]
        gradient = form.decode(data, *tokens.values.shape)
        tokens.values.backward(torch.from_numpy(gradient).to(tokens.values))
        self._descend(self._rate(step), None, self.model.embedding.parameters())

    def _embed(self, device: int, step: int, missing: bytes) -> Uplink:
        """Return the embeddings of the samples asked for, or of the whole batch of a task without ids."""
        if self.once is not None:
            ids = from_integers(missing, "<u4")
            data = FORMATS[self.config.wire.embedding].encode(self.once.of(device).vectors[ids])
            return Uplink(lengths=to_integers(np.ones_like(ids)), embeddings=data)
        if missing:
            batch = self.task.of(device, from_integers(missing, "<u4"))
            inputs = self.task.inputs(self.model, batch)
            with torch.no_grad():
                tokens, _ = self.model.embedding(inputs)
        else:
            batch, tokens, _ = self._embedded(device, step, graph=False)
            inputs = None
        packed = flat(tokens)
        lengths = to_integers(packed.lengths.cpu().numpy())
        tails = b""
        if self.task.selection == "tail":
            tails = to_integers(rows_of(packed).cpu().numpy())
        if self.config.wire.embedding == "token-ids":
            assert isinstance(inputs, Texts)
            data = to_integers(inputs.ids.cpu().numpy(), "<u2")
        else:
            data = FORMATS[self.config.wire.embedding].encode(packed.values.detach().cpu().numpy())
        return Uplink(lengths=lengths, tails=tails, embeddings=data)

    # --- helpers ------------------------------------------------------------------------------------

    def _embedded(self, device: int, step: int, graph: bool) -> tuple[Any, Tokens, Any]:
        """Return a step's batch, its tokens and what stays on the device: the same whenever it is asked."""
        batch = self.task.batch(device, *position(step, self.local_steps))
        if self.once is not None:  # charged, and the server has the vectors: the texts are done with
            self.once.of(device)
            like, count = next(self.model.head.parameters()), len(batch.targets)
            values = like.new_zeros(count, int(self.model.backbone.width))  # type: ignore[arg-type]
            return batch, Tokens(values, torch.ones(count, dtype=torch.int64)), None
        for module in (self.model.embedding, self.model.head):
            module.train()
        if self.embedding_trains:  # dropout is the one draw that torch makes by itself: key it too
            torch.manual_seed(seed_of(self.config.seed, "dropout", device, step))
        with torch.set_grad_enabled(graph):
            tokens, side = self.model.embedding(self.task.inputs(self.model, batch))
        return batch, flat(tokens), side

    def _rate(self, step: int) -> float:
        train = self.config.train
        return learning_rate(self.config.split.head_lr, train.rounds, step / self.local_steps)

    def _descend(self, rate: float, average: NDArray[np.generic] | None, parameters: Any) -> None:
        """Plain gradient descent, pulled towards the average that the device was given (FedProx)."""
        mu, start = self.config.split.proximal_mu, 0
        stepped = {id(p) for p in parameters}
        with torch.no_grad():
            for p in self.modules:
                stop = start + p.numel()
                if id(p) in stepped and p.grad is not None:
                    if mu and average is not None:
                        origin = torch.from_numpy(np.array(average[start:stop])).view_as(p)
                        p.grad.add_(p - origin.to(p), alpha=mu)
                    p.sub_(p.grad, alpha=rate)
                p.grad = None if id(p) in stepped else p.grad
                start = stop

    def _decode(
        self, data: bytes, counts: list[int], width: int, device: int, step: int, memory: Arrays
    ) -> NDArray[np.floating]:
        """Return the representations (R, D), with what is remembered of them where they come as changes."""
        found = FORMATS[self.config.wire.representation].decode(data, sum(counts), width)
        if not self.config.wire.delta:
            return found
        ids = self.task.ids(device, *position(step, self.local_steps))
        assert ids is not None
        parts = np.split(found, np.cumsum(counts)[:-1])
        for i, part in zip(ids.tolist(), parts, strict=True):
            part += memory.get(f"seen.{i}", 0.0)  # type: ignore[misc]
            memory[f"seen.{i}"] = part.copy()
        return np.concatenate(parts)

    def _encode(
        self, jacobian: NDArray[np.floating], counts: list[int], device: int, step: int, memory: Arrays
    ) -> bytes:
        """Return the Jacobians' bytes; a sparse link's memory is kept by sample."""
        wire = self.config.wire
        if wire.jacobian != "top-k":
            return FORMATS[wire.jacobian].encode(jacobian, jacobian_draw(self.config, device, step))
        ids = self.task.ids(device, *position(step, self.local_steps))
        assert ids is not None
        ends = np.cumsum(counts)[:-1]
        owed = [
            memory.get(f"owed.{i}", np.zeros_like(part))
            for i, part in zip(ids.tolist(), np.split(jacobian, ends), strict=True)
        ]
        data, rest = sparse.with_feedback(jacobian, np.concatenate(owed), wire.top_k)
        memory.update({f"owed.{i}": part for i, part in zip(ids.tolist(), np.split(rest, ends), strict=True)})
        return data
