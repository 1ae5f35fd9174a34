"""Audits of the code as it runs: is what is claimed refuted, are errors found, what do attacks read?

Mechanism audits compare with the exact epsilon of the noise that the ledger has charged (the ledger's own,
by Rényi DP, is a little larger and stands beside it), at 99 % confidence; a million worlds each. Mutants are
the real code broken in one place. The one-run audit has 5,000 canaries in one training of 100 steps at
q = 0.1. Attacks are on MiniLM and Rotten Tomatoes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pytest import MonkeyPatch

from benchmarks.record import Figure, write_result
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.experiments import attacks
from fedlam_app.experiments.audit import RATE, STEPS
from fedlam_app.experiments.audited import dirac_run, subject
from fedlam_app.privacy import attack_labels, one_run
from fedlam_app.privacy.accounting import Ledger, Release
from fedlam_app.privacy.audit import Finding, audit, gaussian_mu
from fedlam_app.tasks.text_classification import TextClassification
from tests import broken_privacy as broken

SEED = 3
DELTA = 1e-5
MECHANISMS = ("jacobian", "dp-sgd")
MUTANTS: dict[str, tuple[broken.Break, float]] = {  # and how long its canaries are, over C
    "noise x 0.9": (broken.less_noise, 1.0),
    "no clipping": (broken.unclipped, 10.0),
    "noise over the batch": (broken.over_the_batch, 1.0),
    "no noise": (broken.no_noise, 1.0),
    "noise used again": (broken.used_again, 1.0),
    "half the sensitivity charged": (broken.half_charged, 1.0),
}
GROSS = ("no clipping", "noise over the batch", "no noise")  # what one run can see


def main() -> int:
    """Audit, write ``results/privacy_audit.json``; 0 where every bound holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1_000_000)
    parser.add_argument("--canaries", type=int, default=5000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    parts = (mechanisms(asked.trials), mutants(), one_training(asked.canaries), labels(), texts())
    for part in parts:
        for figure in part:
            print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}", flush=True)
            figures.append(figure)
    write_result("privacy_audit", figures, seed=SEED, extra=vars(asked))
    return 0 if all(figure.holds for figure in figures) else 1


def config(**privacy: float) -> RunConfig:
    """Return a run on MiniLM and Rotten Tomatoes."""
    flat: dict[str, Scalar] = {"job": "train", "task": "text-classification", "seed": SEED}
    return parse(flat | {f"privacy.{key.replace('_', '-')}": value for key, value in privacy.items()})


def audited(name: str, epsilon: float, trials: int, size: float = 1.0) -> Finding:
    """Audit a mechanism with the noise of an epsilon against what its ledger says."""
    with tempfile.TemporaryDirectory() as folder:
        own = subject(name, config(), gaussian_mu(epsilon, DELTA), size, Path(folder))
        own.run(np.ones(own.worlds, bool))
        return audit(own.run, 1.0 / own.charged, DELTA, trials, SEED, worlds=own.worlds)


def mechanisms(trials: int) -> Iterator[Figure]:
    """Return the bounds of the code as it is, over what is claimed."""
    for name in MECHANISMS:
        for epsilon in (1.0, 4.0, 8.0):
            found = audited(name, epsilon, trials)
            book = Ledger(math.inf, DELTA)
            book.charge(Release(group="one", z=1.0 / found.mu))
            what, share = f"audit: {name}, epsilon {epsilon:g}", found.epsilon_gdp / found.epsilon
            yield Figure("privacy", f"{what}: bound over the claim, at least", share, "", ">= 0.9")
            yield Figure("privacy", f"{what}: bound over the claim, at most", share, "", "<= 1")
            free = found.epsilon_free / found.epsilon
            yield Figure("privacy", f"{what}: without assumptions, over the claim", free, "", "<= 1")
            yield Figure("privacy", f"{what}: the ledger's epsilon", book.epsilon, "")
            yield Figure("privacy", f"{what}: reasons to doubt it", len(found.reasons), "", "== 0")


def mutants(trials: int = 100_000) -> Iterator[Figure]:
    """Return whether each mutant is found."""
    for name in MECHANISMS:
        for what, (mutant, size) in MUTANTS.items():
            with MonkeyPatch.context() as patch:
                mutant(patch)
                found = audited(name, 4.0, trials, size)
            yield Figure(
                "privacy", f"audit: {name}, {what}: found", float(bool(found.reasons)), "0 or 1", "== 1"
            )


def one_training(canaries: int) -> Iterator[Figure]:
    """Return the bounds of the audit in one run."""
    for epsilon in (1.0, 4.0, 8.0):
        shares = [_in_one_run(canaries, epsilon, seed) / epsilon for seed in range(3)]
        name = f"one run, epsilon {epsilon:g}: bound over the claim, largest of three"
        yield Figure("privacy", name, max(shares), "", "<= 1")
    yield Figure(
        "privacy", "one run: no claim above this can be refuted", one_run.ceiling(canaries, DELTA), ""
    )
    for what, (mutant, size) in MUTANTS.items():
        with MonkeyPatch.context() as patch:
            mutant(patch)
            share = _in_one_run(canaries, 4.0, 0, size) / 4.0
        bound = "> 1" if what in GROSS else ""
        yield Figure("privacy", f"one run, {what}: bound over the claim", share, "", bound)


def _in_one_run(canaries: int, epsilon: float, seed: int, size: float = 1.0) -> float:
    present = one_run.coins(canaries, SEED, seed)
    noise = Ledger(epsilon, DELTA).calibrate(RATE, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        scores, _ = dirac_run(config(), noise, RATE, STEPS, size, present, Path(folder))
    return one_run.lower_bound(scores, present, DELTA)[0]


def labels() -> Iterator[Figure]:
    """Return how much more often labels are found than the bound says."""
    for noise, releases in ((1.0, 1), (1.0, 4), (2.0, 1), (2.0, 4)):
        most = attack_labels.bound(noise, releases)
        what = f"labels at z = {noise:g} in {releases} releases, less the bound {most:.3f}"
        with tempfile.TemporaryDirectory() as folder:
            found = broken.found_labels(config(), Path(folder), noise, releases, samples=50_000)
        yield Figure("privacy", f"worst case: {what}", found - most, "share", "<= 0.03")
        with tempfile.TemporaryDirectory() as folder:
            attack = attacks.labels(config(), Path(folder), 512, noise, releases)
        yield Figure("privacy", f"MiniLM: {what}", attack.recovered - most, "share", "<= 0.03")


def texts() -> Iterator[Figure]:
    """Return what is read of tokens."""
    task = TextClassification(config())
    for attack in attacks.embeddings(task, 64):
        bound = "== 100" if attack.setting in ("clear, fp32", "clear, int8") else ""
        name = f"{attack.what}, {attack.setting}: recovered"
        yield Figure("privacy", name, 100.0 * attack.recovered, "%", bound)
    for attack in attacks.gradients(task, 8):
        bound = "== 100" if attack.setting == "no DP" else ""
        name = f"{attack.what}, {attack.setting}: recovered"
        yield Figure("privacy", name, 100.0 * attack.recovered, "%", bound)
    for epsilon in (1.0, 8.0):
        with tempfile.TemporaryDirectory() as folder:
            attack = attacks.vectors(config(target_epsilon=epsilon), Path(folder), 512)
        name = f"release-once, epsilon {epsilon:g}: words found beyond another text's"
        yield Figure("privacy", name, attack.recovered - attack.expected, "share", "<= 0.01")


if __name__ == "__main__":
    sys.exit(main())
