"""Combinations that privacy forbids: what would break a guarantee is refused, never only warned of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlam_app.config import RunConfig

IN_CLIENTS = ("dp-sgd",)
ON_SERVER = ("client",)
AT_THE_CUT = ("server-dp-sgd", "jacobian", "logit", "randomised-response", "release-once")
FROZEN_HEAD = ("server-dp-sgd", "jacobian")  # a head that trains would carry a sample into others' Jacobians
POLLING = ("power-of-choice",)  # asks devices for losses
WITH_SAMPLES = ("text-classification", "language-modelling", "mixture")


def broken(config: RunConfig) -> Iterator[str]:
    """Yield what the table ``privacy`` and the rest forbid each other, whatever the strategy."""
    privacy = config.privacy
    if privacy.ledgers and not Path(privacy.ledgers).is_absolute():
        yield f"'privacy.ledgers' = '{privacy.ledgers}' is not allowed: it must be an absolute path"
    if not privacy.on:
        return
    key = f"'privacy.mechanism' = '{privacy.mechanism}'"
    if config.job == "case-study":
        yield f"{key} is not allowed with 'job' = 'case-study'; it must be 'none', or the job another"
    if config.federation.placement == "sites" and privacy.randomness == "seed":
        yield (
            "'privacy.randomness' = 'seed' is not allowed with 'federation.placement' = 'sites', where the"
            " server knows the seed and could subtract the noise; it must be 'device'"
        )
    if config.faults.attack != "none":
        yield (
            f"{key} is not allowed with 'faults.attack' = '{config.faults.attack}', which changes what leaves"
            " a device after it was clipped; the attack must be 'none', or the mechanism 'none'"
        )
    if privacy.withholds and config.selection.policy in POLLING and config.fleet.profiles != "none":
        yield (
            f"{key} is not allowed with 'selection.policy' = '{config.selection.policy}', which asks devices"
            " for their losses; the policy must be another"
        )


def with_strategy(config: RunConfig, space: str, linear: bool) -> Iterator[str]:
    """Yield what the mechanism and a strategy of that family forbid each other."""
    privacy = config.privacy
    if not privacy.on:
        return
    key, name = f"'privacy.mechanism' = '{privacy.mechanism}'", config.strategy
    allowed = {"adapter": (*IN_CLIENTS, *ON_SERVER), "gradient": (*AT_THE_CUT, *ON_SERVER)}[space]
    if privacy.mechanism not in allowed:
        yield f"{key} is not allowed with 'strategy' = '{name}'; it must be {', '.join(allowed)}, or none"
    if privacy.mechanism in FROZEN_HEAD and config.split.heads != "frozen":
        yield (
            f"{key} is not allowed with 'split.heads' = '{config.split.heads}': a head that trains on clear"
            " labels would carry one sample into the others' Jacobians; it must be 'frozen'"
        )
    if privacy.mechanism == "client" and not linear:
        yield (
            f"{key} is not allowed with 'strategy' = '{name}', which needs more than the sum of what devices"
            " send; the strategy must be one that averages, such as 'fedavg-lora'"
        )
    if privacy.secure and privacy.mechanism != "client":
        yield (
            f"'privacy.secure' = true is not allowed with {key}; it must be false, or the mechanism 'client'"
        )
    if privacy.mechanism == "dp-sgd" and config.task not in WITH_SAMPLES:
        yield (
            f"{key} is not allowed with 'task' = '{config.task}', whose samples never come twice; the task"
            f" must be {', '.join(WITH_SAMPLES)}, or the mechanism 'client'"
        )
    if privacy.mechanism in AT_THE_CUT and config.task != "text-classification":
        yield f"{key} is not allowed with 'task' = '{config.task}'; it must be 'text-classification'"
