"""Clean against faithful LLM4CP: time a row, and error after the same number of updates.

Same backbone (GPT-2's shape: width 768, 6 blocks, random and frozen, LoRA r = 8), one thread, CPU time,
measured in turns so that a drifting machine slows both.
"""

from __future__ import annotations

import statistics
import sys

import torch

from benchmarks.record import Figure, write_result
from benchmarks.timing import cpu_s
from clients.loop import local_steps
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks.channel_prediction import ChannelPrediction

SEED, REPEATS, UPDATES = 2025, 7, 60
BASE: dict[str, Scalar] = {
    "job": "train",
    "seed": SEED,
    "model.backbone": "random-gpt2",
    "strategy": "central",
    "train.batch-rows": 4,  # times ten servers: 40 rows
    "train.local-steps": UPDATES,
    "train.rounds": 1,
    "train.evaluate-antennas": 4,
}


def main() -> int:
    """Measure both, write ``results/model_speed.json``; 0 where every bound holds."""
    torch.set_num_threads(1)
    configs = {name: parse({**BASE, "model.name": name}) for name in ("llm4cp-clean", "llm4cp")}
    tasks = {name: ChannelPrediction(config) for name, config in configs.items()}
    models = {name: task.build_model() for name, task in tasks.items()}
    training: dict[str, list[float]] = {name: [] for name in models}
    inference: dict[str, list[float]] = {name: [] for name in models}
    rows, label = tasks["llm4cp"].batch(0, 1, 0)
    for repeat in range(REPEATS + 1):  # the first is a warm-up
        for name in models:
            step_s = cpu_s(lambda: tasks[name].loss(models[name], (rows, label)).backward())  # noqa: B023
            with torch.no_grad():
                forward_s = cpu_s(lambda: models[name](rows))  # noqa: B023
            if repeat:
                training[name].append(1e3 * step_s / len(label))
                inference[name].append(1e3 * forward_s / len(label))
    errors = {name: error_after_updates(tasks[name], configs[name]) for name in models}
    train, infer = (
        {name: statistics.median(values) for name, values in table.items()} for table in (training, inference)
    )
    clean, faithful = "llm4cp-clean", "llm4cp"
    upload = 4e-6 * sum(p.numel() for p in models[clean].trainable().values())
    figures = [
        Figure("foundation", "train step, faithful / clean", train[faithful] / train[clean], "x", ">= 3"),
        Figure("foundation", "inference, faithful / clean", infer[faithful] / infer[clean], "x", ">= 2.5"),
        Figure(
            "foundation",
            f"clean minus faithful NMSE after {UPDATES} updates of 40 rows",
            errors[clean] - errors[faithful],
            "dB",
            "<= 0",
        ),
        *(
            Figure("foundation", f"{name}: {what}", table[name], unit)
            for name in (clean, faithful)
            for what, table, unit in (
                ("train step a row", train, "ms CPU"),
                ("inference a row", infer, "ms CPU"),
                (f"clean NMSE after {UPDATES} updates", errors, "dB"),
            )
        ),
        Figure("foundation", "upload a round at the reference's width", upload, "MB", "<= 6.5"),
        Figure(
            "foundation",
            "parameters that travel at the reference's width",
            100 * models[clean].trainable_share(),
            "%",
            "<= 5",
        ),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3g} {figure.unit} {figure.bound}")
    write_result("model_speed", figures, seed=SEED, extra={"train_ms": training, "inference_ms": inference})
    return 0 if all(figure.holds for figure in figures) else 1


def error_after_updates(task: ChannelPrediction, config: RunConfig) -> float:
    """Train a fresh model and return its held-out clean NMSE [dB]; the best of three learning rates.

    The rates are the default and the reference's own, and one between: neither model is held to the
    other's. Both are favoured alike by choosing on the held-out users.
    """
    return min(_error(task, config, lr) for lr in (3e-3, 1e-3, 1e-4))


def _error(task: ChannelPrediction, config: RunConfig, lr: float) -> float:
    import numpy as np

    model: SplitModel = task.build_model().train()
    # Round 3 of many: past the warm-up, at the full rate.
    train = config.train.model_copy(update={"lr": lr, "rounds": 1000})
    torch.manual_seed(SEED)
    parameters = list(model.trainable().values())
    local_steps(
        lambda step: task.loss(model, task.batch(0, 1, step)), parameters, train, 3, train.local_steps
    )
    model.eval()
    antennas = config.train.evaluate_antennas
    table = np.concatenate([task.evaluate(model, chunk, antennas) for chunk in task.chunks("test")])
    return float(task.metrics("test", table)["nmse_clean_db"])


if __name__ == "__main__":
    sys.exit(main())
