"""`fedlam audit`: every test that may contradict what is claimed, on the code as it runs.

    mechanism   a million worlds with and without a canary: is epsilon as small as the ledger says?
    one run     five thousand canaries in one training of DP-SGD: are more coins guessed than epsilon allows?
    attacks     tokens and labels of real texts, from what leaves a device

A test contradicts a claim, or it is consistent with it; nothing here proves a claim. What each test cannot
see is part of its answer (:data:`BLIND`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlam_app.base.plain import plain_fields
from fedlam_app.config import ConfigError, RunConfig
from fedlam_app.experiments import attacks
from fedlam_app.experiments.audited import SIZES, SUBJECTS, dirac_run, subject
from fedlam_app.privacy import one_run
from fedlam_app.privacy.accounting import Ledger, Release
from fedlam_app.privacy.audit import Finding, audit, audit_pure, gaussian_mu
from fedlam_app.tasks.text_classification import TextClassification

TRIALS = 1_000_000
SLOW = {"release-once": 5, "client": 2}  # a world costs that many times more: as many fewer
RATE, STEPS = 0.1, 100  # of the training with canaries in it

BLIND = (
    "A bound from below refutes a claim or does not; 'consistent' is no proof.",
    "Mechanism audits see one release of one sample in the worst case that we know, not composition over"
    " rounds, Poisson sampling, or who takes part. The bound 'Gauss' rests on Gaussian noise being"
    " claimed; the bound 'free' on nothing, and is the looser for it.",
    "The one-run audit sees gross errors alone: no clipping, no noise, noise divided by the batch. It misses"
    " half the noise and noise that is used again, and no claim above its ceiling can be refuted.",
    "The attacks have no language model and no other texts of the device; attackers who have do better. That"
    " they fail is no evidence, that they succeed is.",
    "Nothing here sees attacks on the floating-point numbers of the noise, or a secret that has leaked.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim and what a test made of it."""

    test: str
    setting: str  # how long the canary is
    noise: float  # charged
    claimed: float  # epsilon: exact for a single release, the ledger's for a training
    ledger: float  # what the ledger says of it
    gaussian: float  # epsilon that is proved, if the noise is Gaussian
    free: float  # ... and by whatever noise
    reasons: list[str]
    trials: int
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def proved(self) -> float:
        """The largest epsilon that is proved."""
        return max(value for value in (self.gaussian, self.free) if not math.isnan(value))

    def record(self) -> dict[str, Any]:
        """Return the row as JSON; what is no number is null."""
        return plain_fields(asdict(self)) | {"contradicts": bool(self.reasons)}


@dataclass(frozen=True)
class Audit:
    """What all tests found."""

    rows: list[Row]
    attacks: list[attacks.Attack]
    skipped: list[str]

    @property
    def contradicted(self) -> bool:
        """Whether any test contradicts a claim."""
        return any(row.reasons for row in self.rows) or any(attack.contradicts for attack in self.attacks)

    def record(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "contradicted": self.contradicted,
            "tests": [row.record() for row in self.rows],
            "attacks": [attack.record() for attack in self.attacks],
            "skipped": self.skipped,
            "cannot_see": list(BLIND),
        }


