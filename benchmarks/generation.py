"""How fast channels are made, and that the number of processes does not show in them.

``python -m benchmarks.generation`` (half a minute). Rates are users per CPU second of one process with one
thread, imports excluded: drop, impulse response, 48 subcarriers and scaling, as :func:`drop_batch` does
for TDD. CPU seconds, because wall seconds on a shared machine measure the neighbours.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.record import Figure, write_result
from fedlam_app.data.channels import FIELDS, Recipe, folder_of, load_or_generate
from fedlam_app.data.drops import SCENARIOS, drop_batch

SEED = 2025
BATCHES = 6
REPEATS = 7


def users_per_cpu_second(scenario: str) -> list[float]:
    """Return the rate in each of ``REPEATS`` runs of ``BATCHES`` batches."""
    recipe = Recipe(scenario=scenario, seed=SEED)
    rates = []
    for repeat in range(REPEATS):
        start = time.process_time()
        for number in range(BATCHES):
            drop_batch(recipe, scenario, repeat * BATCHES + number)
        rates.append(BATCHES * recipe.batch / (time.process_time() - start))
    return rates


def same_bytes(recipe: Recipe) -> bool:
    """Say whether one and two processes write the same files."""
    hashes = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as cache:
            load_or_generate(recipe, Path(cache), workers, progress=False)
            folder = folder_of(recipe, Path(cache))
            files = [(folder / f"{name}.npy").read_bytes() for name in FIELDS]
        hashes.append(hashlib.sha256(b"".join(files)).hexdigest())
    return hashes[0] == hashes[1]


def main() -> int:
    """Measure, write ``results/generation.json``, and return 0 where every bound holds."""
    start = time.process_time()
    drop_batch(Recipe(seed=SEED), "uma-nlos", 0)
    first_s = time.process_time() - start
    rates = {scenario: users_per_cpu_second(scenario) for scenario in SCENARIOS}
    mixture = replace(Recipe(seed=SEED), scenario="uma-nlos,rma-los", users=100, duplex="fdd")
    figures = [
        Figure(
            issue="foundation",
            name=f"{scenario} users per CPU second, one process, median of {REPEATS}",
            value=statistics.median(values),
            unit="users/s",
            bound=">= 60" if scenario == "uma-nlos" else "",
        )
        for scenario, values in rates.items()
    ]
    figures += [
        Figure("foundation", "first batch, importing torch and Sionna (CPU)", first_s, "s"),
        Figure(
            "foundation", "same bytes from 1 and 2 processes", float(same_bytes(mixture)), "yes = 1", "== 1"
        ),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    write_result("generation", figures, seed=SEED, extra={"rates": rates, "batches": BATCHES})
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
