"""The real thing: `fedlam run` through Flower and Ray, equal to the in-process run bit for bit."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file

from fedlam_app.base.vectors import unpack
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder, read_metrics
from fedlam_app.grid import InProcessGrid
from fedlam_app.models import backbones
from fedlam_app.models.rows import Rows
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.tasks.channel_prediction import ChannelPrediction
from tests.processes import free_port
from tests.tiny import tiny_run, tiny_text_run, write_texts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment with a Flower home and ports of its own; its SuperLink is stopped at the end.

    One worker at a time: Flower gives a SuperLink 15 s to start, and two at once need more on two busy cores.
    """
    ports = [str(free_port()) for _ in range(2)]
    with (tmp_path_factory.getbasetemp().parent / "flower.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield {
            **os.environ,
            "FLWR_HOME": str(tmp_path_factory.mktemp("flower")),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
            "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
            "FEDLAM_CACHE": str(tmp_path_factory.mktemp("cache")),
        }
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "--port" in line and ports[0] in line:
                process.terminate()


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    return tiny_run(tmp_path_factory.mktemp("data"))


def fedlam_run(flat: dict[str, Scalar], results: Path, env: dict[str, str], *options: str) -> tuple[int, str]:
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in flat.items())
    command = [sys.executable, "-m", "fedlam_app.cli", "run", "--app", str(ROOT), "--results", str(results)]
    done = subprocess.run(
        [*command, *options, "--run-config", pairs], env=env, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def test_the_ray_run_equals_the_in_process_run_bit_for_bit(
    flat: dict[str, Scalar], flower: dict[str, str], tmp_path: Path
) -> None:
    results = tmp_path / "ray"
    code, output = fedlam_run(flat, results, flower)
    assert code == 0, output

    plain = {**flat, "results": str(tmp_path / "plain"), "federation.supernodes": 1}
    folder = RunFolder.open(parse(plain))
    run_cells(InProcessGrid(app, 1, plain), plain, cells_of(parse(plain)), folder, 1, lambda line: None)
    (ray_state,) = (results / "state").glob("*.safetensors")
    (plain_state,) = (folder.path / "state").glob("*.safetensors")
    vector = load_file(ray_state)["models"]
    np.testing.assert_array_equal(vector, load_file(plain_state)["models"])

    for made in ("config.json", "metrics.jsonl", "report.html", "adapter/adapter_config.json"):
        assert (results / made).is_file(), made
    assert list((results / "plots").glob("*.png"))
    _check_adapter(flat, results / "adapter", vector[0])


def _check_adapter(flat: dict[str, Scalar], adapter: Path, vector: np.ndarray) -> None:
    """The exported adapter, loaded by PEFT on a fresh backbone, gives the trained backbone's output."""
    from peft import PeftModel

    config = parse(flat)
    trained = ChannelPrediction(config).build_model().eval()
    unpack(vector, trained.trainable().values())
    fresh = backbones.load("random", blocks=1, seed=config.seed).eval()
    loaded = PeftModel.from_pretrained(fresh.model, adapter)
    tokens, _ = trained.embedding(Rows(torch.randn(3, 16, 48, 2)))
    with torch.no_grad():
        ours, theirs = trained.backbone(tokens), loaded(inputs_embeds=tokens).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


COMPARED = ("fedsgd-lora", "median", "fedbuff", "splitlora", "fedit", "flora", "fed-sb", "scaffold")


def test_strategies_over_a_fleet_through_ray_equal_the_in_process_run_bit_for_bit(
    flower: dict[str, str], tmp_path: Path
) -> None:
    """Side by side: models, and all that the fleet, its policy and its clock remember, in each state file."""
    results = tmp_path / "ray"
    compared: dict[str, Scalar] = {
        "job": "compare",
        "compare.strategies": ",".join(COMPARED),
        "compare.seeds": 7,
        "fedbuff.buffer": 2,
        "fleet.profiles": "mixed",
        "fleet.on-share": 1.0,  # of so few devices the usual share would be nobody
        "train.cohort": 3,
        "federation.server-threads": 1,
    }
    texts = tiny_text_run(tmp_path) | compared
    code, output = fedlam_run(texts, results, flower)
    assert code == 0, output

    plain = {**texts, "results": str(tmp_path / "plain"), "federation.supernodes": 3}
    folder = RunFolder.open(parse(plain))
    run_cells(InProcessGrid(app, 3, plain), plain, cells_of(parse(plain)), folder, 1, lambda line: None)
    finals = {
        run: {record["cell"]: record for record in read_metrics(path) if record.get("kind") == "final"}
        for run, path in (("ray", results), ("plain", folder.path))
    }
    assert set(finals["ray"]) == set(finals["plain"]) == set(COMPARED)
    for name in COMPARED:
        state = f"state/{name}-seed7.safetensors"
        ours, theirs = load_file(results / state), load_file(folder.path / state)
        assert set(ours) == set(theirs)
        assert {"fleet.world.now_s", "fleet.history.count", "fleet.policy.participation"} <= set(ours)
        assert ours["fleet.own.now"] > 0.0
        for key, array in ours.items():
            np.testing.assert_array_equal(array, theirs[key], err_msg=f"{name}: {key}")
        for key in ("accuracy", "loss", "train_loss", "own_loss", "failures", "seconds"):
            assert finals["ray"][name][key] == finals["plain"][name][key], f"{name}: {key}"
        assert finals["ray"][name]["failures"] == 0


def test_a_damaged_file_is_refused_before_ray_starts(
    flat: dict[str, Scalar], flower: dict[str, str], tmp_path: Path
) -> None:
    channels = dict(np.load(str(flat["data.source"])))
    channels["H"][3, 2, 1] = np.nan
    np.savez(tmp_path / "nan.npz", **channels)
    bad = {**flat, "data.source": str(tmp_path / "nan.npz")}
    code, output = fedlam_run(bad, tmp_path / "results", flower)
    assert code == 2
    assert "nan.npz" in output and "NaN" in output and "Successfully started run" not in output


def test_a_failed_run_exits_with_one_and_says_why(
    flat: dict[str, Scalar], flower: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "channels").write_text("a file where the cache wants a folder")
    broken = {**flat, "data.source": "sionna", "data.cache": str(tmp_path)}
    code, output = fedlam_run(broken, tmp_path / "results", flower)
    assert code == 1
    assert str(tmp_path / "channels") in output and "is finished:failed" in output


PRIVATE: dict[str, dict[str, Scalar]] = {
    "devices": {"sweep.over": "privacy.mechanism=dp-sgd,client; strategy=fedit,ffa-lora"},
    "secure": {"sweep.over": "strategy=ffa-lora", "privacy.mechanism": "client", "privacy.secure": True},
    "cut": {
        "sweep.over": "privacy.mechanism=jacobian,logit,randomised-response,server-dp-sgd,release-once",
        "strategy": "fedsgd-lora",
        "split.heads": "frozen",
        "privacy.dimensions": 4,
        "federation.server-threads": 1,
    },
}


@pytest.mark.parametrize("mechanisms", PRIVATE)
def test_private_runs_through_ray_equal_the_in_process_run_and_its_ledgers(
    mechanisms: str, flower: dict[str, str], tmp_path: Path
) -> None:
    texts = tiny_text_run(tmp_path)
    public = str(write_texts(tmp_path / "public.jsonl", 40))
    flat = texts | {"job": "sweep", "privacy.public-texts": public} | PRIVATE[mechanisms]
    results = tmp_path / "ray"
    code, output = fedlam_run(flat, results, flower)
    assert code == 0, output
    assert "NOT covered" in output

    plain = {**flat, "results": str(tmp_path / "plain"), "federation.supernodes": 3}
    cells, folder = cells_of(parse(plain)), RunFolder.open(parse(plain))
    run_cells(InProcessGrid(app, 3, plain), plain, cells, folder, 1, lambda line: None)
    for cell in cells:
        state = f"state/{cell.key}.safetensors"
        ours, theirs = load_file(results / state), load_file(folder.path / state)
        np.testing.assert_array_equal(ours["models"], theirs["models"], err_msg=cell.key)
        book = json.loads((results / "privacy" / f"{cell.key}.json").read_text(encoding="utf-8"))
        assert book == json.loads((folder.path / "privacy" / f"{cell.key}.json").read_text(encoding="utf-8"))
        assert set(book["ledgers"]) == {"0", "1", "2", "3"}
        spent = [Ledger.from_json(json.dumps(own)).epsilon for own in book["ledgers"].values()]
        assert all(7.99 <= epsilon <= 8.0 + 1e-9 for epsilon in spent), cell.key
