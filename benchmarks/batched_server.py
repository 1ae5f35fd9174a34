"""The edge server's batched pass against SplitLoRA's loop over devices: CPU time, memory, equality.

MiniLM (6 blocks, LoRA r = 8 on all linear layers), sentences of 32 tokens, K devices with B sentences each,
one torch thread. Both sides compute every device's LoRA gradient from the same tokens and Jacobians.

* SplitLoRA's loop (arXiv:2407.00952): device after device, plain peft; forward, backward with dL/dE (its
  client trains, so the gradient of the activations goes down) and a step of AdamW for each device.
* the bare loop: the same without step and dL/dE.
* the batched pass: every device the same adapter (synchronous), or each its own (asynchronous).

Sides take turns, so that a drifting machine slows all; a figure is the ratio of the medians. The growth of
memory is that of the peak resident set during a pass, a device more, in a fresh process for each size: beyond
the tokens whose graphs are kept, below them, and where the caller works devices off in groups of eight.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.base.vectors import pack
from fedlam_app.models import low_rank
from fedlam_app.models.backbones import Backbone, load
from fedlam_app.models.batched import BatchedBackbone
from fedlam_app.models.lora import tune
from fedlam_app.models.split import Tokens

SEED, REPEATS, TOKENS = 2025, 15, 32
SIZES = {(8, 4): 1.35, (16, 2): 1.7}  # (K, B): the speed asked for
POOLS = {"first": "first token", "mean": "mean"}  # what of each sample the head reads
GROUP = 8  # devices of one group, where the caller works them off in groups
RATIOS = (  # what, the loop's side, the batched side, whether the bound is for it
    ("SplitLoRA's loop / batched", "splitlora", "batched", True),
    ("bare loop / batched", "bare", "batched", False),
    ("SplitLoRA's loop / batched with dL/dE", "splitlora", "batched, dL/dE", False),
    ("SplitLoRA's loop / batched, own adapters", "splitlora", "batched, own", False),
)
WITHOUT = (  # where the batched pass takes oneDNN: how much of its speed is the library's
    ("SplitLoRA's loop / batched without oneDNN", "splitlora", "batched, no oneDNN", False),
    ("bare loop / batched without oneDNN", "bare", "batched, no oneDNN", False),
)


def main() -> int:
    """Measure, write ``results/batched_server.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    backbone = build()
    figures: list[Figure] = []
    seconds = {}
    for (devices, samples), asked in SIZES.items():
        for pool, words in POOLS.items():
            case, name = Case(backbone, devices, samples, pool), f"K={devices}, B={samples}, {words}"
            seconds[name] = times = measure(case)
            middle = {side: statistics.median(values) for side, values in times.items()}
            for what, loop, side, bounded in RATIOS + (WITHOUT if low_rank._ONEDNN else ()):
                bound = f">= {asked}" if bounded else ""
                figures.append(Figure("split", f"{name}: {what}", middle[loop] / middle[side], "x", bound))
            figures.append(Figure("split", f"{name}: batched pass", 1e3 * middle["batched"], "ms CPU"))
            figures.append(
                Figure("split", f"{name}: gradients, largest error", difference(case), "relative", "<= 1e-6")
            )
    peaks = {f"{how}, K={devices}": peak_mb(devices, how) for how, devices in MEMORY}
    for what, how, few, many in (
        ("one pass, beyond the kept tokens", "whole", 8, 32),
        ("in groups of 8 devices", "groups", 8, 32),
    ):
        growth = (peaks[f"{how}, K={many}"] - peaks[f"{how}, K={few}"]) / (many - few)
        figures.append(Figure("split", f"memory a device more, {what}", growth, "MB", "<= 5"))
    kept = (peaks["whole, K=8"] - peaks["whole, K=4"]) / 4
    figures.append(Figure("split", "memory a device more, one pass, graphs kept", kept, "MB"))
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3g} {figure.unit} {figure.bound}", flush=True)
    write_result("batched_server", figures, seed=SEED, extra={"cpu_s": seconds, "peak_mb": peaks})
    return 0 if all(figure.holds for figure in figures) else 1


def build() -> Backbone:
    """MiniLM with LoRA whose B is not zero: at zero, the gradient of A would be zero too."""
    backbone = tune(load("minilm", blocks=6), "lora")
    assert isinstance(backbone, Backbone)
    draw = rng(SEED, "adapter")
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.from_numpy(0.02 * draw.standard_normal(tuple(p.shape))))
    return backbone


