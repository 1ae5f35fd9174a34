"""What privacy costs: Rotten Tomatoes, MiniLM, beside the same run without noise; three seeds.

A DP head on the frozen backbone and FFA-LoRA by DP-SGD on two devices; the split under label-DP, and with
private inputs, on four. Where several learning rates stand below, every budget, no noise too, gets the one
that is best on validation texts, found on a seed that is not among the three; the test texts are looked at
once. (The label-DP split has the rate of ``split_accuracy.py``.)
"""

from __future__ import annotations

import csv
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Figure, write_result
from benchmarks.split_runs import Flat, call, done, federated, in_parallel
from fedlam_app.config import Scalar

SEEDS = (1, 2, 3)
TUNED_ON = 77
TRAIN, VALID = 5200, 800  # of 6,920 sentences; the rest, with the official test part, is the test set
NONE = math.inf  # the same run with no noise and, where labels are randomised, with the true ones

COMMON: dict[str, Scalar] = {"train.devices": 4, "text.max-tokens": 48}
IN_CLIENTS: dict[str, Scalar] = {
    **COMMON,
    "train.devices": 2,
    "train.optimiser": "sgd",
    "train.clip-norm": 0.0,
    "privacy.mechanism": "dp-sgd",
    "privacy.clip": 1.0,
}


@dataclass(frozen=True)
class Arm:
    """One way of being private, its budgets and the points that it may lose."""

    keys: Flat
    budgets: dict[
        float, str
    ]  # epsilon -> bound on the points lost; empty: looked at on validation texts only
    rates: dict[float, tuple[float, ...]]  # that are tried on validation texts
    rate: str = "train.lr"
    together: bool = False  # in one process, where a frozen model is asked once a text for all of them


ARMS = {
    "FFA-LoRA, DP-SGD": Arm(
        {
            **IN_CLIENTS,
            "strategy": "ffa-lora",
            "model.lora-on": "attention",
            "train.batch-rows": 260,  # q = 0.1
            "train.rounds": 20,
            "train.local-steps": 1,
        },
        {8.0: "<= 3"},
        {NONE: (4.0, 8.0), 8.0: (4.0, 8.0)},
    ),
    "DP head on frozen MiniLM": Arm(
        {
            **IN_CLIENTS,
            "strategy": "fedavg-lora",
            "model.tuning": "none",
            "train.batch-rows": 520,  # q = 0.2
            "train.rounds": 20,
            "train.local-steps": 10,
        },
        {8.0: "<= 1", 1.0: "<= 3"},
        {NONE: (3.0, 10.0), 8.0: (3.0, 10.0), 1.0: (1.0, 3.0)},
        together=True,
    ),
    "split, label-DP by randomised response": Arm(
        {
            **COMMON,
            "train.batch-rows": 32,
            "train.rounds": 60,
            "split.heads": "averaged",
            "privacy.mechanism": "randomised-response",
        },
        {3.0: "<= 2"},
        {NONE: (1e-3,), 3.0: (1e-3,)},
    ),
    "split, private inputs (release once)": Arm(
        {
            **COMMON,
            "train.batch-rows": 64,
            "train.rounds": 200,
            "train.lr": 2e-4,
            "split.heads": "averaged",
            "split.device-blocks": 5,
            "privacy.mechanism": "release-once",
        },
        {},
        {10.0: (0.1, 0.5)},
        "split.head-lr",
    ),
}


