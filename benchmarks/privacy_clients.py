"""DP-SGD on the devices: is each sample's gradient its own, and what does a private step cost.

Correctness on the real backbones: every per-sample LoRA gradient against a loop over the samples, one by one,
and what a sample's clipped gradient owes to the others in its batch. B is drawn, since at B = 0 the gradient
of A is zero. SmolLM2 is held to its bound in double precision: in float32 a matrix product of more rows is
another kernel with another rounding, which 30 blocks make 1e-4 of, hooks or no hooks (a text five times in a
batch differs from that text alone); that figure stands beside it. Cost: a device's local steps as the worker
does them, with DP-SGD and without, on the same 16 texts of 64 tokens (q = 1: the Poisson batch is all of the
shard); memory is what steps add to the loaded model, each kind in a process of its own, with all libraries
imported before on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import Figure, write_result
from benchmarks.timing import cpu_s
from clients.adapter import Worker
from clients.per_sample import Gradients, per_sample
from fedlam_app.base.keys import rng
from fedlam_app.config import Scalar, parse
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.text import TextTask

SEED = 11
CLIP = 0.1  # below every norm here: all samples are clipped
SAMPLES = 5
STEPS, REPEATS = 3, 7
MINILM: dict[str, Scalar] = {"task": "text-classification", "model.backbone": "minilm"}
SMOLLM2: dict[str, Scalar] = {"task": "language-modelling", "model.backbone": "smollm2", "model.blocks": 30}
GPT2: dict[str, Scalar] = {"task": "language-modelling", "model.backbone": "random-gpt2", "model.blocks": 4}
CASES: dict[str, tuple[dict[str, Scalar], bool, torch.dtype, str]] = {
    "MiniLM, 6 blocks, LoRA": (MINILM, False, torch.float32, "<= 1e-4"),
    "MiniLM, 6 blocks, FFA-LoRA": (MINILM, True, torch.float32, "<= 1e-4"),
    "SmolLM2, 30 blocks, LoRA, float64": (SMOLLM2, False, torch.float64, "<= 1e-4"),
    "SmolLM2, 30 blocks, FFA-LoRA, float64": (SMOLLM2, True, torch.float64, "<= 1e-4"),
    "SmolLM2, 30 blocks, LoRA, float32": (SMOLLM2, False, torch.float32, ""),
    "GPT-2's shape, 4 blocks, LoRA": (GPT2, False, torch.float32, "<= 1e-4"),
    "GPT-2's shape, 4 blocks, FFA-LoRA": (GPT2, True, torch.float32, "<= 1e-4"),
}
BASE: dict[str, Scalar] = {
    "job": "train", "strategy": "fedit", "seed": SEED, "model.lora-on": "attention", "model.rank": 8,
    "text.train": 64, "text.test": 16, "text.max-tokens": 64, "train.devices": 2,
}  # fmt: skip
COST: dict[str, Scalar] = {
    **BASE, **MINILM, "text.train": 32, "train.batch-rows": 16, "train.local-steps": STEPS,
    "train.optimiser": "sgd", "privacy.target-epsilon": float("inf"), "privacy.noise-multiplier": 1.0,
}  # fmt: skip


def started(keys: Mapping[str, Scalar], ffa: bool) -> tuple[TextTask, Worker]:
    """Return a task and a worker whose LoRA has a drawn B, and a frozen A with FFA-LoRA."""
    config = parse({**BASE, **keys})
    task = TASKS[config.task](config)
    assert isinstance(task, TextTask)
    worker = Worker(config, task)
    worker.model.train()
    draw = rng(SEED, "drawn B")
    with torch.no_grad():
        for name, p in worker.named.items():
            if ".lora_B." in name:
                p.copy_(torch.from_numpy(draw.normal(0.0, 0.02, tuple(p.shape))))
            p.requires_grad_(not (ffa and ".lora_A." in name))
    return task, worker


def of(task: TextTask, worker: Worker, ids: list[int]) -> Gradients:
    """Return the per-sample gradients of some of the first device's texts."""
    with per_sample(worker.model, worker.model.trainable()) as gradients:
        return gradients(task.losses(worker.model, task.of(0, np.array(ids))))


def against_loop(task: TextTask, worker: Worker) -> float:
    """Return the largest relative difference, in norm, of a sample's gradient of a tensor from the loop's."""
    trained, worst = list(worker.model.trainable().values()), 0.0
    found = of(task, worker, list(range(SAMPLES)))
    for place in range(SAMPLES):
        alone = torch.autograd.grad(task.loss(worker.model, task.of(0, np.array([place]))), trained)
        for own, all_of_them in zip(alone, found, strict=True):
            worst = max(worst, float((all_of_them[place] - own).norm() / own.norm()))
    return worst


