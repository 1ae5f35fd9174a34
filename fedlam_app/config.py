"""One run's configuration: parsed once at the door, typed and frozen below it.

Flower hands an app a flat dictionary of scalars with dotted kebab-case keys (``data.speed-min-kmh``).
:func:`parse` turns it into a :class:`RunConfig`, or raises :class:`ConfigError` with one sentence that names
the key, the value and what is allowed. The defaults live in ``pyproject.toml`` (where Flower reads them) and
nowhere else; what each key means is written under its field here. Lists, for which Flower has no type, are
comma-separated strings.
"""

from __future__ import annotations

import functools
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedlam_app import rules
from fedlam_app.base.registry import did_you_mean
from fedlam_app.base.sentence import allowed, field_of, sentence

Scalar = bool | int | float | str

SMALL_MODELS = ("rnn", "lstm", "gru", "cnn", "transformer")
SCENARIOS = ("uma-nlos", "uma-los", "umi-nlos", "umi-los", "rma-nlos", "rma-los")
CLASSICAL = ("repeat-last", "ar", "pad", "wiener-ar", "ridge")
COMPETITORS = (
    "llm4cp-local",
    *(f"{name}-local" for name in SMALL_MODELS),
    "central",
    "central-small",
    *CLASSICAL,
)

# Where and how a run executes, not what it computes: these may differ when a run is resumed.
_PLACEMENT = ("results", "resume", "federation.")


class ConfigError(ValueError):
    """A configuration that cannot run, told in one sentence."""


def _split(value: object) -> object:
    """Turn ``"1,2,5"`` into ``("1", "2", "5")``; a lone integer is a list of one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",")) if value.strip() else ()
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def _split_integers(value: object) -> object:
    parts = _split(value)
    if not isinstance(parts, tuple):
        return parts
    return tuple(int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts)


def _scenarios(value: str) -> str:
    names = _split(value)
    assert isinstance(names, tuple)
    if not names or not set(names) <= set(SCENARIOS):
        raise ValueError(f"a comma list (not empty) of {', '.join(SCENARIOS)}")
    return ",".join(names)


_Positive = Annotated[int, Field(ge=1)]
_Speed = Annotated[float, Field(ge=0, le=500)]
_Snr = Annotated[float, Field(ge=-50, le=100)]
_Competitor = Literal[COMPETITORS]  # type: ignore[valid-type]


class _Table(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class DataConfig(_Table):
    """What the devices hold: channels, how they are shared out, how noisy they are."""

    source: str
    """``sionna`` (TR 38.901 channels, generated and cached), or the absolute path of an ``.npz`` file or of a
    folder of LLM4CP ``.mat`` files."""
    test_source: str
    """Held-out channels: a path as in ``source``, or empty to split them from the same source, by user."""
    scenario: Annotated[str, AfterValidator(_scenarios)]
    """TR 38.901 scenario and line of sight; a comma list is a mixture in equal parts (sionna only)."""
    duplex: Literal["tdd", "fdd"]
    """Whether the future is on the history's own band (tdd) or on the downlink band beside it (fdd)."""
    users: _Positive
    """Users from whom the devices' shards are drawn."""
    test_users: _Positive
    """Held-out users, never in any shard."""
    speed_min_kmh: _Speed
    """Slowest user [km/h]; speeds are uniform between the two."""
    speed_max_kmh: _Speed
    """Fastest user [km/h]."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Part of the users that one device holds; shards are disjoint."""
    shards: _Positive
    """Shards that exist, one an edge server; the global training loss is over the union of all of them,
    however many take part."""
    partition: Literal["iid", "speed", "scenario"]
    """How users are shared out: at random, sorted by speed, or by scenario."""
    snr_train_min_db: _Snr
    """Lowest SNR of a training history [dB]; drawn uniformly, per user and batch."""
    snr_train_max_db: _Snr
    """Highest SNR of a training history [dB]."""
    snr_test_db: _Snr
    """SNR of every held-out history [dB]."""
    cache: str
    """Absolute folder of what can be made again (channels, converted weights); empty: $FEDLAM_CACHE, or else
    ~/.cache/fedlam."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The parts of the mixture."""
        return tuple(self.scenario.split(","))


class ModelConfig(_Table):
    """What is learned: embedding | frozen backbone + tuned parameters | head."""

    name: Annotated[str, Field(min_length=1)]
    """The predictor: a name in ``fedlam_app/models/predictors.py`` (`fedlam ls`)."""
    backbone: Annotated[str, Field(min_length=1)]
    """Pretrained transformer in the middle of an llm4cp model; ``random`` has its shape with random frozen
    weights, ``none`` joins embedding and head directly. The small models have no backbone and ignore it."""
    blocks: _Positive
    """Transformer blocks kept, from the first."""
    tuning: Literal["lora", "ln"]
    """What trains inside the backbone: low-rank adapters on every linear, or the layer norms."""
    rank: _Positive
    """LoRA rank r."""
    alpha: _Positive
    """LoRA scale: the adapter is multiplied by alpha / r."""
    anchor: Literal["none", "ar"]
    """Forecast to which the model adds a gated residual that starts at zero (llm4cp-clean only)."""
    weights: str
    """Absolute path of the backbone's weights; empty: installed weight package, hub cache, then hub."""


class TrainConfig(_Table):
    """How it is learned."""

    devices: _Positive
    """Edge servers (devices) of the job ``train``; the case study has ``case-study.servers`` instead."""
    rounds: _Positive
    """Federated rounds."""
    local_steps: _Positive
    """Optimiser steps of one device in one round."""
    batch_rows: _Positive
    """Rows in a batch; one row is one antenna of one user."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate of the devices' optimiser."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Decoupled weight decay."""
    clip_norm: Annotated[float, Field(ge=0)]
    """Largest gradient norm; 0 clips nothing."""
    evaluate_every: _Positive
    """Rounds between two evaluations; the last round is always evaluated."""
    evaluate_antennas: _Positive
    """Antennas of each held-out user that the periodic evaluation takes; the final one takes all."""


class FederationConfig(_Table):
    """Where it runs; nothing here changes a number."""

    supernodes: Annotated[int, Field(ge=1, le=1024)]
    """SuperNodes that carry the devices; one Ray actor each is best, so: the CPU cores."""
    side_by_side: Annotated[int, Field(ge=1, le=64)]
    """Experiments of one job that run at the same time, so that one with a single device idles no core."""
    timeout_s: Annotated[float, Field(gt=0)]
    """Wall seconds after which an unanswered round stops the run."""


class CaseStudyConfig(_Table):
    """The paper's case study: numbers of edge servers, seeds, and who they are compared with."""

    servers: Annotated[tuple[_Positive, ...], BeforeValidator(_split_integers), Field(min_length=1)]
    """Numbers of edge servers, comma-separated."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_split_integers), Field(min_length=1)
    ]
    """Seeds, comma-separated; every figure is a mean over them."""
    competitors: Annotated[tuple[_Competitor, ...], BeforeValidator(_split)]
    """Who stands beside the federated model, comma-separated; ``X-local`` trains on each shard alone."""


class RunConfig(_Table):
    """Everything that decides a run."""

    job: Literal["case-study", "train"]
    """One federated training, or the whole comparison of the paper's case study."""
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
    model: ModelConfig
    train: TrainConfig
    federation: FederationConfig
    case_study: CaseStudyConfig


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
