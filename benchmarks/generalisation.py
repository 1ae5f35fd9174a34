"""Trained on UMa NLOS alone, tested on every scenario: an anchored federation against AR(10), zero-shot."""

from __future__ import annotations

import sys

import numpy as np
import torch

from benchmarks.record import Figure, write_result
from clients.adapter import Worker
from fedlam_app.base.vectors import WeightedMean, pack
from fedlam_app.config import SCENARIOS, Scalar, parse
from fedlam_app.tasks.channel_prediction import ChannelPrediction

SEED = 5
BASE: dict[str, Scalar] = {
    "job": "train",
    "seed": SEED,
    "model.anchor": "ar",
    "data.users": 500,
    "data.share": 0.06,
    "data.test-users": 60,
    "train.rounds": 12,
}


def main() -> int:
    """Train once, test everywhere, write ``results/generalisation.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    config = parse(BASE)
    worker = Worker(config, ChannelPrediction(config))
    vector = pack(worker.parameters)
    for round in range(1, config.train.rounds + 1):
        mean = WeightedMean()
        for device in range(config.train.devices):
            mean.add(worker.train(vector, device, round)[0], 1.0)
        vector = mean.value()
    figures = []
    for scenario in SCENARIOS:
        task = ChannelPrediction(parse({**BASE, "data.scenario": scenario}))
        worker.task = task
        table = np.concatenate([worker.evaluate(vector, chunk, 0) for chunk in task.chunks("test")])
        ours = float(task.metrics("test", table)["nmse_clean_db"])
        classical = {name: float(task.baseline(name)["nmse_clean_db"]) for name in ("ar", "wiener-ar")}
        figures += [
            Figure(
                "foundation", f"{scenario}: anchored minus AR(10)", ours - classical["ar"], "dB", "<= 0.05"
            ),
            Figure(
                "foundation", f"{scenario}: anchored minus Wiener + AR", ours - classical["wiener-ar"], "dB"
            ),
        ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.2f} {figure.unit} {figure.bound}")
    write_result("generalisation", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
