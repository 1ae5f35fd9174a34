"""What the fleet's benchmarks share: a run over a fleet, scored as it goes, and when it reached a target."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from flwr.app import Message

from benchmarks.split_scale import own_devices
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.tasks import TASKS

# Scenario S1: a thousand devices whose computers differ more than their radios.
S1: dict[str, Scalar] = {
    "job": "train",
    "task": "mixture",
    "strategy": "fedavg-full",
    "train.devices": 1000,
    "train.cohort": 20,
    "train.rounds": 300,
    "train.local-steps": 8,
    "train.batch-rows": 16,
    "train.optimiser": "sgd",
    "train.lr": 0.1,
    "train.clip-norm": 0.0,
    "fleet.profiles": "lognormal",
    "fleet.gflops": 6.0,
    "fleet.spread": 1.0,
    "fleet.flops-per-sample": 0.9e9,
    "fleet.update-mb": 1.6,
    "wireless.interference-db": 0.0,
    "federation.supernodes": 1,
}


@dataclass
class Course:
    """A run: virtual seconds and test accuracy after every scored round, and what the fleet says at last."""

    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    fleet: dict[str, float] = field(default_factory=dict)

    def reached(self, target: float) -> float:
        """Return the virtual seconds at which the accuracy first was ``target``; inf where it never was."""
        over = np.flatnonzero(np.array(self.accuracy) >= target)
        return self.seconds[over[0]] if len(over) else float("inf")

    def end(self, last: int = 20) -> float:
        """Return the mean accuracy of the last scored rounds."""
        return float(np.mean(self.accuracy[-last:]))


def run(
    overrides: Mapping[str, Scalar], every: int = 1, until: Callable[[Course], bool] | None = None
) -> Course:
    """Run a federation in this process through real messages, scoring every few rounds."""
    from fedlam_app.client_app import app

    config = parse(overrides)
    task = TASKS[config.task](config)
    task.prepare()
    course = Course()
    with own_devices():
        federation = federate(config, "{}", task, task.build_model())
        grid = InProcessGrid(app, config.federation.supernodes, dict(overrides))
        for number in range(1, config.train.rounds + 1):
            federation.train_round(grid, number)
            if number % every and number < config.train.rounds:
                continue
            (table,) = federation.evaluate(grid, task.chunks("test"), 0)
            course.seconds.append(federation.seconds())
            course.accuracy.append(float(task.metrics("test", table)["accuracy"]))
            if until is not None and until(course):
                break
    course.fleet = {**federation.hands.participation.summary(), "computed": _computed(grid.delivered)}
    return course


def _computed(delivered: Sequence[Message]) -> int:
    """Return how many devices' local training was really run, by the orders that went out; a poll is none."""
    orders = [message.content.config_records["config"] for message in delivered if message.has_content()]
    steps = [order["steps"] for order in orders if order["type"] == "TrainOrder"]
    return sum(count > 0 for own in steps for count in cast(list[int], own))


def main() -> None:
    """Print one run of S1 with the overrides given as JSON."""
    import sys

    course = run({**S1, **json.loads(sys.argv[1])})
    print(json.dumps({"seconds": course.seconds, "accuracy": course.accuracy, "fleet": course.fleet}))


if __name__ == "__main__":
    main()
