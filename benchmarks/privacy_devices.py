"""Whole devices protected: does the clip find its quantile, is the noise what is charged, what does it cost?

All of it through the real code (``strategies/device_dp.py``), with and without federated training around it:

    clip      60 steps of 100 lognormal norms with median 1, from C = 0.1 and 10: C over the true median
    noise     the deviation of what recipients see, over C; with the adaptive clip jointly with the bits'
    epsilon   100 of 1,000 devices a round, 100 rounds, z = 1, delta = 1e-5: cohorts seen, and drawn by coins
    utility   1,000 devices of the task ``mixture``, 100 a round by coins: accuracy with and without
"""

from __future__ import annotations

import math
import sys
from functools import partial

import numpy as np

from benchmarks.fleet_runs import run
from benchmarks.record import Figure, write_result
from benchmarks.split_runs import done, in_parallel
from fedlam_app.base.keys import rng
from fedlam_app.base.layout import Layout
from fedlam_app.config import Scalar, parse
from fedlam_app.privacy.accounting import Ledger, joint
from fedlam_app.privacy.adaptive_clip import bit_std
from strategies.device_dp import DeviceDp
from strategies.fedavg_lora import FedAvgLora
from strategies.participation import Turn

SEED, SEEDS = 41, (41, 42, 43)  # of which no choice was made
CLIP_STEPS, COHORT = 60, 100
UTILITY: dict[str, Scalar] = {
    "job": "train",
    "task": "mixture",
    "strategy": "fedavg-full",
    "train.devices": 1000,
    "train.cohort": COHORT,
    "train.rounds": 60,
    "train.local-steps": 8,
    "train.batch-rows": 16,
    "train.optimiser": "sgd",
    "train.lr": 0.1,
    "train.clip-norm": 0.0,
    "federation.supernodes": 1,
}
PRIVATE: dict[str, Scalar] = {
    "privacy.mechanism": "client",
    "privacy.cohort": "poisson",
    "privacy.quantile": 0.5,
}
RUNS: dict[str, dict[str, Scalar]] = {
    "without privacy": {},
    "clipped alone": {**PRIVATE, "privacy.target-epsilon": math.inf},
    "epsilon 8": {**PRIVATE, "privacy.target-epsilon": 8.0},
    "epsilon 2": {**PRIVATE, "privacy.target-epsilon": 2.0},
    "epsilon 8, clip fixed at 1": {**PRIVATE, "privacy.target-epsilon": 8.0, "privacy.quantile": 0.0},
}


