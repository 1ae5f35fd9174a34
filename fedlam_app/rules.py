"""Combinations that cannot run: values right one by one and wrong together, and paths that lead nowhere.

Each rule is a generator of sentences about one theme; :func:`broken` returns the first sentence, so that
whoever starts a run reads one thing to change, in the configuration's own spelling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlam_app.config import RunConfig

_SLACK = 1e-9  # 20 shards of 0.05 are one whole, whatever the rounding


def broken(config: RunConfig) -> str | None:
    """Return what makes ``config`` impossible, in one sentence, or ``None``."""
    for rule in (_ranges, _repeats, _shards, _partition, _model, _paths):
        for sentence in rule(config):
            return sentence
    return None


def results_folder(config: RunConfig) -> Path:
    """Return the absolute folder of the run: ``results``, or ~/fedlam-runs/<job>."""
    return Path(config.results) if config.results else Path.home() / "fedlam-runs" / config.job


def _ranges(config: RunConfig) -> Iterator[str]:
    data = config.data
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
    }
    for key, values in lists.items():
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            yield f"'{key}' names {twice[0]} twice; every value may stand there once"


def _shards(config: RunConfig) -> Iterator[str]:
    data, share = config.data, config.data.share
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
    if data.source != "sionna":
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
    if model.anchor == "ar" and model.name != "llm4cp-clean":
        yield (
            f"'model.anchor' = 'ar' is not allowed with 'model.name' = '{model.name}';"
            " it must be 'none', or the name 'llm4cp-clean'"
        )
    if model.name.startswith("llm4cp") and model.backbone == "none" and model.tuning == "lora":
        yield (
            "'model.tuning' = 'lora' is not allowed with 'model.backbone' = 'none', which has no linears to"
            " adapt; the tuning must be 'ln', or the backbone another"
        )


def _paths(config: RunConfig) -> Iterator[str]:
    data = config.data
    channels = {"data.test-source": data.test_source}
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
