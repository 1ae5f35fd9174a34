"""What the split's accuracy benchmarks share: Rotten Tomatoes with MiniLM, in process, and a plain loop.

The gaps between two ways of training are small, so they are measured on many unseen texts: a part of the
6,920 training sentences trains, and the rest is held out (of 4,872 the standard error is 0.6 points, less for
a difference). The test split of 805 is kept for the full-data figure.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedlam_app.base.store import cache_root, write_json
from fedlam_app.config import Scalar

Flat = Mapping[str, Scalar]
Key = tuple[str, str]
Run = Callable[[], dict[str, Any]]

TRAIN = 2048
BASE: dict[str, Scalar] = {
    "job": "train",
    "task": "text-classification",
    "strategy": "fedsgd-lora",
    "train.devices": 8,
    "train.batch-rows": 8,
    "train.local-steps": 1,
    "train.rounds": 96,  # three epochs of 2,048 texts
    "train.lr": 1e-3,
    "split.heads": "averaged",
    "split.kept-tokens": 4096,  # memory for time; the numbers are the same
    "federation.server-threads": 1,
    "federation.supernodes": 1,
}


def in_parallel(name: str, runs: Mapping[Key, Run], processes: int = 2) -> dict[Key, dict[str, Any]]:
    """Run each in a process of its own, two at a time; returns their results by key.

    Results are kept in the cache as they come, so that a benchmark that was stopped goes on; :func:`done`
    forgets them.
    """
    folder = _kept(name)
    results = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        files = {key: folder / f"{' '.join(key)}.json" for key in runs}
        waiting = {key: pool.submit(run) for key, run in runs.items() if not files[key].is_file()}
        for future in as_completed(waiting.values()):
            key = next(k for k, other in waiting.items() if other is future)
            write_json(files[key], future.result())
        for key, file in files.items():
            results[key] = json.loads(file.read_text(encoding="utf-8"))
    return results


def done(name: str) -> None:
    """Forget what :func:`in_parallel` kept: the benchmark's result is written."""
    shutil.rmtree(_kept(name), ignore_errors=True)


def _kept(name: str) -> Path:
    return cache_root() / "benchmarks" / name


def federated(overrides: Flat) -> dict[str, Any]:
    """Train one federation in process; returns accuracy, loss, bytes, CPU seconds and failures."""
    import torch

    from fedlam_app.client_app import app
    from fedlam_app.config import parse
    from fedlam_app.experiments.federate import federate
    from fedlam_app.grid import InProcessGrid
    from fedlam_app.tasks import TASKS

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        flat = {**BASE, **overrides}
        config = parse(flat)
        task = TASKS[config.task](config)
        federation = federate(config, "{}", task, task.build_model())
        grid = InProcessGrid(app, config.federation.supernodes, flat)
        up = down = failures = 0
        server_cpu_s, began = 0.0, time.process_time()
        for number in range(1, config.train.rounds + 1):
            cost = federation.train_round(grid, number)
            up, down = up + cost.bytes_up, down + cost.bytes_down
            failures, server_cpu_s = failures + len(cost.failures), server_cpu_s + cost.server_cpu_s
            if number % 16 == 0:
                print(
                    f"{_name(overrides)}: {number} of {config.train.rounds}, {federation.loss:.3f}",
                    flush=True,
                )
        tables = federation.evaluate(grid, task.chunks("test"), 0)
        scores = [task.metrics("test", table) for table in tables]
        accuracy = sum(score["accuracy"] for score in scores) / len(scores)
        loss = sum(score["loss"] for score in scores) / len(scores)
        print(f"{_name(overrides)}: accuracy {accuracy:.4f}", flush=True)
        return {
            "accuracy": accuracy,
            "loss": loss,
            "bytes_up": up,
            "bytes_down": down,
            "failures": failures,
            "cpu_s": time.process_time() - began,
            "server_cpu_s": server_cpu_s,
        }


def central(overrides: Flat) -> dict[str, Any]:
    """Train the unsplit model in a plain loop on the federation's batches, pooled: no messages, no rule."""
    import numpy as np
    import torch

    from fedlam_app.base.schedule import learning_rate
    from fedlam_app.config import parse
    from fedlam_app.tasks.text_classification import TextClassification

    torch.set_num_threads(1)
    config = parse({**BASE, **overrides, "strategy": "central"})
    task = TextClassification(config)
    model = task.build_model().train()
    lora, head = list(model.server_side().values()), list(model.device_side().values())
    optimiser = torch.optim.AdamW(lora, betas=(0.9, 0.999), weight_decay=0.0)
    for number in range(1, config.train.rounds + 1):
        for p in model.parameters():
            p.grad = None
        owners = range(config.train.devices)
        chosen = [i for k in owners for i in task.shards[k][task.ids(k, number, 0)]]
        samples = sorted((task.encoded["train"][i] for i in chosen), key=lambda sample: len(sample[0]))
        for part in range(0, len(samples), 16):  # texts of like lengths together: less padding
            piece = task.collate(samples[part : part + 16])
            (task.loss(model, piece) * len(piece.targets) / len(samples)).backward()
        torch.nn.utils.clip_grad_norm_(lora, config.train.clip_norm)
        optimiser.param_groups[0]["lr"] = learning_rate(config.train.lr, config.train.rounds, number)
        optimiser.step()
        rate = learning_rate(config.split.head_lr, config.train.rounds, number)
        with torch.no_grad():
            for p in head:
                assert p.grad is not None
                p.sub_(p.grad, alpha=rate)
    model.eval()
    table = np.concatenate([task.evaluate(model, chunk, 0) for chunk in task.chunks("test")])
    scores = task.metrics("test", table)
    print(f"central {_name(overrides)}: accuracy {scores['accuracy']:.4f}", flush=True)
    return scores


def many_unseen(folder: Path, texts: int = TRAIN) -> dict[str, Scalar]:
    """Write ``texts`` sentences to train on and the rest into ``folder``; return the keys that read them."""
    from fedlam_app.base.keys import rng
    from fedlam_app.config import parse
    from fedlam_app.data.text import load_texts

    train, _ = load_texts(parse({}).text, 0)
    order = rng("benchmark", "split", "unseen").permutation(len(train))
    for name, chosen in (("train", order[:texts]), ("test", order[texts:])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((train.texts[i], train.names[train.labels[i]]) for i in chosen)
    return {"text.source": str(folder)}


def call(run: Callable[[Flat], dict[str, Any]], overrides: Flat) -> Run:
    """Return ``run(overrides)`` as something that another process can do."""
    return partial(run, dict(overrides))


def _name(overrides: Flat) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items() if key != "text.source")
