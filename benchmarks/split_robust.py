"""Liars and the vanished: what two attackers of ten, or a third of the devices gone, cost a split federation.

Attackers send their Jacobians with the sign flipped and ten times as large. The loss of a rule is against
itself without attack. Vanishing devices have sent their embeddings and are gone before their Jacobians.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import Figure, write_result
from benchmarks.split_runs import BASE, Flat, call, done, federated, in_parallel, many_unseen

SEED = 1
RULES = {"fedsgd-lora": ">= 10", "median": "<= 2", "trimmed-mean": "<= 2", "multi-krum": "<= 2"}
TEN: Flat = {"train.devices": 10, "train.batch-rows": 8, "train.rounds": 48, "seed": SEED}
ATTACK: Flat = {"faults.attack": "sign-flip", "faults.attackers": 2, "faults.attack-scale": 10.0}


def main() -> int:
    """Train all, write ``results/split_robust.json``; 0 where every bound holds."""
    with tempfile.TemporaryDirectory() as folder:
        unseen = many_unseen(Path(folder))
        runs = {}
        for rule in RULES:
            keys = {**unseen, **TEN, "strategy": rule}
            runs[rule, "clean"] = call(federated, keys)
            runs[rule, "attacked"] = call(federated, {**keys, **ATTACK})
        runs["fedsgd-lora", "30 % vanish"] = call(federated, {**unseen, **TEN, "faults.vanish": 0.3})
        results = in_parallel("split_robust", runs)

    def lost(rule: str, how: str) -> float:
        return 100.0 * (_accuracy(results[rule, "clean"]) - _accuracy(results[rule, how]))

    figures = [
        Figure(
            "split", f"{rule}: accuracy lost to 2 of 10 attackers", lost(rule, "attacked"), "points", bound
        )
        for rule, bound in RULES.items()
    ]
    gone = lost("fedsgd-lora", "30 % vanish")
    figures.append(Figure("split", "30 % of devices vanish each step: accuracy lost", gone, "points", "<= 1"))
    extra = {" ".join(key): result for key, result in results.items()}
    write_result("split_robust", figures, seed=SEED, extra={"base": {**BASE, **TEN}, "runs": extra})
    done("split_robust")
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3f} {figure.unit} {figure.bound}")
    return 0 if all(figure.holds for figure in figures) else 1


def _accuracy(result: dict[str, Any]) -> float:
    return float(result["accuracy"])


if __name__ == "__main__":
    sys.exit(main())
