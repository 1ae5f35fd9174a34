"""The exported adapter on a bare backbone is the trained model: under every strategy, by what it scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from fedlam_app.base.registry import pick
from fedlam_app.base.vectors import unpack
from fedlam_app.client_app import app
from fedlam_app.config import RunConfig, Scalar, parse, to_flat
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.federate import federate
from fedlam_app.experiments.finish import export_adapter
from fedlam_app.experiments.track import RunFolder
from fedlam_app.grid import InProcessGrid
from fedlam_app.models import backbones
from fedlam_app.models.export import DEVICE_MODULES
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.base import Task
from strategies import ALGORITHMS
from strategies.base import Federation
from tests.tiny import tiny_run

Flat = dict[str, Scalar]

TEXT: Flat = {
    "job": "train",
    "task": "text-classification",
    "model.backbone": "random",
    "model.blocks": 1,
    "model.rank": 4,
    "model.alpha": 9,  # a scale that is no integer
    "text.train": 24,
    "text.test": 8,
    "text.max-tokens": 12,
    "train.devices": 3,
    "train.rounds": 2,
    "train.local-steps": 1,
    "train.batch-rows": 8,
    "train.lr": 0.02,
    "split.heads": "averaged",
    "split.average-every": 1,
    "federation.server-threads": 1,
}
LM: Flat = {**TEXT, "task": "language-modelling", "model.backbone": "random-gpt2"}


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    own: Flat = {"train.rounds": 2, "split.heads": "averaged", "split.average-every": 1, "train.devices": 2}
    return {**tiny_run(tmp_path_factory.mktemp("data")), **own, "federation.server-threads": 1}


def trained(flat: Flat, results: Path) -> tuple[RunConfig, Federation, InProcessGrid]:
    """Run two rounds in this process, save the state as a run does, and export."""
    flat = {**flat, "results": str(results)}
    config = parse(flat)
    (cell,) = cells_of(config)
    task = task_of(config)
    federation = federate(config, json.dumps(cell.overrides), task, task.build_model())
    grid = InProcessGrid(app, config.federation.supernodes, flat)
    for number in (1, 2):
        assert not federation.train_round(grid, number).failures
    folder = RunFolder.open(config)
    folder.save_state(cell.key, federation.state(), {})
    export_adapter(folder, config, cell)
    return config, federation, grid


def task_of(config: RunConfig) -> Task:
    return pick(TASKS, config.task, "task")(config)  # type: ignore[no-any-return]


def reassembled(config: RunConfig, adapter: Path) -> SplitModel:
    """The initial device modules, a bare backbone, and the files: what a reader of the README gets."""
    from peft import PeftModel

    whole = task_of(parse({**to_flat(config), "split.device-blocks": 0})).build_model()
    if (adapter / "adapter_config.json").is_file():
        text = (adapter / "README.md").read_text(encoding="utf-8")
        (load,) = [line.partition(" = ")[2] for line in text.splitlines() if "backbones.load(" in line]
        bare = eval(load, {"backbones": backbones})
        assert not any(p.requires_grad for p in bare.parameters())
        bare.model = PeftModel.from_pretrained(bare.model, adapter)
        whole.backbone = bare
    if (adapter / DEVICE_MODULES).is_file():
        _, unknown = whole.load_state_dict(load_file(adapter / DEVICE_MODULES), strict=False)
        assert not unknown
    return whole.eval()


def scores(model: SplitModel, config: RunConfig) -> NDArray[np.float64]:
    """What a model scores on every text or user of the test, a row each."""
    task = task_of(config)
    return np.concatenate([task.evaluate(model, chunk, 2) for chunk in task.chunks("test")])


def same(one: NDArray[np.float64], other: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def check(flat: Flat, results: Path) -> tuple[Path, dict[str, Any]]:
    """The files score what the federation's own evaluation does, and not what the start does."""
    config, federation, grid = trained(flat, results)
    adapter = results / "adapter"
    expected = federation.evaluate(grid, task_of(config).chunks("test"), 2)[0]  # the first model's
    same(scores(reassembled(config, adapter), config), expected)
    start = scores(task_of(config).build_model().eval(), config)
    assert np.abs(start - expected)[:, 0].max() > 1e-4
    file = adapter / "adapter_config.json"
    return adapter, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# FedSA-LoRA scores what is not exported (the devices' own B), and fedavg-full has no adapter: see below.
