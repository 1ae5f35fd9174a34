"""How light a device is, how far one machine goes, and what an exchange costs beyond its work.

All with MiniLM's six blocks on Rotten Tomatoes and the default wire, one thread on either side.

* Device: CPU time of the devices' part of a step over that of the backbone, 8 devices with 16 texts each,
  median over steps; with the embeddings of new texts (first epoch) and without (later epochs).
* Scale: a whole run of 100 devices, 8 a round, 5 rounds, both evaluations included, in a process of its own:
  its CPU time from start to end, and its peak memory.
* Overhead: `fedlam run` through Flower and Ray with two SuperNodes: wall time of a round's one exchange
  beyond the CPU time of the slowest SuperNode, mean over the rounds after the first five. The option
  --without-ray leaves it out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.own_flower import own_flower
from benchmarks.record import Figure, write_result
from fedlam_app.base.store import cache_root
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.track import read_metrics

SEED = 2025
BASE: dict[str, Scalar] = {
    "job": "train",
    "seed": SEED,
    "task": "text-classification",
    "strategy": "fedsgd-lora",
    "train.batch-rows": 16,
    "train.local-steps": 1,
    "federation.server-threads": 1,
}
EPOCH = 4  # steps of an epoch of the device's figure
LIGHT = {
    **BASE,
    "text.train": EPOCH * 8 * 16,
    "train.devices": 8,
    "train.rounds": 2 * EPOCH,
    "federation.supernodes": 1,
}
LARGE = {**BASE, "train.devices": 100, "train.cohort": 8, "train.rounds": 5}
WARM, RAY_ROUNDS = 5, 20
RAY = {
    **BASE,
    "text.train": 1024,
    "text.test": 64,
    "train.devices": 8,
    "train.batch-rows": 8,
    "train.rounds": RAY_ROUNDS,
    "train.evaluate-every": WARM,
    "federation.supernodes": 2,
}
WHOLE_RUN = """
import json, resource, sys, time
from benchmarks.cells import run_cell
run_cell(json.loads(sys.argv[1]))
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
peak = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
kilobytes = peak[0] if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([time.process_time(), 1024 * kilobytes]))
"""  # ru_maxrss would count the parent's memory at the fork too


def main() -> int:
    """Measure, write ``results/split_scale.json``; 0 where every bound holds."""
    figures = [*scale(), *lightness()]
    if "--without-ray" not in sys.argv:
        figures.append(overhead())
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.bound}")
    write_result("split_scale", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


def lightness() -> list[Figure]:
    """Devices' CPU time of a step over the backbone's."""
    import torch

    from fedlam_app.client_app import app
    from fedlam_app.experiments.federate import federate
    from fedlam_app.grid import InProcessGrid
    from fedlam_app.tasks import TASKS

    torch.set_num_threads(1)
    with own_devices():
        config = parse(LIGHT)
        task = TASKS[config.task](config)
        federation = federate(config, "{}", task, task.build_model())
        grid = InProcessGrid(app, 1, LIGHT)
        costs = [federation.train_round(grid, number) for number in range(1, config.train.rounds + 1)]
    shares = [100 * cost.cpu_s / cost.server_cpu_s for cost in costs]
    server_s = statistics.median(cost.server_cpu_s for cost in costs)
    device_s = statistics.median(cost.cpu_s for cost in costs[EPOCH:]) / config.train.devices
    # The first step loads what libraries load when first used; the last of an epoch embeds nothing.
    new, again = statistics.median(shares[1 : EPOCH - 1]), statistics.median(shares[EPOCH:])
    return [
        Figure("split", "devices' CPU / backbone's, later epochs", again, "%", "<= 1"),
        Figure("split", "devices' CPU / backbone's, with new texts to embed", new, "%", "<= 1"),
        Figure("split", "one device's step of 16 texts", 1e3 * device_s, "ms CPU"),
        Figure("split", "the backbone's step of 128 texts", server_s, "s CPU"),
    ]


def scale() -> list[Figure]:
    """CPU time and memory of the run with 100 devices."""
    with own_devices():
        command = [sys.executable, "-c", WHOLE_RUN, json.dumps(LARGE)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cpu_s, peak_bytes = json.loads(done.stdout.splitlines()[-1])
    name = "100 devices, 8 a round, 5 rounds"
    return [
        Figure("split", f"{name}: CPU from start to end", cpu_s / 60, "min", "<= 3"),
        Figure("split", f"{name}: peak memory", peak_bytes / 1e9, "GB", "<= 2"),
    ]


def overhead() -> Figure:
    """Wall time of an exchange through Flower and Ray beyond the devices' work."""
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in RAY.items())
    with own_devices(), tempfile.TemporaryDirectory() as folder, own_flower(Path(folder) / "flower") as own:
        env = {**os.environ, **own, "FEDLAM_CACHE": str(cache_root(""))}
        results = Path(folder) / "run"
        command = [str(Path(sys.executable).with_name("fedlam")), "run", "--results", str(results)]
        subprocess.run([*command, "--run-config", pairs], check=True, env=env)
        spent = {int(str(r["round"])): float(str(r["overhead_s"])) for r in read_metrics(results)}
    mean_s = (spent[RAY_ROUNDS] - spent[WARM]) / (RAY_ROUNDS - WARM)
    return Figure("split", "a round through Flower and Ray beyond its work", 1e3 * mean_s, "ms", "<= 150")


@contextmanager
def own_devices() -> Iterator[None]:
    """Keep the devices' memory in a folder of its own for a while."""
    before = os.environ.get("FEDLAM_DEVICES")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_DEVICES"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["FEDLAM_DEVICES"]
            else:
                os.environ["FEDLAM_DEVICES"] = before


if __name__ == "__main__":
    sys.exit(main())