def reception(size: int, **keys: Scalar) -> DeviceDp:
    """Return a reception around averaging, on a model of ``size`` zeros."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    flat: dict[str, Scalar] = {"task": "mixture", "strategy": "fedavg-lora", "privacy.mechanism": "client"}
    config = parse({"job": "train", "privacy.target-epsilon": 1e9, **flat, **named})
    algorithm = FedAvgLora(config)
    algorithm.init(np.zeros(size, np.float32), range(config.train.devices), Layout(size, ()))
    return DeviceDp(algorithm)


def step(dp: DeviceDp, updates: np.ndarray, number: int) -> np.ndarray:
    """Take a step of these updates (K, p); returns by how much the noised sum moved the model (p,)."""
    before, ids = dp.algorithm.models()[0].astype(np.float64), list(range(len(updates)))
    dp.begin(Turn(ids=ids, steps=[1] * len(ids), factors=[1.0] * len(ids)))
    for k in ids:
        dp.fold(k, before + updates[k], 1.0)
    dp.end(number)
    dp.algorithm.step()
    return (dp.algorithm.models()[0] - before) * dp.expected


def clips() -> list[Figure]:
    """Return how far C is from the median after 60 steps, at worst over seeds."""
    figures = []
    for start in (0.1, 10.0):
        for z in (0.0, 1.0):
            worst = 0.0
            for seed in SEEDS:
                budget = 1e9 if z else math.inf
                dp = reception(
                    4,
                    seed=seed,
                    train__devices=COHORT,
                    privacy__clip=start,
                    privacy__quantile=0.5,
                    privacy__noise_multiplier=z,
                    privacy__target_epsilon=budget,
                )
                draw = rng(seed, "norms")
                for number in range(1, CLIP_STEPS + 1):
                    updates = draw.standard_normal((COHORT, 4))
                    updates /= np.linalg.norm(updates, axis=1, keepdims=True)
                    step(dp, updates * np.exp(0.5 * draw.standard_normal((COHORT, 1))), number)
                worst = max(worst, abs(dp.clip - 1.0))
            name = f"clip after {CLIP_STEPS} steps from {start:g}, z = {z:g}, off the median of norms"
            figures.append(Figure("privacy", name, worst, "", "<= 0.1"))
    return figures


def noises() -> list[Figure]:
    """Return how far the noise that recipients see is from what is charged."""
    size, z, clip = 200_000, 1.3, 0.4
    keys: dict[str, Scalar] = {"train__devices": 40, "privacy__noise_multiplier": z, "privacy__clip": clip}
    seen = float(step(reception(size, **keys), np.zeros((20, size)), 1).std()) / clip
    dp = reception(size, privacy__quantile=0.5, **keys)
    of_sum = float(step(dp, np.zeros((20, size)), 1).std()) / clip
    dp, moves = reception(1, privacy__quantile=0.5, **keys), list[float]()
    for number in range(1, 4001):
        dp.clip = clip
        step(dp, np.zeros((20, 1)), number)
        moves.append(-math.log(dp.clip / clip) / dp.privacy.quantile_lr * dp.expected)
    of_bits = float(np.std(moves))  # 20 bits that are whole are a constant
    together = joint(of_sum, 2.0 * of_bits)
    return [
        Figure("privacy", "noise of the sum, off what is charged", abs(seen / z - 1.0), "", "<= 0.02"),
        Figure(
            "privacy", "noise of sum and bits, off what is charged", abs(together / z - 1.0), "", "<= 0.02"
        ),
        Figure(
            "privacy", "noise of the bits, off the expected", abs(of_bits / bit_std(40) - 1.0), "", "<= 0.05"
        ),
        Figure("privacy", "noise of the sum beside bits, over that without", of_sum / z, "x"),
    ]


def epsilons() -> list[Figure]:
    """Return the epsilons of 100 rounds of 100 of 1,000 devices at z = 1."""
    keys: dict[str, Scalar] = {
        "train__devices": 1000,
        "train__cohort": COHORT,
        "privacy__noise_multiplier": 1.0,
    }
    found = {}
    for cohort in ("visible", "poisson"):
        dp = reception(1, train__rounds=100, privacy__cohort=cohort, **keys)
        for number in range(1, 101):
            ids = dp.algorithm.cohort(number)
            dp.begin(Turn(ids=ids, steps=[1] * len(ids), factors=[1.0] * len(ids)))
            for k in ids:
                dp.fold(k, np.zeros(1, np.float32), 1.0)
            dp.end(number)
            dp.algorithm.step()
        found[cohort] = [ledger.epsilon for ledger in dp.books.open.values()]
    always = Ledger(1e9, 1e-5, [(1.0, 1.0, 100)]).epsilon
    return [
        Figure("privacy", "epsilon, visible, of a device in every one of 100 rounds", always, ""),
        Figure("privacy", "epsilon, visible cohorts of 100 of 1,000, largest", max(found["visible"]), ""),
        Figure(
            "privacy",
            "epsilon, visible cohorts of 100 of 1,000, median",
            float(np.median(found["visible"])),
            "",
        ),
        Figure("privacy", "epsilon, Poisson cohorts of 100 of 1,000, everyone's", max(found["poisson"]), ""),
    ]


def one(overrides: dict[str, Scalar], seed: int) -> dict[str, float]:
    """Return the accuracy at the end of a run."""
    import torch

    torch.set_num_threads(1)
    course = run({**UTILITY, "seed": seed, **overrides}, every=5)
    return {"accuracy": course.end(last=3)}


def utility() -> list[Figure]:
    """Return accuracies, means over seeds."""
    runs = {(name, str(seed)): partial(one, own, seed) for name, own in RUNS.items() for seed in SEEDS[:2]}
    found = in_parallel("privacy_devices", runs)
    figures = []
    for name in RUNS:
        own = [result["accuracy"] for (other, _), result in found.items() if other == name]
        figures.append(Figure("privacy", f"mixture, accuracy, {name}", float(np.mean(own)), ""))
    return figures


def main() -> int:
    """Measure, write ``results/privacy_devices.json``; 0 where every bound holds."""
    figures = [figure for part in (clips, noises, epsilons, utility) for figure in part()]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    write_result("privacy_devices", figures, seed=SEED, extra={"seeds": SEEDS})
    done("privacy_devices")
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
