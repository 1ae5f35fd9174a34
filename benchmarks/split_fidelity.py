"""What each link's number format does to the LoRA gradient, through the real split round.

MiniLM with six blocks, LoRA r = 8 on all linears at a keyed point where B is not zero (at zero the gradient
of A is zero), 128 sentences of Rotten Tomatoes on eight devices, one step of all of them with real messages.
The server's rule keeps the step's gradient g and does not follow it, so every wire is measured at one point:

    cosine = <g, g_fp32> / (|g| |g_fp32|)        error = |g - g_fp32| / |g_fp32|

Heads are fitted to these sentences, as if devices had trained theirs for a while, and then frozen. With two
classes the Jacobians of a linear head are multiples of one row, so rounding to nearest errs alike in every
sample; at random, by a draw that the server subtracts, errors are as large, and average out over steps.
Representations as changes (``wire.delta``) are measured at a sample's second visit, after a move of the LoRA
as large as a training step's. Top-k is measured at the first visit, before its feedback has had a turn.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.base.layout import Layout
from fedlam_app.base.vectors import Vector, pack, unpack
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.grid import InProcessGrid
from fedlam_app.models.factors import layout_of
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.text_classification import TextClassification
from strategies.fedsgd_lora import FedSgdLora
from strategies.split_lora import SplitFederation

SEED, DEVICES, BATCH = 2025, 8, 16
STD_B = 0.02  # of B's elements
HEAD_STEPS = 200  # about four epochs of the full data
DRAWS = 4  # of stochastic rounding
WIRES = ("embedding", "representation", "jacobian")
FORMATS = ("fp16", "bf16", "int8", "int4")
BASE: dict[str, Scalar] = {
    "job": "train",
    "seed": SEED,
    "task": "text-classification",
    "strategy": "fedsgd-lora",
    "text.train": DEVICES * BATCH,
    "train.devices": DEVICES,
    "train.batch-rows": BATCH,
    "train.local-steps": 1,
    "train.rounds": 2,
    "split.heads": "frozen",
    **{f"wire.{link}": "fp32" for link in WIRES},
    "federation.supernodes": DEVICES,
    "federation.server-threads": 1,
}
Gradient = NDArray[np.float64]  # (p,)
Gradients = NDArray[np.float64]  # (rounds, p)
Wire = Mapping[str, Scalar]  # keys of the table ``wire``


class Standing(FedSgdLora):
    """FedSGD that keeps each step's gradient and goes where it is told, not along it."""

    moves: ClassVar[float] = 0.0  # by how much each element moves after a step

    def init(self, vector: Vector, devices: Sequence[int], layout: Layout) -> None:
        super().init(standing_point(vector, layout), devices, layout)
        self.gradients: list[Gradient] = []

    def descend(self, gradient: Gradient) -> None:
        self.gradients.append(gradient.copy())
        signs = rng(SEED, "move", len(self.gradients)).choice([-1.0, 1.0], self.vector.shape)
        self.vector = (self.vector + self.moves * signs).astype(self.vector.dtype)


class Moving(Standing):
    """The same, with a move as large as AdamW's at ``train.lr`` = 1e-3 between two visits."""

    moves: ClassVar[float] = 1e-3


class Fitted(TextClassification):
    """Text classification whose head starts where plain descent on these sentences leads."""

    def build_model(self) -> SplitModel:
        model, head = super().build_model(), fitted_head()
        with torch.no_grad():
            for p, fitted in zip(model.head.parameters(), head, strict=True):
                p.copy_(fitted)
        return model


def standing_point(vector: Vector, layout: Layout) -> Vector:
    """Return ``vector`` (p,) with every B drawn by a key."""
    start, draw = vector.copy(), rng(SEED, "adapter")
    for _, b in layout.factors(start):
        b[:] = STD_B * draw.standard_normal(b.shape)
    return start


@functools.cache
def fitted_head() -> list[torch.Tensor]:
    """Return weight and bias after some steps of descent on all sentences, at the standing point."""
    config = parse(BASE)
    task = TextClassification(config)
    model = task.build_model()
    named = model.server_side()
    layout = layout_of(model.backbone, config.model.alpha / config.model.rank)
    unpack(standing_point(pack(named.values()), layout), named.values())
    batch = task.collate(task.encoded["train"])
    with torch.no_grad():
        seen = model.backbone(model.embedding(task.inputs(model, batch))[0])  # (B, D)
    head = [p.requires_grad_(True) for p in model.head.parameters()]
    for _ in range(HEAD_STEPS):
        found = torch.autograd.grad(task.criterion(model.head(seen, None), batch), head)
        with torch.no_grad():
            for p, gradient in zip(head, found, strict=True):
                p.sub_(gradient, alpha=config.split.head_lr)
    return [p.detach() for p in head]