def run_audit(
    config: RunConfig,
    trials: int = TRIALS,
    *,
    fast: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Audit the mechanism of a configuration, or all of them where it has none; ``say`` hears what begins."""
    refuse(config)
    rows: list[Row] = []
    found: list[attacks.Attack] = []
    skipped: list[str] = []
    named = [config.privacy.mechanism] if config.privacy.on else list(SUBJECTS)
    for name in named:
        if name not in SUBJECTS:
            skipped.append(f"there is no audit of the mechanism '{name}'")
            continue
        say(f"mechanism {name}")
        rows += mechanism(name, config, max(trials // SLOW.get(name, 1), 10_000))
        if name == "dp-sgd":
            say("one run of dp-sgd")
            rows += in_one_run(config, canaries=2000 if fast else 5000)
    for what, attack in _attacks(config, named, texts=96 if fast else 256):
        say(what)
        try:
            found += attack()
        except ValueError as error:  # texts or weights that are not here
            skipped.append(f"{what}: {error}")
    return Audit(rows, found, skipped)


def refuse(config: RunConfig) -> None:
    """Raise ``ConfigError`` for a configuration of which there is nothing to audit."""
    privacy = config.privacy
    if config.task != "text-classification":
        raise ConfigError(f"'task' = '{config.task}' cannot be audited; it must be 'text-classification'")
    if math.isinf(privacy.target_epsilon):
        raise ConfigError("'privacy.target-epsilon' = inf claims nothing; it must be finite to be audited")
    if privacy.noise_multiplier:
        raise ConfigError(
            f"'privacy.noise-multiplier' = {privacy.noise_multiplier:g} is not allowed in an audit, which"
            " finds the noise of 'privacy.target-epsilon'; it must be 0"
        )


# --- tests ---------------------------------------------------------------------------------------------


def mechanism(name: str, config: RunConfig, trials: int) -> Iterator[Row]:
    """Audit one release of a mechanism, with canaries as long as the clip and longer."""
    privacy, seed = config.privacy, config.seed
    epsilon, delta = privacy.target_epsilon, privacy.delta
    pure = name == "randomised-response"
    for size in (1.0,) if pure else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            own = subject(name, config, epsilon if pure else gaussian_mu(epsilon, delta), size, Path(folder))
            own.run(np.ones(own.worlds, bool))  # after which the book says what is claimed
            if pure:
                charged = math.inf
                found = audit_pure(own.run, own.ledger().pure, trials, seed, worlds=own.worlds)
            else:
                charged = own.charged
                found = audit(own.run, 1.0 / charged, delta, trials, seed, worlds=own.worlds)
            yield _row(name, f"{size:g} C", charged, found, delta)


def _row(test: str, setting: str, charged: float, found: Finding, delta: float) -> Row:
    book = Ledger(math.inf, delta)
    book.charge(Release(group="one", z=charged, pure=found.epsilon if math.isinf(charged) else 0.0))
    return Row(
        test=test,
        setting=setting if math.isfinite(charged) else "label",
        noise=charged,
        claimed=found.epsilon,
        ledger=book.epsilon,
        gaussian=found.epsilon_gdp,
        free=found.epsilon_free,
        reasons=found.reasons,
        trials=found.trials,
        more=found.record(),
    )


def in_one_run(config: RunConfig, canaries: int, sizes: Sequence[float] = SIZES) -> Iterator[Row]:
    """Train DP-SGD on canaries once, and guess which were there."""
    privacy = config.privacy
    noise = Ledger(privacy.target_epsilon, privacy.delta).calibrate(RATE, STEPS)
    present = one_run.coins(canaries, config.seed)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            scores, ledger = dirac_run(config, noise, RATE, STEPS, size, present, Path(folder))
        proved, guesses, right = one_run.lower_bound(scores, present, privacy.delta)
        claimed, ceiling = ledger.epsilon, one_run.ceiling(canaries, privacy.delta)
        told = f"{right} of {guesses} guesses are right" if guesses else "no guess"
        yield Row(
            test="dp-sgd, one run",
            setting=f"{size:g} C",
            noise=noise,
            claimed=claimed,
            ledger=claimed,
            gaussian=math.nan,
            free=proved,
            reasons=[f"epsilon is at least {proved:.3g}: {told}"] if proved > claimed else [],
            trials=1,
            more={
                "canaries": canaries,
                "steps": STEPS,
                "rate": RATE,
                "guesses": guesses,
                "right": right,
                "ceiling": ceiling,
            },
        )


def _attacks(
    config: RunConfig, named: Sequence[str], texts: int
) -> Iterator[tuple[str, Callable[[], list[attacks.Attack]]]]:
    """Yield what is attacked, and how."""
    clear = config.model_copy(update={"privacy": config.privacy.model_copy(update={"mechanism": "none"})})
    clear = clear.model_copy(update={"split": clear.split.model_copy(update={"device_blocks": 0})})
    task = TextClassification(clear)
    yield "tokens from clear embeddings", lambda: list(attacks.embeddings(task, min(texts, 32)))
    yield "tokens from gradients of LoRA", lambda: list(attacks.gradients(task, 4))
    if "jacobian" in named:
        z = 2.0 / gaussian_mu(config.privacy.target_epsilon, config.privacy.delta)
        yield "labels from Jacobians", lambda: [_labels(config, texts, z, k) for k in (1, 4)]
    if "release-once" in named:
        yield "words from released vectors", lambda: [_in_folder(attacks.vectors, config, texts)]


def _labels(config: RunConfig, texts: int, noise: float, releases: int) -> attacks.Attack:
    return _in_folder(lambda c, folder, n: attacks.labels(c, folder, n, noise, releases), config, texts)


def _in_folder(
    attack: Callable[[RunConfig, Path, int], attacks.Attack], config: RunConfig, texts: int
) -> attacks.Attack:
    with tempfile.TemporaryDirectory() as folder:
        return attack(config, Path(folder), texts)