class Case:
    """One size: the tokens and Jacobians of all devices, and each side's step on them."""

    def __init__(self, backbone: Backbone, devices: int, samples: int, pool: str) -> None:
        draw = rng(SEED, "case", devices, samples)
        self.backbone, self.devices, self.samples, self.pool = backbone, devices, samples, pool
        count = devices * samples
        values = 0.05 * draw.standard_normal((count * TOKENS, backbone.width), np.float32)
        lengths = torch.full((count,), TOKENS)
        rows = torch.arange(count) * TOKENS if pool == "first" else None
        self.tokens = Tokens(torch.from_numpy(values), lengths, rows)
        self.slots = np.repeat(np.arange(devices), samples)
        self.jacobians = torch.from_numpy(draw.standard_normal((count, backbone.width), np.float32))
        self.parameters = [p for p in backbone.parameters() if p.requires_grad]
        self.vector = pack(self.parameters)
        self.batched = BatchedBackbone(backbone)

    def loop(self, step: bool) -> list[Tensor]:
        """Device after device with plain peft; ``step``: with dL/dE and AdamW, as SplitLoRA does.

        Returns every device's gradient, as references: nothing is copied on the loop's account.
        """
        gradients: list[Tensor] = []
        embeddings = self.tokens.values.view(self.devices, self.samples, TOKENS, -1)
        for device, jacobian in enumerate(self.jacobians.view(self.devices, self.samples, -1)):
            inputs = embeddings[device].detach().requires_grad_(step)
            states = self.backbone(inputs)  # (B, S, D)
            chosen = states[:, 0] if self.pool == "first" else states.mean(1)
            chosen.backward(jacobian)
            if step:
                self.optimiser.step()
            gradients += [p.grad for p in self.parameters if p.grad is not None]
            for p in self.parameters:
                p.grad = None
        return gradients

    def reset(self) -> None:
        """A fresh optimiser with rate 0: the work of a step, and the same adapter after it."""
        self.optimiser = torch.optim.AdamW(self.parameters, lr=0.0)

    def batch(self, own: bool = False, want_tokens: bool = False) -> NDArray[np.float32]:
        """All devices at once; ``own``: each device its own copy of the adapter."""
        vectors = np.repeat(self.vector[None], self.devices if own else 1, axis=0)
        rows = np.arange(self.devices) if own else np.zeros(self.devices, int)
        self.batched.forward(vectors, rows, self.tokens, self.slots)
        return self.batched.backward(self.jacobians, want_tokens)[0]

    def grouped(self) -> NDArray[np.float32]:
        """The same by a caller that goes forward and backward with eight devices at a time."""
        gradients = np.empty((self.devices, len(self.vector)), np.float32)
        size = GROUP * self.samples
        for group, start in enumerate(range(0, len(self.jacobians), size)):
            lengths = self.tokens.lengths[start : start + size]
            values = self.tokens.values[start * TOKENS : (start + size) * TOKENS]
            slots = self.slots[start : start + size] - group * GROUP
            self.batched.forward(self.vector[None], [0] * GROUP, Tokens(values, lengths), slots)
            part, _ = self.batched.backward(self.jacobians[start : start + size])
            gradients[group * GROUP : (group + 1) * GROUP] = part
        return gradients


def measure(case: Case, repeats: int = REPEATS) -> dict[str, list[float]]:
    """CPU seconds of every side, in turns; the first turn is a warm-up."""
    case.reset()

    def without_onednn() -> None:
        low_rank._ONEDNN = False
        try:
            case.batch()
        finally:
            low_rank._ONEDNN = True

    sides: dict[str, Callable[[], object]] = {
        "splitlora": lambda: case.loop(step=True),
        "bare": lambda: case.loop(step=False),
        "batched": case.batch,
        "batched, dL/dE": lambda: case.batch(want_tokens=True),
        "batched, own": lambda: case.batch(own=True),
    }
    if low_rank._ONEDNN:
        sides["batched, no oneDNN"] = without_onednn
    times: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, work in sides.items():
            start = time.process_time()
            work()
            if repeat:
                times[side].append(time.process_time() - start)
    return times


def difference(case: Case) -> float:
    """Largest relative difference of a device's gradient from plain peft's, one device after the other."""
    loop = torch.cat([g.ravel() for g in case.loop(step=False)]).view(case.devices, -1)
    batched = torch.from_numpy(case.batch())
    return float(((batched - loop).norm(dim=1) / loop.norm(dim=1)).max())


def peak_mb(devices: int, how: str) -> float:
    """Peak resident set of a pass over ``devices`` with four sentences each, measured in its own process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_mb, (devices, how))


def _peak_mb(devices: int, how: str) -> float:
    torch.set_num_threads(1)
    backbone = build()
    Case(backbone, 1, 4, "mean").batch()  # what the first pass loads is not the devices'
    case = Case(backbone, devices, 4, "mean")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    if how == "whole":
        case.batch()
    else:
        case.grouped()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


MEMORY = (("whole", 4), ("whole", 8), ("whole", 32), ("groups", 8), ("groups", 32))


if __name__ == "__main__":
    sys.exit(main())