def gradients(kind: type[Standing], rounds: int, task: type[TextClassification], wire: Wire) -> Gradients:
    """Return the gradients (rounds, p) of visits of the same texts, over a wire that is else fp32."""
    TASKS["text-classification"] = task  # the devices' too: they are in this process
    flat = {**BASE, **{f"wire.{key}": value for key, value in wire.items()}}
    # Devices keep the model of a configuration, so another head is another experiment.
    flat["train.weight-decay"] = 0.0 if task is Fitted else 1e-9
    config = parse(flat)
    model = task(config).build_model()
    rule = kind(config)
    scale = config.model.alpha / config.model.rank
    devices = list(range(DEVICES))
    rule.init(pack(model.server_side().values()), devices, layout_of(model.backbone, scale))
    federation = SplitFederation(rule, "{}", devices, config, task(config), model)
    grid = InProcessGrid(app, DEVICES, flat)
    for number in range(1, rounds + 1):
        cost = federation.train_round(grid, number)
        if cost.failures:
            raise RuntimeError(cost.failures[0])
    return np.stack(rule.gradients)


def main() -> int:
    """Measure, write ``results/split_fidelity.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        figures, table = measure()
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    write_result("split_fidelity", figures, seed=SEED, extra={"cosine, relative error": table})
    return 0 if all(figure.holds for figure in figures) else 1


def measure() -> tuple[list[Figure], dict[str, list[float]]]:
    """Return the figures, and every wire's cosine and relative error."""
    exact = gradients(Moving, 2, Fitted, {})
    drawn = gradients(Standing, 1, TextClassification, {})[0]
    table: dict[str, list[float]] = {}

    def figure(name: str, found: Gradient, wanted: Gradient = exact[0], bound: str = "") -> Figure:
        norm = float(np.linalg.norm(wanted))
        cosine = float(found @ wanted) / (float(np.linalg.norm(found)) * norm)
        table[name] = [cosine, float(np.linalg.norm(found - wanted)) / norm]
        print(f"{name}: cosine {cosine:.6f}, relative error {table[name][1]:.2g}", flush=True)
        return Figure("split", f"{name}, cosine", cosine, "", bound)

    def first(wire: Wire, task: type[TextClassification] = Fitted) -> Gradient:
        found: Gradient = gradients(Standing, 1, task, wire)[0]
        return found

    int8: Wire = dict.fromkeys(WIRES, "int8")
    int4: Wire = {"jacobian": "int4"}
    nearest: Wire = {"stochastic": False}
    at_random = gradients(Standing, DRAWS, Fitted, int4)
    figures = [
        figure("all links int8", first(int8), bound=">= 0.999"),
        figure("all links int8, to nearest", first({**int8, **nearest}), bound=">= 0.999"),
        figure("int4 Jacobian, to nearest", first({**int4, **nearest}), bound=">= 0.995"),
        figure(f"int4 Jacobian, mean of {DRAWS} steps", at_random.mean(0), bound=">= 0.995"),
        figure("int4 Jacobian", at_random[0], bound=">= 0.995"),
    ]
    for name, wire in (("int4 Jacobian, to nearest", {**int4, **nearest}), ("int4 Jacobian", int4)):
        found = first(wire, TextClassification)
        figures.append(figure(f"{name}, head as the seed draws it", found, drawn))
    for link in WIRES:
        for form in FORMATS:
            name = f"{form} {'Jacobian' if link == 'jacobian' else link}"
            if name not in table:
                figures.append(figure(name, first({link: form})))
    for share in (0.1, 0.25):
        found = first({"jacobian": "top-k", "top-k": share})
        figures.append(figure(f"top-{share:.0%} Jacobian, first visit", found))
    for form in ("int8", "int4"):
        for delta in (False, True):
            name = f"{form} representation, second visit{', as a change' if delta else ''}"
            found = gradients(Moving, 2, Fitted, {"representation": form, "delta": delta})[1]
            figures.append(figure(name, found, exact[1]))
    return figures, table


if __name__ == "__main__":
    sys.exit(main())