def clipped(gradients: Gradients) -> Tensor:
    """Return what each sample adds to the sum (B, p)."""
    rows = torch.cat([g.flatten(1) for g in gradients], 1).double()
    return rows * (CLIP / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)


def dependence(task: TextTask, worker: Worker) -> float:
    """Replace each sample by another; return the largest relative change in what one of the rest adds."""
    before, worst = clipped(of(task, worker, list(range(SAMPLES)))), 0.0
    for edited in range(SAMPLES):
        ids = [SAMPLES + 1 + edited if i == edited else i for i in range(SAMPLES)]
        change = (clipped(of(task, worker, ids)) - before).norm(dim=1) / before.norm(dim=1)
        worst = max(worst, float(change[np.arange(SAMPLES) != edited].max()))
    return worst


def trainer(mechanism: str, texts: Path) -> Worker:
    """Return the worker of the cost measurements."""
    config = parse({**COST, "privacy.mechanism": mechanism, "text.source": str(texts)})
    return Worker(config, TASKS[config.task](config))


def write_long_texts(path: Path) -> Path:
    """Write texts of at least 64 tokens, made of sentences of the benchmark's usual texts."""
    task = TASKS["text-classification"](parse({**BASE, **MINILM, "text.train": 1600}))
    assert isinstance(task, TextTask)
    train = task.texts[0]
    lines = [
        json.dumps({"text": " ".join(train.texts[8 * i : 8 * i + 8]), "label": ("bad", "good")[i % 2]})
        for i in range(160)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def peak_growth(mechanism: str, texts: Path) -> int:
    """Return the bytes that this process grows by, at most, while a loaded worker trains (Linux)."""
    import cryptography.hazmat.primitives.ciphers  # noqa: F401
    import opacus  # noqa: F401

    worker = trainer(mechanism, texts)
    worker.task.examples(0)
    worker.task.of(0, np.arange(1))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    for round in (1, 2):
        worker.train(worker.initial, 0, round)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _apart(mechanism: str, texts: Path) -> int:
    """Return :func:`peak_growth` of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.privacy_clients", mechanism, str(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def cost(folder: Path) -> tuple[list[Figure], dict[str, object]]:
    """Measure CPU time and memory of private steps over those of plain ones."""
    texts = write_long_texts(folder / "long.jsonl")
    workers = {mechanism: trainer(mechanism, texts) for mechanism in ("none", "dp-sgd")}
    times: dict[str, list[float]] = {mechanism: [] for mechanism in workers}
    tokens = float(workers["none"].task.of(0, np.arange(16)).texts.lengths.double().mean())
    for round in range(REPEATS + 1):  # in turns, so that a busy machine is busy for both; the first warms up
        for mechanism, worker in workers.items():
            taken = cpu_s(lambda own=worker, at=round: own.train(own.initial, 0, at + 1))  # type: ignore[misc]
            times[mechanism] += [taken / STEPS] if round else []
    plain, private = (float(np.median(times[mechanism])) for mechanism in ("none", "dp-sgd"))
    grown = {mechanism: [_apart(mechanism, texts) for _ in range(3)] for mechanism in workers}
    least, most = (float(np.median(grown[mechanism])) for mechanism in ("none", "dp-sgd"))
    figures = [
        Figure("privacy", "CPU of a DP-LoRA step over a plain one (MiniLM)", private / plain, "x", "<= 1.5"),
        Figure("privacy", "CPU of a plain LoRA step (MiniLM, 16 texts)", plain, "s"),
        Figure("privacy", "memory of DP-LoRA steps over plain ones (MiniLM)", most / least, "x", "<= 1.1"),
        Figure("privacy", "memory that plain LoRA steps add to the model", least / 2**20, "MiB"),
    ]
    return figures, {"cpu_s": times, "bytes": grown, "tokens a text": tokens}


def main() -> int:
    """Measure, write ``results/privacy_clients.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    if len(sys.argv) == 3:  # a process of its own, for its memory
        print(peak_growth(sys.argv[1], Path(sys.argv[2])))
        return 0
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        for name, (keys, ffa, precision, limit) in CASES.items():
            task, worker = started(keys, ffa)
            worker.model.to(precision)
            for what, value, bound in (
                ("worst per-sample gradient against a loop", against_loop(task, worker), limit),
                ("what one sample changes in another's share", dependence(task, worker), "<= 1e-5"),
            ):
                figures.append(Figure("privacy", f"{name}: {what}", value, "relative", bound))
                print(f"{figures[-1].name}: {value:.2e} {bound}", flush=True)
        costs, extra = cost(Path(folder))
    for figure in costs:
        print(f"{figure.name}: {figure.value:.3f} {figure.unit} {figure.bound}")
    figures += costs
    write_result("privacy_clients", figures, seed=SEED, extra=extra)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
