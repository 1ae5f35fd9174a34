"""Split-federated against centralised training at equal steps, and on the full data: Rotten Tomatoes, MiniLM.

Centralised is a plain PyTorch loop over the unsplit model on the same batches as the IID federation. Three
seeds; eight devices; one server step a round; heads averaged every round.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Figure, write_result
from benchmarks.split_runs import BASE, Flat, call, central, done, federated, in_parallel, many_unseen

SEEDS = (1, 2, 3)
FP32: Flat = {"wire.embedding": "fp32", "wire.representation": "fp32", "wire.jacobian": "fp32"}
KINDS: dict[str, tuple[Flat, str]] = {
    "IID, fp32": (FP32, "<= 0.3"),
    "IID, int8 on all links": ({}, "<= 0.5"),
    "Dirichlet 0.5, int8": ({"text.partition": "dirichlet", "text.dirichlet": 0.5}, "<= 1"),
    "Dirichlet 0.1, int8": ({"text.partition": "dirichlet", "text.dirichlet": 0.1}, "<= 2"),
}
FULL: Flat = {"train.batch-rows": 16, "train.rounds": 165}  # three epochs of 6,920 texts, 55 steps each


def main() -> int:
    """Train all, write ``results/split_accuracy.json``; 0 where every bound holds."""
    with tempfile.TemporaryDirectory() as folder:
        unseen = many_unseen(Path(folder))
        runs = {}
        for seed in SEEDS:
            runs["central", str(seed)] = call(central, {**unseen, "seed": seed})
            for kind, (keys, _) in KINDS.items():
                runs[kind, str(seed)] = call(federated, {**unseen, **keys, "seed": seed})
        runs["full, federated", "1"] = call(federated, {**FULL, "seed": 1})
        runs["full, central", "1"] = call(central, {**FULL, "seed": 1})
        results = in_parallel("split_accuracy", runs)
    figures = [_full(results)]
    for kind, (_, bound) in KINDS.items():
        gaps = [_points(results["central", str(s)]) - _points(results[kind, str(s)]) for s in SEEDS]
        mean = float(np.mean(gaps))
        figures.append(
            Figure("split", f"{kind}: accuracy below centralised, three seeds", mean, "points", bound)
        )
        worst = max(abs(gap) for gap in gaps)
        figures.append(Figure("split", f"{kind}: largest gap of a seed, either way", worst, "points"))
    figures.append(
        Figure(
            "split", "full data: centralised ceiling", _points(results["full, central", "1"]), "% accuracy"
        )
    )
    extra = {" ".join(key): result for key, result in results.items()}
    write_result("split_accuracy", figures, seed=SEEDS[0], extra={"base": BASE, "runs": extra})
    done("split_accuracy")
    for figure in figures:
        print(f"{figure.name}: {figure.value:.3f} {figure.unit} {figure.bound}")
    return 0 if all(figure.holds for figure in figures) else 1


def _full(results: dict[Any, dict[str, Any]]) -> Figure:
    value = _points(results["full, federated", "1"])
    return Figure(
        "split", "full data, 3 epochs, int8: test accuracy, federated", value, "% accuracy", ">= 80"
    )


def _points(result: dict[str, Any]) -> float:
    return 100.0 * float(result["accuracy"])


if __name__ == "__main__":
    sys.exit(main())
