"""What 100,000 devices cost Flower: rounds of 1,000 of them, on two SuperNodes, with a model of 1.6 MB.

A real Flower run (SuperLink, Ray, two SuperNodes), started by ``flwr run`` on a small app of this file:

* ServerApp: two federations of FedAvg, of 1,000 and of 100,000 devices, in one process, round by round in
  turn, so that whatever else the machine does falls on both. Each is a wireless fleet (mixed profiles, drift
  plus penalty, synchronous, min-max bandwidth), of which 1,000 devices take part in every round: all of them
  can be reached, so that the smaller fleet has as many. Every round ends with its state in a file.
* ClientApp: a trivial device answers with where it started plus a number of its own, through the real records
  and sums; these are work of the backend, and part of the time of a round.

Time of a round: wall time of ``train_round``, from mobility to the new model and the queues, median; its
parts, and the state's arrays and file, are figures of their own. Memory: resident memory of the ServerApp's
process after the first rounds of the larger federation, less that after the first rounds of the smaller one:
everything that the additional 99,000 devices brought with them.

One message a device: the same rounds of a smaller model, 1,000 SuperNodes with a device each and every vector
sent as it is, in process; the largest difference of the models over their largest value.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.fleet_speed import Seconds, watch
from benchmarks.own_flower import own_flower
from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.base.packing import Answer, gathered
from fedlam_app.base.records import TrainOrder, decode, reply
from fedlam_app.base.vectors import pack
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.track import RunFolder
from fedlam_app.models.factors import layout_of
from fedlam_app.tasks.mixture import Mixture
from strategies.adapter_round import AdapterFederation
from strategies.base import Cost
from strategies.fedavg_lora import FedAvgLora
from strategies.fleet_hands import on_air
from strategies.wireless import Wireless

SEED = 2025
FEW, MANY, COHORT = 1_000, 100_000, 1_000
WIDE, NARROW = 5_970, 149  # hidden units: 400,000 values or 1.6 MB, and 40 kB for one message a device
WARM, ROUNDS = 3, 15
APP = """
from benchmarks import flower_scale

