"""A Ray cluster of two nodes, as processes: `fedlam run` trains a fleet on both and starts no Ray of its own.

The nodes are what ``ray start`` starts: the head on the host's own address, the other on one of the loopback
(Linux has all of 127/8), each with one CPU and so one actor.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder, read_metrics
from fedlam_app.grid import InProcessGrid
from tests.processes import free_port, processes_in
from tests.tiny import tiny_run

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).parent / "ray"
SECOND = "127.0.0.2"  # the second node's address; Ray replaces 127.0.0.1 by the host's own
PATIENCE_S = 120.0
LEAN = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block")
FREE = ("--min-worker-port=0", "--max-worker-port=0")  # any port: other clusters of this host keep theirs
TIMELINE = """
import json, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(json.dumps([[event["cat"], event["pid"], event["tid"]] for event in ray.timeline()]))
"""

pytestmark = pytest.mark.slow


@dataclass
class Cluster:
    """Two Ray nodes, and where their files are; ``other`` is where a Ray of one's own would put its files."""

    folder: Path
    address: str = ""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def sessions(self) -> Path:
        return self.folder / "ray"

    @property
    def other(self) -> Path:
        return self.folder / "other"

    def start(self, name: str, *options: str) -> str:
        """Start a node and wait until it runs; returns the address that it took."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            node = subprocess.Popen(
                [str(RAY), "start", *options, *LEAN], env=self.env, stdout=out, stderr=subprocess.STDOUT
            )
        self.nodes.append(node)
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (said := log.read_text()):
            assert node.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        found = re.search(r"Local node IP: (\S+)", said)
        assert found, said
        return found[1]

    def worked(self) -> dict[str, set[str]]:
        """The workers of each node, by its address, that carried out messages to clients here."""
        done = subprocess.run(
            [sys.executable, "-c", TIMELINE, self.address],
            env=self.env, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, set[str]] = {}
        for what, node, worker in json.loads(done.stdout):
            if what == "task::ClientAppActor.run":
                found.setdefault(node, set()).add(worker)
        return found

    def stop_the_rest(self) -> list[psutil.Process]:
        """Stop what is left with this Flower home, a SuperLink as a rule; returns what had to be killed."""
        for process in self.processes():
            process.terminate()
        deadline = time.monotonic() + 30.0
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            process.kill()
        return left

    def processes(self) -> list[psutil.Process]:
        """Every process that inherited this Flower home."""
        return processes_in(self.env["FLWR_HOME"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and one more node; all are gone at the end. The folder's name is short, for Ray's sockets."""
    with (tmp_path_factory.getbasetemp().parent / "flower.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one = Cluster(Path(tempfile.mkdtemp(prefix="fedlam")))
        home, port = one.folder / "home", free_port()
        for made in (home, one.other):
            made.mkdir()
        one.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FEDLAM_CACHE": str(one.folder / "cache"),
            "FEDLAM_DEVICES": str(one.folder / "devices"),
            "RAY_TMPDIR": str(one.other),
            "OMP_NUM_THREADS": "1",
        }
        try:
            head = one.start(
                "head",
                *("--head", f"--port={port}", f"--ray-client-server-port={free_port()}"),
                *(f"--temp-dir={one.sessions}", "--include-dashboard=false", *FREE),
            )
            one.address = f"{head}:{port}"
            second = one.start("second", f"--address={one.address}", f"--node-ip-address={SECOND}", *FREE)
            assert second == SECOND != head
            yield one
        finally:
            for node in reversed(one.nodes):  # it stops what it started, but not where that dies under it
                node.terminate()
                try:
                    node.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    node.kill()
            left = one.stop_the_rest()
            shutil.rmtree(one.folder)
        assert not left, f"these did not stop when asked to: {left}"


def test_a_run_with_ray_address_trains_a_fleet_on_the_clusters_nodes_and_equals_the_in_process_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    flat: dict[str, Scalar] = {
        **tiny_run(tmp_path),
        "fleet.profiles": "mixed",
        "fleet.on-share": 1.0,
        "fleet.flops-per-sample": 1e9,
        "train.cohort": 3,
    }
    results = tmp_path / "cluster"
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in flat.items())
    run = subprocess.run(
        [
            *(sys.executable, "-m", "fedlam_app.cli", "run", "--app", str(ROOT), "--supernodes", "2"),
            *("--results", str(results), "--run-config", pairs),
        ],
        env=cluster.env | {"RAY_ADDRESS": cluster.address}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr

    head = cluster.address.split(":")[0]
    assert {node: len(workers) for node, workers in cluster.worked().items()} == {head: 1, SECOND: 1}
    assert len(list(cluster.sessions.glob("session_2*"))) == 1
    assert not list(cluster.other.iterdir()), "the run started a Ray of its own"

    plain = {**flat, "results": str(tmp_path / "plain"), "federation.supernodes": 1}
    folder = RunFolder.open(parse(plain))
    run_cells(InProcessGrid(app, 1, plain), plain, cells_of(parse(plain)), folder, 1, lambda line: None)
    (theirs,), (ours,) = ((path / "state").glob("*.safetensors") for path in (results, folder.path))
    arrays = load_file(theirs)
    assert set(arrays) == set(load_file(ours))
    for key, array in load_file(ours).items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)
    computed = _computed(read_metrics(results))
    assert computed == _computed(read_metrics(folder.path))
    assert computed[-1]["failures"] == 0 and computed[-1]["chosen"] == computed[-1]["arrived"] == 9
    assert float(str(computed[-1]["seconds"])) > 0.0 and float(str(computed[-1]["energy_j"])) > 0.0


def _computed(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """What does not depend on the machine: every measured time ends in _s."""
    return [{k: v for k, v in r.items() if not k.endswith("_s") and k != "peak_rss_bytes"} for r in records]