def main() -> int:
    """Choose rates, train, write ``results/privacy_utility.json``; 0 where every bound holds."""
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder)
        validation, test = _texts(texts, "validation"), _texts(texts, "test")
        tried = {
            (name, f"{budget} {rate}"): call(
                federated, _keys(arm, budget, rate) | {"seed": TUNED_ON, "text.source": str(validation)}
            )
            for name, arm in ARMS.items()
            for budget, rates in arm.rates.items()
            for rate in rates
            if len(rates) > 1
        }
        found = in_parallel("privacy_utility validation", tried)
        best: dict[tuple[str, float], float] = {}
        for name, arm in ARMS.items():
            for budget, rates in arm.rates.items():
                scores = {rate: found.get((name, f"{budget} {rate}"), {}) for rate in rates}
                best[name, budget] = max(scores, key=lambda rate: scores[rate].get("accuracy", 0.0))
        groups = _groups(best)
        runs = {
            key: partial(
                _one_after_another,
                [
                    _keys(ARMS[name], budget, best[name, budget]) | {"seed": seed, "text.source": str(test)}
                    for name, budget, seed in group
                ],
            )
            for key, group in groups.items()
        }
        scored = in_parallel("privacy_utility", runs)
    results = {
        (name, f"{budget} {seed}"): accuracy
        for key, group in groups.items()
        for (name, budget, seed), accuracy in zip(group, scored[key]["accuracies"], strict=True)
    }
    figures = [figure for name in ARMS for figure in _figures(name, results)]
    for name, arm in ARMS.items():
        for budget in arm.rates if not arm.budgets else ():
            reached = found[name, f"{budget} {best[name, budget]}"]["accuracy"]
            what = f"{name}, epsilon {budget:g}: accuracy on validation texts, one seed"
            figures.append(Figure("privacy", what, 100.0 * reached, "%"))
    extra = {
        "arms": {name: dict(arm.keys) for name, arm in ARMS.items()},
        "rates": {f"{name}, {budget}": rate for (name, budget), rate in best.items()},
        "validation": {" ".join(key): result["accuracy"] for key, result in found.items()},
        "test": {" ".join(key): accuracy for key, accuracy in results.items()},
    }
    write_result("privacy_utility", figures, seed=SEEDS[0], extra=extra)
    done("privacy_utility validation")
    done("privacy_utility")
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3f} {figure.unit} {figure.bound}")
    return 0 if all(figure.holds for figure in figures) else 1


def _groups(best: Mapping[tuple[str, float], float]) -> dict[tuple[str, str], list[tuple[str, float, int]]]:
    """Return the runs (arm, budget, seed) that share a process, under a name each."""
    groups: dict[tuple[str, str], list[tuple[str, float, int]]] = {}
    for name, budget in best:
        if not ARMS[name].budgets:
            continue
        for seed in SEEDS:
            key = f"together {seed % 2}" if ARMS[name].together else f"{budget} {seed}"
            groups.setdefault((name, key), []).append((name, budget, seed))
    return groups


def _one_after_another(runs: list[dict[str, Scalar]]) -> dict[str, Any]:
    return {"accuracies": [float(federated(keys)["accuracy"]) for keys in runs]}


def _keys(arm: Arm, budget: float, rate: float) -> dict[str, Scalar]:
    return {**arm.keys, "privacy.target-epsilon": budget, arm.rate: rate}


def _figures(name: str, results: dict[tuple[str, str], float]) -> list[Figure]:
    def points(budget: float) -> np.ndarray:
        return np.array([100.0 * results[name, f"{budget} {seed}"] for seed in SEEDS])

    figures = []
    for budget, bound in ARMS[name].budgets.items():
        own = points(budget)
        where, spread = f"{name}, epsilon {budget:g}", float(own.std(ddof=1))
        figures.append(Figure("privacy", f"{where}: accuracy, three seeds", float(own.mean()), "%"))
        figures.append(Figure("privacy", f"{where}: standard deviation over seeds", spread, "points"))
        if NONE in ARMS[name].rates:
            lost = float((points(NONE) - own).mean())
            what = f"{where}: points lost to the same run without noise"
            figures.append(Figure("privacy", what, lost, "points", bound))
    return figures


def _texts(folder: Path, held_out: str) -> Path:
    """Write the training sentences, and those to score on, into a folder of their own."""
    from fedlam_app.base.keys import rng
    from fedlam_app.config import parse
    from fedlam_app.data.text import load_texts

    train, test = load_texts(parse({}).text, 0)
    order = rng("benchmark", "privacy", "utility").permutation(len(train))
    rows = [(train.texts[i], train.names[train.labels[i]]) for i in order]
    rest = [(text, test.names[label]) for text, label in zip(test.texts, test.labels, strict=True)]
    scored = rows[TRAIN : TRAIN + VALID] if held_out == "validation" else rows[TRAIN + VALID :] + rest
    own = folder / held_out
    own.mkdir()
    for name, part in (("train", rows[:TRAIN]), ("test", scored)):
        with (own / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(part)
    return own


if __name__ == "__main__":
    sys.exit(main())
