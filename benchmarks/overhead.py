"""What federation costs: the default run's rounds through Flower and Ray against a plain PyTorch loop.

Both do the same gradients, on the same batches, and the same evaluations; the results must be equal bit
for bit. Start-up (Ray, imports, the first evaluation) is left out on both sides.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Figure, write_result
from clients.adapter import Worker
from fedlam_app.base.vectors import Vector, WeightedMean, pack
from fedlam_app.config import RunConfig, parse
from fedlam_app.experiments.run import ALL_ANTENNAS
from fedlam_app.experiments.track import read_metrics
from fedlam_app.tasks.channel_prediction import ChannelPrediction

SEED = 2025
CORES = os.cpu_count() or 1


def federated(folder: Path) -> tuple[float, Vector]:
    """Run through Flower and Ray: wall seconds of rounds and evaluations, and the final vector."""
    from safetensors.numpy import load_file

    command = [str(Path(sys.executable).with_name("fedlam")), "run", "--results", str(folder)]
    subprocess.run([*command, "--run-config", f"job=train seed={SEED}"], check=True)
    records = read_metrics(folder)
    wall_s = float(str(records[-1]["wall_s"])) - float(str(records[0]["wall_s"]))
    (state,) = (folder / "state").glob("*.safetensors")
    return wall_s, load_file(state)["models"][0]


def plain(config: RunConfig, threads: int) -> tuple[float, Vector]:
    """Do the same work in one process without messages; returns its wall seconds and the final vector."""
    task = ChannelPrediction(config)
    worker = Worker(config, task)
    torch.set_num_threads(threads)
    vector = pack(worker.parameters)
    evaluate(worker, task, vector, ALL_ANTENNAS)  # fills the caches, as the first evaluation does
    started = time.monotonic()
    for round in range(1, config.train.rounds + 1):
        mean = WeightedMean()
        for device in range(config.train.devices):
            mean.add(worker.train(vector, device, round)[0], float(task.examples(device)))
        vector = mean.value()
        last = round == config.train.rounds
        if last or round % config.train.evaluate_every == 0:
            evaluate(worker, task, vector, ALL_ANTENNAS if last else config.train.evaluate_antennas)
    return time.monotonic() - started, vector


def evaluate(worker: Worker, task: ChannelPrediction, vector: Vector, antennas: int) -> None:
    """Score the union of the shards and the held-out users, as a round's evaluation does."""
    for split, count in (("train", worker.config.train.evaluate_antennas), ("test", antennas)):
        for chunk in task.chunks(split):
            worker.evaluate(vector, chunk, count)


def main() -> int:
    """Measure, write ``results/overhead.json``; 0 where every bound holds."""
    config = parse({"job": "train", "seed": SEED})
    with tempfile.TemporaryDirectory() as folder:
        fed_s, fed = federated(Path(folder) / "run")
    one_s, one = plain(config, 1)
    all_s, _ = plain(config, CORES)
    figures = [
        Figure(
            "foundation",
            f"federated / plain loop with {CORES} torch threads, wall",
            fed_s / all_s,
            "x",
            "<= 1.3",
        ),
        Figure(
            "foundation",
            f"federated / plain one-thread loop on {CORES} ideal cores, wall",
            fed_s / (one_s / CORES),
            "x",
            "<= 1.3",
        ),
        Figure("foundation", "federated run without start-up, wall", fed_s, "s"),
        Figure("foundation", "plain loop, one thread, wall", one_s, "s"),
        Figure("foundation", f"plain loop, {CORES} threads, wall", all_s, "s"),
        Figure(
            "foundation",
            "Ray run equals the plain loop bit for bit",
            np.array_equal(fed, one),
            "yes = 1",
            "== 1",
        ),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    write_result("overhead", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
