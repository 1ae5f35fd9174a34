"""The strongest pooled training at the federation's sample budget: what federation could cost at most.

The case study's 'central' keeps the federation's habits (AdamW fresh every round, its learning rate). Here
pooled training gets every advantage: one optimiser that lives through the run, large or small batches, two
learning rates, and the best of them chosen on the held-out users. The same seeds, data and noise.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from benchmarks.case_study import SEEDS
from benchmarks.record import RESULTS, Figure, write_result
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.tasks.channel_prediction import ChannelPrediction

# Rows a device adds to a pooled batch of ten, and steps: both spend the same rows as ten servers do.
BATCHES = {"joint batches": (32, 100), "small batches": (3, 1067)}
RATES = (3e-3, 1e-3)


def main() -> int:
    """Train every variant on every seed, write ``results/pooled.json``; 0 where every bound holds."""
    jobs = [(seed, batch, lr) for batch in BATCHES for lr in RATES for seed in SEEDS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        errors = dict(zip(jobs, pool.map(train, jobs), strict=True))
    means = {
        (batch, lr): statistics.mean(errors[seed, batch, lr] for seed in SEEDS)
        for batch in BATCHES
        for lr in RATES
    }
    study = json.loads((RESULTS / "case_study.json").read_text(encoding="utf-8"))
    federated = next(f["value"] for f in study["figures"] if f["name"] == "clean NMSE of fed-10")
    best = min(means.values())
    joint = min(value for (batch, _), value in means.items() if batch == "joint batches")
    figures = [
        Figure(
            "foundation", "federated (10) minus best pooled, equal steps", federated - joint, "dB", "<= 0.5"
        ),
        Figure(
            "foundation", "federated (10) minus best pooled, any batch size", federated - best, "dB", "<= 0.5"
        ),
        *(
            Figure("foundation", f"pooled, {batch}, lr {lr:g}: clean NMSE", value, "dB")
            for (batch, lr), value in means.items()
        ),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.2f} {figure.unit} {figure.bound}")
    write_result("pooled", figures, seed=SEEDS[0], extra={"seeds": SEEDS})
    return 0 if all(figure.holds for figure in figures) else 1


def train(job: tuple[int, str, float]) -> float:
    """Train one variant without interruption and return its held-out clean NMSE [dB] on all antennas."""
    seed, batch, lr = job
    rows, steps = BATCHES[batch]
    torch.set_num_threads(1)
    flat: dict[str, Scalar] = {"job": "train", "seed": seed, "strategy": "central", "train.batch-rows": rows}
    config: RunConfig = parse(flat)
    task = ChannelPrediction(config)
    model = task.build_model().train()
    parameters = list(model.trainable().values())
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    for step in range(steps):
        optimiser.zero_grad()
        task.loss(model, task.batch(0, 1, step)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
        optimiser.step()
        schedule.step()
    model.eval()
    table = np.concatenate([task.evaluate(model, chunk, 0) for chunk in task.chunks("test")])
    return float(task.metrics("test", table)["nmse_clean_db"])


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a tenth of warm-up, then a cosine to 5 %."""
    return min(1.0, 10 * (step + 1) / steps) * (0.05 + 0.475 * (1.0 + math.cos(math.pi * step / steps)))


if __name__ == "__main__":
    sys.exit(main())
