"""Liars and the vanished: what two attackers of ten, or a third of the devices gone, cost a split federation.

Attackers send their Jacobians with the sign flipped and ten times as large. The loss of a rule is against
itself without attack. Vanishing devices have sent their embeddings and are gone before their Jacobians.
Three epochs of 4,096 texts: shorter runs end on the steep part of the curve, where what is lost is speed.
"Plain" is a rule as it was published, without the mixing of nearest neighbours (``robust.mix``).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.record import Figure, write_result
from benchmarks.split_runs import BASE, Flat, call, done, federated, in_parallel, many_unseen

SEEDS = (1, 2, 3)
ROBUST = ("median", "trimmed-mean", "multi-krum")
TEXTS = 4096
TEN: Flat = {"train.devices": 10, "train.batch-rows": 16, "train.rounds": 77, "split.kept-tokens": 8192}
HOW: dict[str, Flat] = {
    "clean": {},
    "attacked": {"faults.attack": "sign-flip", "faults.attackers": 2, "faults.attack-scale": 10.0},
    "30 % vanish": {"faults.vanish": 0.3},
}
PLAIN: Flat = {"robust.mix": False}


def main() -> int:
    """Train all, write ``results/split_robust.json``; 0 where every bound holds."""
    # (rule, how it is made worse, its keys, seeds)
    wanted: list[tuple[str, str, Flat, tuple[int, ...]]] = [
        ("fedsgd-lora", "30 % vanish", {}, SEEDS),
        ("fedsgd-lora", "attacked", {}, SEEDS[:1]),
        *((rule, "attacked", {}, SEEDS[:2]) for rule in ROBUST),
        *((rule, "attacked", PLAIN, SEEDS[:1]) for rule in ROBUST[:2]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        unseen = many_unseen(Path(folder), TEXTS)
        runs = {
            (_named(rule, keys), f"{way} {seed}"): call(
                federated, {**unseen, **TEN, "strategy": rule, "seed": seed, **HOW[way], **keys}
            )
            for rule, how, keys, seeds in wanted
            for seed in seeds
            for way in ("clean", how)
        }
        results = in_parallel("split_robust", runs)
    points = {key: 100.0 * float(result["accuracy"]) for key, result in results.items()}
    figures = []
    for rule, how, keys, seeds in wanted:
        name = _named(rule, keys)
        losses = [points[name, f"clean {seed}"] - points[name, f"{how} {seed}"] for seed in seeds]
        what = "30 % of devices vanish each step" if how == "30 % vanish" else "2 of 10 attackers"
        lost = f"{name}, {what}: accuracy lost, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        figures.append(Figure("split", lost, float(np.mean(losses)), "points", _bound(rule, how, keys)))
        if len(seeds) > 1:
            figures.append(Figure("split", f"{name}, {what}: most lost by a seed", max(losses), "points"))
    extra = {" ".join(key): result for key, result in results.items()}
    write_result("split_robust", figures, seed=SEEDS[0], extra={"base": {**BASE, **TEN}, "runs": extra})
    done("split_robust")
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3f} {figure.unit} {figure.bound}")
    return 0 if all(figure.holds for figure in figures) else 1


def _named(rule: str, keys: Flat) -> str:
    return f"{rule}, plain" if keys else rule


def _bound(rule: str, how: str, keys: Flat) -> str:
    if how == "30 % vanish":
        return "<= 1"
    if rule not in ROBUST:
        return ">= 10"
    return "" if keys else "<= 2"


if __name__ == "__main__":
    sys.exit(main())
