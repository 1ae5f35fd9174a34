"""Combinations that cannot run: values right one by one and wrong together, and paths that lead nowhere.

Each rule is a generator of sentences about one theme; :func:`broken` returns the first sentence, so that
whoever starts a run reads one thing to change, in the configuration's own spelling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedlam_app import rules_privacy, rules_wireless
from fedlam_app.base.axes import read_axes
from fedlam_app.base.registry import did_you_mean

if TYPE_CHECKING:
    from fedlam_app.config import RunConfig

TEXT_TASKS = ("text-classification", "language-modelling")
MIXTURE = "mixture"  # a perceptron on made points: neither channels, nor texts, nor a backbone
TEXT_SOURCES = ("rotten-tomatoes", "imdb", "bbc-news")  # with a name; others are paths, or hub:OWNER/NAME
CAUSAL = ("smollm2", "gpt2", "random-gpt2")  # a token sees itself and what came before it
NOT_CAUSAL = ("minilm", "random", "none")
BLOCKS = {"minilm": 6, "random": 6, "gpt2": 12, "random-gpt2": 12, "smollm2": 30}
_SLACK = 1e-9  # 20 shards of 0.05 are one whole, whatever the rounding


def broken(config: RunConfig) -> str | None:
    """Return what makes ``config`` impossible, in one sentence, or ``None``."""
    own = (_ranges, _repeats, _shards, _partition, _model, _text, _devices, _ranks, _faults, _paths)
    every = (*own, rules_wireless.broken, rules_privacy.broken)
    # What a sweep's keys say together is each experiment's business, as a job 'train' of its own.
    for rule in (_sweep, _paths) if config.job == "sweep" else every:
        for sentence in rule(config):
            return sentence
    return None


def results_folder(config: RunConfig) -> Path:
    """Return the absolute folder of the run: ``results``, or ~/fedlam-runs/<job>."""
    return Path(config.results) if config.results else Path.home() / "fedlam-runs" / config.job


def has_backbone(config: RunConfig) -> bool:
    """Whether the model stands around a transformer: a small channel predictor and a perceptron do not."""
    return config.task in TEXT_TASKS or (about_channels(config) and config.model.name.startswith("llm4cp"))


def about_channels(config: RunConfig) -> bool:
    """Whether ``data`` and ``model.name`` say what is learned from what."""
    return config.task not in TEXT_TASKS and config.task != MIXTURE


def without_backbone(config: RunConfig) -> tuple[str, str]:
    """Return, for a refusal, the key and value that leave no backbone, and what is allowed instead."""
    if config.task == MIXTURE:
        remedy = "the strategy must be one of adapter space that needs no LoRA, such as 'fedavg-lora'"
        return f"'task' = '{MIXTURE}'", remedy
    return f"'model.name' = '{config.model.name}'", "the name must be 'llm4cp-clean' or 'llm4cp'"


def _sweep(config: RunConfig) -> Iterator[str]:
    try:
        read_axes(config.sweep.over)
    except ValueError as error:
        yield str(error)
    if config.privacy.ledgers:
        yield (
            f"'privacy.ledgers' = '{config.privacy.ledgers}' is not allowed with 'job' = 'sweep', whose"
            " experiments would spend each other's budgets; it must be empty"
        )


def _ranges(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not about_channels(config):
        return  # nothing of ``data`` but its cache is used
    for low_key, low, high_key, high in (
        ("data.speed-min-kmh", data.speed_min_kmh, "data.speed-max-kmh", data.speed_max_kmh),
        ("data.snr-train-min-db", data.snr_train_min_db, "data.snr-train-max-db", data.snr_train_max_db),
    ):
        if low > high:
            yield f"'{low_key}' = {low:g} must not be above '{high_key}' = {high:g}"


def _repeats(config: RunConfig) -> Iterator[str]:
    study = config.case_study
    lists: dict[str, tuple[object, ...]] = {
        "data.scenario": config.data.scenarios,
        "case-study.servers": study.servers,
        "case-study.seeds": study.seeds,
        "case-study.competitors": study.competitors,
        "compare.strategies": config.compare.strategies,
        "compare.policies": config.compare.policies,
        "compare.seeds": config.compare.seeds,
    }
    for key, values in lists.items():
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            yield f"'{key}' names {twice[0]} twice; every value may stand there once"


def _shards(config: RunConfig) -> Iterator[str]:
    data, share = config.data, config.data.share
    if not about_channels(config):
        return
    if config.job == "case-study":
        key, servers = "case-study.servers", max(config.case_study.servers)
    else:
        key, servers = "train.devices", config.train.devices
    if servers > data.shards:
        yield (
            f"more servers than shards: '{key}' = {servers}, but 'data.shards' = {data.shards};"
            f" at most {data.shards} servers are allowed, or more shards"
        )
    if data.shards * share > 1 + _SLACK:
        yield (
            f"'data.shards' = {data.shards} with 'data.share' = {share:g} of the users each is"
            f" {data.shards * share:.0%} of them; at most {math.floor(1 / share + _SLACK)} shards are allowed"
        )
    if data.source == "sionna" and data.users * share < 1 - _SLACK:
        yield (
            f"'data.users' = {data.users} with 'data.share' = {share:g} leaves a shard without a user;"
            f" at least {math.ceil(1 / share - _SLACK)} users are needed"
        )


def _partition(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.source != "sionna" or not about_channels(config):
        return
    if data.partition == "scenario" and len(data.scenarios) == 1:
        yield (
            "'data.partition' = 'scenario' needs two scenarios or more;"
            f" 'data.scenario' = '{data.scenario}' names one"
        )
    if data.partition == "speed" and data.speed_min_kmh == data.speed_max_kmh:
        yield f"'data.partition' = 'speed' needs a range of speeds; all are {data.speed_min_kmh:g} km/h"


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.anchor == "ar" and about_channels(config) and model.name != "llm4cp-clean":
        yield (
            f"'model.anchor' = 'ar' is not allowed with 'model.name' = '{model.name}';"
            " it must be 'none', or the name 'llm4cp-clean'"
        )
    if has_backbone(config):
        if model.backbone == "none" and model.tuning == "lora":
            yield (
                "'model.tuning' = 'lora' is not allowed with 'model.backbone' = 'none', which has no linears"
                " to adapt; the tuning must be 'ln', or the backbone another"
            )
        most = BLOCKS.get(model.backbone, model.blocks)
        if model.blocks > most and not model.weights:
            yield (
                f"'model.blocks' = {model.blocks} is not allowed with 'model.backbone' = '{model.backbone}',"
                f" which has {most}; it must be 1 to {most}"
            )
    if config.task == "channel-prediction":
        if model.precision == "float64":
            yield (
                "'model.precision' = 'float64' is not allowed with 'task' = 'channel-prediction', whose data"
                f" are float32; it must be 'float32', or the task {_either(TEXT_TASKS)}"
            )
        if config.split.heads == "frozen":
            yield (
                "'split.heads' = 'frozen' is not allowed with 'task' = 'channel-prediction', whose head"
                " starts at zero and would stay there; it must be 'personal' or 'averaged'"
            )


def _text(config: RunConfig) -> Iterator[str]:
    if config.task not in TEXT_TASKS:
        return
    backbone, text = config.model.backbone, config.text
    if config.task == "language-modelling" and backbone in NOT_CAUSAL:
        yield (
            f"'model.backbone' = '{backbone}' is not allowed with 'task' = 'language-modelling', where a"
            f" token must not see the next one; it must be {_either(CAUSAL)}"
        )
    if config.task == "text-classification" and text.pool == "first" and backbone in CAUSAL:
        yield (
            f"'text.pool' = 'first' is not allowed with 'model.backbone' = '{backbone}', whose first token"
            " sees nothing of the text; it must be 'mean' or 'last'"
        )
    if text.source in TEXT_SOURCES or (text.source.startswith("hub:") and text.source != "hub:"):
        return
    if not Path(text.source).is_absolute():
        yield (
            f"'text.source' = '{text.source}' is not allowed: it must be {', '.join(TEXT_SOURCES)},"
            f" hub:OWNER/NAME or an absolute path{did_you_mean(text.source, TEXT_SOURCES)}"
        )
    elif not Path(text.source).exists():
        yield f"'text.source' = '{text.source}' does not exist; it must name a file or a folder that does"


def _devices(config: RunConfig) -> Iterator[str]:
    train, compare = config.train, config.compare
    if config.job != "case-study" and train.cohort > train.devices:
        yield (
            f"'train.cohort' = {train.cohort} must not be above 'train.devices' = {train.devices};"
            " 0 is all of them"
        )
    if config.job == "compare" and not (compare.strategies and compare.seeds):
        empty = "seeds" if compare.strategies else "strategies"
        yield f"'compare.{empty}' = '' is not allowed: it must be a comma list (not empty)"


def _ranks(config: RunConfig) -> Iterator[str]:
    model, ranks = config.model, config.train.ranks
    if not ranks:
        return
    key = f"'train.ranks' = '{','.join(map(str, ranks))}'"
    if model.tuning != "lora":
        yield (
            f"{key} is not allowed with 'model.tuning' = '{model.tuning}', which has no ranks;"
            " it must be empty"
        )
    if not has_backbone(config):
        what, _ = without_backbone(config)
        yield f"{key} is not allowed with {what}, which has no ranks; it must be empty"
    if max(ranks) != model.rank:
        yield (
            f"{key} with 'model.rank' = {model.rank} is not allowed: the largest must be 'model.rank',"
            f" and is {max(ranks)}"
        )


def _faults(config: RunConfig) -> Iterator[str]:
    faults = config.faults
    if faults.attack == "none":
        return
    least = min(config.case_study.servers) if config.job == "case-study" else config.train.devices
    key = "case-study.servers" if config.job == "case-study" else "train.devices"
    if not 1 <= faults.attackers <= least:
        yield (
            f"'faults.attackers' = {faults.attackers} is not allowed with 'faults.attack' = '{faults.attack}'"
            f" and '{key}' = {least}: it must be 1 to {least}"
        )


def _paths(config: RunConfig) -> Iterator[str]:
    data = config.data
    channels: dict[str, str] = {}
    if about_channels(config):
        channels["data.test-source"] = data.test_source
        if data.source != "sionna":
            channels["data.source"] = data.source
    inputs = channels | {"model.weights": config.model.weights}
    outputs = {"results": config.results, "data.cache": data.cache}
    for key, value in (inputs | outputs).items():
        if value == "" and key != "data.source":
            continue
        path = Path(value)
        # The app runs in a folder of Flower's choice, where a relative path means something else.
        if not path.is_absolute():
            sionna = "'sionna' or " if key == "data.source" else ""
            yield f"'{key}' = '{value}' is not allowed: it must be {sionna}an absolute path"
        elif key in inputs and not path.exists():
            yield f"'{key}' = '{value}' does not exist; it must name a file or a folder that does"
        elif key in channels and path.is_file() and path.suffix != ".npz":
            yield f"'{key}' = '{value}' is not allowed: it must be an .npz file or a folder of .mat files"
        elif key in outputs and path.exists() and not path.is_dir():
            yield f"'{key}' = '{value}' is a file; it must be a folder"


def _either(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(f"'{name}'" for name in names[:-1]), f"'{names[-1]}'"])