STRATEGIES = [name for name in ALGORITHMS if name not in ("fedsa-lora", "fedavg-full")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_exports_what_it_scores(strategy: str, tmp_path: Path) -> None:
    adapter, config = check({**TEXT, "strategy": strategy}, tmp_path)
    # Entries: FLoRA's two stacks of three devices and what it started afresh; FedEx's two residuals.
    rank = {"flora": 4 + 2 * 3 * 4, "fedex-lora": 4 + 2 * 2 * 4}.get(strategy, 4)
    assert config["r"] == rank and config["lora_alpha"] == 9 / 4 * rank
    assert ("first device" in (adapter / "README.md").read_text(encoding="utf-8")) == (strategy == "local")


@pytest.mark.parametrize("strategy", ["fedsgd-lora", "flora"])
@pytest.mark.parametrize("task", ["channels", "language"])
def test_every_task_exports_what_it_scores(task: str, strategy: str, channels: Flat, tmp_path: Path) -> None:
    check({**(channels if task == "channels" else LM), "strategy": strategy}, tmp_path)


def test_a_stack_of_more_than_full_rank_is_exported_at_full_rank(tmp_path: Path) -> None:
    _, config = check({**TEXT, "strategy": "flora", "model.rank": 60, "model.alpha": 120}, tmp_path)
    assert config["r"] == 384 < 60 + 2 * 3 * 60 and config["lora_alpha"] == 2 * 384


def test_a_cut_inside_the_backbone_exports_the_whole(tmp_path: Path) -> None:
    adapter, _ = check(
        {**TEXT, "strategy": "splitlora", "model.blocks": 2, "split.device-blocks": 1}, tmp_path
    )
    blocks = {name.split(".layer.")[1][0] for name in load_file(adapter / "adapter_model.safetensors")}
    assert blocks == {"0", "1"}


@pytest.mark.parametrize("tuning", ["ln", "full"])
def test_other_tunings_are_exported_by_name(tuning: str, tmp_path: Path) -> None:
    adapter, config = check({**TEXT, "strategy": "fedavg-full", "model.tuning": tuning}, tmp_path)
    assert not config and any(name.startswith("backbone.") for name in load_file(adapter / DEVICE_MODULES))


def test_a_model_without_a_backbone_is_exported_by_name(channels: Flat, tmp_path: Path) -> None:
    adapter, config = check({**channels, "strategy": "fedavg-lora", "model.name": "gru"}, tmp_path)
    assert not config and "PeftModel" not in (adapter / "README.md").read_text(encoding="utf-8")


def test_plain_lora_is_exported_to_the_last_bit(tmp_path: Path) -> None:
    config, federation, _ = trained({**TEXT, "strategy": "fedavg-lora"}, tmp_path)
    task = task_of(config)
    model = task.build_model().eval()
    unpack(federation.algorithm.models()[0], model.trainable().values())
    np.testing.assert_array_equal(
        scores(reassembled(config, tmp_path / "adapter"), config), scores(model, config)
    )


def test_what_stays_on_the_devices_is_not_exported_and_said(tmp_path: Path) -> None:
    """Personal heads; with them, the adapters of the blocks on the device; and FedSA-LoRA's B."""
    flat: Flat = {**TEXT, "strategy": "fedsgd-lora", "split.heads": "personal", "model.blocks": 2}
    for blocks in (0, 1):
        results = tmp_path / str(blocks)
        config, federation, _ = trained({**flat, "split.device-blocks": blocks}, results)
        assert not (results / "adapter" / DEVICE_MODULES).exists()
        text = (results / "adapter" / "README.md").read_text(encoding="utf-8")
        assert "stay on the devices" in text and ("first 1 blocks" in text) == bool(blocks)
        whole = reassembled(config, results / "adapter")
        own = task_of(config).build_model().eval()
        unpack(federation.algorithm.models()[0], own.server_side().values())
        same(scores(whole, config), scores(own, config))  # both with the head that all started from

    config, _, _ = trained({**TEXT, "strategy": "fedsa-lora"}, tmp_path / "b")
    adapter = tmp_path / "b" / "adapter"
    assert "B in here is the one" in (adapter / "README.md").read_text(encoding="utf-8")
    factors = load_file(adapter / "adapter_model.safetensors")
    assert all(not f.any() for name, f in factors.items() if "lora_B" in name)
    assert any(f.any() for f in factors.values())
    assert torch.isfinite(torch.cat([f.ravel() for f in factors.values()])).all()
