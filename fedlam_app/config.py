"""One run's configuration: parsed once at the door, typed and frozen below it.

Flower hands an app a flat dictionary of scalars with dotted kebab-case keys (``data.speed-min-kmh``).
:func:`parse` turns it into a :class:`RunConfig`, or raises :class:`ConfigError` with one sentence that names
the key, the value and what is allowed. The defaults live in ``pyproject.toml`` (where Flower reads them) and
nowhere else; what each key means is written under its field, here and in ``tables/``. Lists, for which
Flower has no type, are comma-separated strings.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedlam_app import rules
from fedlam_app.base.registry import did_you_mean
from fedlam_app.base.sentence import allowed, field_of, sentence
from fedlam_app.tables.base import SCENARIOS, Table
from fedlam_app.tables.data import DataConfig, MixtureConfig, ModelConfig, TextConfig
from fedlam_app.tables.jobs import (
    CLASSICAL,
    COMPETITORS,
    CaseStudyConfig,
    CompareConfig,
    FederationConfig,
    SweepConfig,
    TrainConfig,
)
from fedlam_app.tables.privacy import PrivacyConfig
from fedlam_app.tables.split import (
    AsyncConfig,
    FaultsConfig,
    RobustConfig,
    ServerConfig,
    SplitConfig,
    WireConfig,
)
from fedlam_app.tables.wireless import FleetConfig, SelectionConfig, WirelessConfig

__all__ = [
    "CLASSICAL",
    "COMPETITORS",
    "SCENARIOS",
    "CaseStudyConfig",
    "ConfigError",
    "DataConfig",
    "MixtureConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "TextConfig",
    "TrainConfig",
    "defaults",
    "describe",
    "experiment",
    "flatten",
    "identity",
    "parse",
    "results_folder",
    "to_flat",
]

Scalar = bool | int | float | str

# Where and how a run executes, not what it computes: these may differ when a run is resumed. So may how many
# experiments a sweep has, for they do not depend on each other.
_PLACEMENT = ("results", "resume", "federation.", "sweep.")

_OF_A_JOB = ("job", "compare.", "case-study.", "sweep.", "privacy.ledgers")  # no number depends on these


class ConfigError(ValueError):
    """A configuration that cannot run, told in one sentence."""


class RunConfig(Table):
    """Everything that decides a run."""

    job: Literal["case-study", "train", "compare", "sweep"]
    """The whole comparison of the paper's case study; one federated training; one task under several
    strategies; or every combination of some values of some keys."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Key of every random draw."""
    results: str
    """Absolute folder of the run; empty: ~/fedlam-runs/<job>."""
    resume: bool
    """Continue the killed run in ``results`` from its last saved round."""
    task: Annotated[str, Field(min_length=1)]
    """What is learned: a name in ``fedlam_app/tasks`` (`fedlam ls`)."""
    strategy: Annotated[str, Field(min_length=1)]
    """Who trains where and what is averaged: a name in ``strategies`` (`fedlam ls`)."""
    device: Literal["auto", "cpu", "cuda"]
    """Where tensors live; auto takes CUDA where there is one."""
    data: DataConfig
    text: TextConfig
    mixture: MixtureConfig
    model: ModelConfig
    train: TrainConfig
    split: SplitConfig
    wire: WireConfig
    server: ServerConfig
    robust: RobustConfig
    fedbuff: AsyncConfig
    privacy: PrivacyConfig
    faults: FaultsConfig
    fleet: FleetConfig
    wireless: WirelessConfig
    selection: SelectionConfig
    federation: FederationConfig
    case_study: CaseStudyConfig
    compare: CompareConfig
    sweep: SweepConfig


def _text(value: object) -> Scalar:
    """Render a field as Flower's scalar: a tuple becomes its comma list."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    assert isinstance(value, bool | int | float | str)
    return value


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Join the keys of nested tables with dots, as Flower does."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@functools.cache
def _defaults() -> Mapping[str, Scalar]:
    # A wheel carries the file inside the package; in a checkout and in Flower's copy it is beside it.
    package = Path(__file__).resolve().parent
    for path in (package / "pyproject.toml", package.parent / "pyproject.toml"):
        if path.is_file():
            table = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
            return types.MappingProxyType(flatten(table))  # type: ignore[arg-type]
    raise ConfigError(f"no pyproject.toml with the default configuration in {package} or {package.parent}")


def defaults() -> dict[str, Scalar]:
    """Return every key with its default, flat, from the project's ``pyproject.toml``."""
    return dict(_defaults())


def parse(flat: Mapping[str, Scalar]) -> RunConfig:
    """Return the run that ``flat`` describes over the defaults, or raise :class:`ConfigError`."""
    merged = defaults()
    for key, value in flat.items():
        if key not in merged:
            raise ConfigError(f"unknown key '{key}'{did_you_mean(key, merged)}")
        merged[key] = value
    tree: dict[str, object] = {}
    for key, value in merged.items():
        table, dot, leaf = key.rpartition(".")
        home = tree.setdefault(table, {}) if dot else tree
        assert isinstance(home, dict)
        home[leaf] = value
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error, RunConfig, merged)) from None
    if broken := rules.broken(config):
        raise ConfigError(broken)
    return config


def to_flat(config: RunConfig) -> dict[str, Scalar]:
    """Return the flat scalars that :func:`parse` turns back into ``config``."""
    return {key: _text(value) for key, value in flatten(config.model_dump(by_alias=True)).items()}


def identity(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return what a run computes, without where and how it executes: equal for a run and its resumption."""
    return {key: value for key, value in flat.items() if not key.startswith(_PLACEMENT)}


def experiment(config: RunConfig) -> str:
    """Return a name (16 hexadecimal digits) of what is computed, whatever job it is a part of.

    Where noise comes from a secret of the device's own, each results folder has a name of its own: another
    run throws other coins. From the run's seed, the same computation is the same anywhere.
    """
    flat = {k: v for k, v in identity(to_flat(config)).items() if not k.startswith(_OF_A_JOB)}
    own = config.results if config.privacy.randomness == "device" else ""
    return hashlib.sha256(json.dumps([flat, own], sort_keys=True).encode()).hexdigest()[:16]


def sampling_rate(config: RunConfig, samples: float) -> float:
    """Return q, the chance of each of a device's ``samples`` to be in a Poisson batch."""
    return config.privacy.sampling_rate or min(1.0, config.train.batch_rows / max(1, samples))


def results_folder(config: RunConfig) -> Path:
    """Return the absolute folder of the run."""
    return rules.results_folder(config)


def describe() -> list[tuple[str, Scalar, str, str]]:
    """Return (key, default, what is allowed, meaning) of every key, in the order of the file."""
    rows = []
    for key, default in defaults().items():
        field = field_of(RunConfig, key)
        meaning = " ".join(str(field.description).split())
        rows.append((key, default, allowed(field.annotation, field.metadata), meaning))
    return rows
