"""Rounds of a fleet in process, what is true of every one of them, and one task and model for many runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.base import Task
from strategies.base import Federation
from strategies.wireless import Wireless

Flat = dict[str, Scalar]

FLEET: Flat = {
    "fleet.profiles": "mixed",
    "fleet.on-share": 0.9,
    "fleet.flops-per-sample": 1e10,  # a batch takes a slow device longer than the deadline
    "wireless.loss": "rayleigh",
    "wireless.radius-m": 800.0,
    "fedbuff.buffer": 2,
    "train.devices": 8,
    "train.cohort": 3,
    "train.local-steps": 2,
    "train.batch-rows": 2,
    "federation.supernodes": 1,
}


@dataclass
class Made:
    """A configuration's task and model, which other configurations of the same strategy share."""

    task: Task
    model: SplitModel


def federation_of(flat: Flat, made: dict[str, Made] | None = None) -> Federation:
    """A federation before its first round; ``made`` holds what was made for its task and strategy before."""
    config = parse(flat)
    known, key = {} if made is None else made, f"{config.task} {config.strategy}"
    if key not in known:
        task = TASKS[config.task](config)
        task.prepare()
        known[key] = Made(task, task.build_model())
    own = known[key]
    return federate(config, "{}", own.task, copy.deepcopy(own.model))


def fleet_of(federation: Federation) -> Wireless:
    fleet = federation.hands.participation
    assert isinstance(fleet, Wireless)
    return fleet


def ordered(grid: InProcessGrid) -> list[int]:
    """The devices that were told to work, as often as they were; a poll asks for no steps."""
    found: list[int] = []
    for message in grid.delivered:
        config: Any = message.content.config_records.get("config", {})
        if config.get("type") in ("TrainOrder", "SplitOrder"):
            works = config["steps"] if config["type"] == "TrainOrder" else config["shown"]
            found += [k for k, work in zip(config["devices"], works, strict=True) if work]
    return found


def run(flat: Flat, made: dict[str, Made] | None, rounds: int) -> tuple[Federation, InProcessGrid]:
    """Run some rounds and hold what is true of every run."""
    federation = federation_of(flat, made)
    grid, seconds = InProcessGrid(app, 1, flat), [0.0]
    for number in range(1, rounds + 1):
        cost = federation.train_round(grid, number)
        assert cost.failures == []
        seconds.append(federation.hands.participation.seconds())
    assert (np.diff(seconds) > 0.0).all()
    assert np.isfinite(federation.algorithm.models()).all()
    said = federation.hands.participation.summary()
    assert said["chosen"] == said["trained"] + said["late"]
    assert said["trained"] == said["arrived"] + said["lost"]
    assert len(ordered(grid)) == said["arrived"]
    return federation, grid


def survives(federation: Federation, flat: Flat, made: dict[str, Made] | None) -> None:
    """What is saved is what is loaded."""
    saved = {key: np.array(value) for key, value in federation.state().items()}
    other = federation_of(flat, made)
    other.load(dict(saved))
    again = other.state()
    assert set(again) == set(saved)
    for key, array in saved.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)