server = flower_scale.server
client = flower_scale.client
"""
PROJECT = """
[project]
name = "flower-scale"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlam"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
result = ""
"""

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer for every device of a ``TrainOrder`` with its start plus a number of its own."""
    order = decode(message.content, TrainOrder)
    started = time.process_time()
    moved: dict[int, float] = {k: rng(SEED, "move", k).standard_normal() for k in order.devices}

    def answers() -> Iterator[Answer]:
        for k, factor in zip(order.devices, order.factors, strict=True):
            vector = order.vectors + np.float32(moved[k])
            weight = factor * (1.0 + k % 7)
            yield Answer(k, vector, weight, abs(moved[k]), abs(moved[k]) * len(vector) ** 0.5)

    report = gathered(order, answers())
    return reply(replace(report, cpu_s=time.process_time() - started), message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run both federations in turn and write what they took."""
    import psutil

    process, folder = psutil.Process(), Path(str(context.run_config["result"])).parent
    few = federation(FEW, WIDE, 2)
    for number in range(1, WARM + 1):
        one_round(grid, few, number, folder)
    before = process.memory_info().rss
    many = federation(MANY, WIDE, 2)
    for number in range(1, WARM + 1):
        one_round(grid, many, number, folder)
    grown = process.memory_info().rss - before
    seconds = watched(many)
    found: dict[str, list[float]] = {"few": [], "many": [], "state": [], "devices": [], "messages": []}
    for number in range(WARM + 1, WARM + ROUNDS + 1):
        round_s, _, _ = one_round(grid, few, number, folder)
        found["few"].append(round_s)
        round_s, state_s, cost = one_round(grid, many, number, folder)
        found["many"].append(round_s)
        found["state"].append(state_s)
        found["devices"].append(cost.waited_s)
        found["messages"].append(cost.exchange_s - cost.waited_s)
    tallies = [cast(Wireless, one.hands.participation).tally for one in (few, many)]
    more = {
        "grown": grown,
        "failures": len(few.cost.failures + many.cost.failures),
        "fewest": min(tally.arrived for tally in tallies) / (WARM + ROUNDS),
        "state_bytes": sum(array.nbytes for array in many.state().values()),
    }
    Path(str(context.run_config["result"])).write_text(
        json.dumps({**found, **seconds, **more}), encoding="utf-8"
    )


def one_round(grid: Grid, one: AdapterFederation, number: int, folder: Path) -> tuple[float, float, Cost]:
    """Run a round and save its state; return the wall time [s] of each, and the round's cost."""
    began = time.monotonic()
    cost = one.train_round(grid, number)
    trained = time.monotonic()
    RunFolder(folder).save_state(f"of-{len(one.devices)}", one.state(), {"round": number})
    return trained - began, time.monotonic() - trained, cost


def watched(one: AdapterFederation) -> Seconds:
    """Return where the wall time of a federation's parts will be noted."""
    seconds: Seconds = defaultdict(list)
    world = cast(Wireless, one.hands.participation)
    for owner, names in (
        (world.fleet, ("advance",)),
        (world.policy, ("select",)),
        (world, ("offered", "turn", "settle")),
        (one, ("_load", "_order", "_take_sums")),
    ):
        for name in names:
            watch(owner, name, seconds, time.monotonic)
    return seconds


def federation(
    devices: int, hidden: int, supernodes: int, rule: type[FedAvgLora] = FedAvgLora
) -> AdapterFederation:
    """Return a FedAvg of a perceptron over a fleet, of which ``COHORT`` devices take part in a round."""
    flat: dict[str, Scalar] = {
        "job": "train",
        "task": "mixture",
        "mixture.features": 56,
        "mixture.hidden": hidden,
        "seed": SEED,
        "train.devices": devices,
        "train.cohort": COHORT,
        "federation.supernodes": supernodes,
        "fleet.profiles": "mixed",
        "fleet.on-share": 1.0,  # and within a smaller cell: the small fleet needs all of its devices
        "wireless.radius-m": 150.0,
        "wireless.band-mhz": float(COHORT),
        "fleet.flops-per-sample": 0.1e9,
    }
    config = parse(flat)
    algorithm, task = rule(config), Mixture(config)
    model, examples = task.build_model(), task.examples_of_all().astype(np.float64)
    ids = list(range(devices))
    algorithm.init(pack(model.trainable().values()), ids, layout_of(model, 1.0))
    hands = on_air(config, algorithm, task, model, examples)
    return AdapterFederation(algorithm, "{}", ids, config.federation, hands)


class OneByOne(FedAvgLora):
    """FedAvg for which every vector travels."""

    linear = False


def through_flower() -> dict[str, Any]:
    """Run the app on Flower and return what its ServerApp measured."""
    import subprocess

    from fedlam_app.launch import environment

    with tempfile.TemporaryDirectory() as folder, own_flower(Path(folder) / "flower") as own:
        app = Path(folder) / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (app / "app.py").write_text(APP, encoding="utf-8")
        result = Path(folder) / "result.json"
        env = {**environment(), **own, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [str(Path(sys.executable).with_name("flwr")), "run", str(app), "--stream"]
        command += ["--run-config", f'result="{result}"']
        command += ["--federation-config", "num-supernodes=2 client-resources-num-cpus=1"]
        subprocess.run(command, check=True, env=env)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def one_by_one() -> float:
    """Return how far rounds of sums are from rounds of one message a device, relative to the model."""
    from fedlam_app.grid import InProcessGrid

    models = []
    for rule, nodes in ((FedAvgLora, 2), (OneByOne, COHORT)):
        one = federation(FEW, NARROW, nodes, rule)
        for number in (1, 2):
            one.train_round(InProcessGrid(client, nodes, {}), number)
        models.append(one.algorithm.models()[0].astype(np.float64))
    return float(np.abs(models[0] - models[1]).max() / np.abs(models[1]).max())


def main() -> int:
    """Measure, write ``results/flower_scale.json``; 0 where every bound holds."""
    found = through_flower()
    each = {name: float(np.median(times)) for name, times in found.items() if isinstance(times, list)}
    # Once for each SuperNode: of a round, the sum.
    orders, sums = (float(np.sum(found[name])) / ROUNDS for name in ("_order", "_take_sums"))
    few, many = each["few"], each["many"]
    what = f"{COHORT:,} of {MANY:,} devices, 1.6 MB each, 2 SuperNodes"
    per_fleet = float(found["grown"]) * 100_000 / (MANY - FEW) / 1e6
    parts = {
        f"the slower SuperNode's CPU, {COHORT // 2} answers": each["devices"],
        "messages, and waiting for them": each["messages"] - sums,
        "the fleet, mobility to queues": each["turn"] + each["settle"],
        "orders": orders,
        "sums": sums,
    }
    figures = [
        Figure("wireless", f"a round of {what}, trivial clients", many, "s", "<= 1.5"),
        *(Figure("wireless", f"of it {name}", value, "s") for name, value in parts.items()),
        Figure("wireless", f"a round among {MANY:,} devices / among {FEW:,}", many / few, "x", "<= 1.2"),
        Figure("wireless", "sums against one message a device, relative", one_by_one(), "", "<= 1e-6"),
        Figure("wireless", "server memory for 100,000 devices", per_fleet, "MB", "<= 50"),
        Figure("wireless", f"state of {MANY:,} devices", found["state_bytes"] / 1e6, "MB"),
        Figure("wireless", "to gather it and write its file, each round", each["state"], "s"),
        Figure("wireless", "devices a round, on average, of the fleet with fewer", found["fewest"], ""),
        Figure("wireless", "devices left out", found["failures"], "", "== 0"),
    ]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    write_result(
        "flower_scale",
        figures,
        seed=SEED,
        extra={"rounds_s": found["many"], "s of each part": each, "cores": os.cpu_count()},
    )
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
