"""The task of Gaussians: its data by key, its laws, what a line cannot tell, and its runs from end to end."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.utils.flop_counter import FlopCounterMode

from clients.adapter import Worker
from clients.loop import local_steps
from fedlam_app import checks
from fedlam_app.base.schedule import learning_rate
from fedlam_app.client_app import app
from fedlam_app.config import ConfigError, MixtureConfig, RunConfig, Scalar, parse
from fedlam_app.data import mixture as data
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.finish import finish
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder
from fedlam_app.grid import InProcessGrid
from fedlam_app.tasks.mixture import Mixture
from strategies import ALGORITHMS
from tests.tiny import tiny_mixture_run

Flat = dict[str, Scalar]

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_LORA = ["fedavg-lora", "fedavg-full", "fedprox", "local", "central"]
LEARNS: Flat = {  # scenario S1's training, on fewer devices
    "train.devices": 60,
    "train.cohort": 10,
    "train.rounds": 60,
    "train.local-steps": 8,
    "train.batch-rows": 16,
    "train.optimiser": "sgd",
    "train.lr": 0.1,
    "train.clip-norm": 0.0,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def configured(**keys: Scalar) -> RunConfig:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return parse({"job": "train", "task": "mixture", "seed": 7, **named})


def table(**keys: Scalar) -> MixtureConfig:
    return configured(**{f"mixture__{key}": value for key, value in keys.items()}).mixture


# --- data -------------------------------------------------------------------------------------------------


def test_a_devices_data_are_the_same_in_any_process_and_order() -> None:
    code = (
        "import hashlib\n"
        "from fedlam_app.config import parse\n"
        "from fedlam_app.data.mixture import pooled, shard\n"
        "mixture = parse({'job': 'train', 'task': 'mixture'}).mixture\n"
        "arrays = [*shard(mixture, 7, 41, 100), *shard(mixture, 7, 5, 30), *pooled(mixture, 7, 9, 50)]\n"
        "print(hashlib.sha256(b''.join(array.tobytes() for array in arrays)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    mixture = table()
    last = [data.shard(mixture, 7, k, n) for k, n in ((3, 100), (5, 30), (41, 100))][::-1]
    arrays = [*last[0], *last[1], *data.pooled(mixture, 7, 9, 50)]
    assert done.stdout.split() == [hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()]

    forward, back = Mixture(configured()), Mixture(configured())
    batches = {k: forward.batch(k, 3, 1) for k in range(10)}
    for k in reversed(range(10)):
        for ours, theirs in zip(back.batch(k, 3, 1), batches[k], strict=True):
            assert torch.equal(ours, theirs)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_more_devices_change_no_devices_size(few: int, more: int, seed: int) -> None:
    counts = data.examples_of_all(table(), few, seed)
    np.testing.assert_array_equal(counts, data.examples_of_all(table(), few + more, seed)[:few])
    assert counts.min() >= data.LEAST


def test_sizes_are_lognormal() -> None:
    counts = data.examples_of_all(table(examples=400), 100_000, 7)
    logs = np.log(counts)  # the least size is 6 deviations below the median
    assert np.median(counts) == pytest.approx(400, rel=0.01)
    assert logs.std() == pytest.approx(0.5, rel=0.01)
    assert data.examples_of_all(table(examples=1), 100, 7).tolist() == [data.LEAST] * 100
    assert set(data.examples_of_all(table(spread=0.0), 50, 7)) == {100}


@pytest.mark.parametrize("alpha", [0.1, 0.3, 5.0])
def test_shares_of_the_classes_are_dirichlet(alpha: float) -> None:
    """E[q_c] = 1/C, and the variance of a class's count is n q(1-q) in the mean, plus n^2 var(q)."""
    mixture, devices, size = table(dirichlet=alpha), 1500, 200
    shares = np.stack(
        [np.bincount(data.shard(mixture, 7, k, size)[1], minlength=10) / size for k in range(devices)]
    )
    np.testing.assert_allclose(shares.sum(1), 1.0)
    spread = 0.1 * 0.9 / (10 * alpha + 1)  # of Dir(alpha)
    expected = spread + (0.1 * 0.9 - spread) / size
    np.testing.assert_allclose(shares.mean(0), 0.1, atol=5 * np.sqrt(expected / devices))
    assert shares.var(0).mean() == pytest.approx(expected, rel=0.08)


@given(st.floats(1e-300, 1e300), st.integers(16, 60), st.integers(0, 1000))
@settings(max_examples=40)
def test_a_shard_is_whole_whatever_its_key(alpha: float, size: int, device: int) -> None:
    features, labels = data.shard(table(dirichlet=alpha), 3, device, size)
    assert features.shape == (size, 32) and features.dtype == np.float32 and np.isfinite(features).all()
    assert labels.shape == (size,) and labels.min() >= 0 and labels.max() < 10


@pytest.mark.parametrize("noise", [0.2, 1.25, 4.0])
def test_a_feature_has_unit_power_and_the_noise_its_share(noise: float) -> None:
    mixture = table(noise=noise, test=20_000)
    features, labels = data.held_out(mixture, 7)
    assert np.square(features).mean() == pytest.approx(1.0, rel=0.02)
    np.testing.assert_allclose(np.linalg.norm(data.means(mixture, 7), axis=-1), 1.0)
    centres = np.sqrt(32 / (1 + noise**2)) * data.means(mixture, 7)  # (C, G, d)
    nearest = np.stack([((features[:, None] - own) ** 2).mean(2).min(1) for own in centres], 1)  # (n, C)
    own = nearest[np.arange(len(labels)), labels]
    if noise < 1:  # the nearest Gaussian of its class is the one that it comes from
        assert own.mean() == pytest.approx(noise**2 / (1 + noise**2), rel=0.02)
        assert (nearest.argmin(1) == labels).mean() > 0.999
    np.testing.assert_allclose(np.bincount(labels) / 20_000, 0.1, atol=0.01)


@given(st.integers(1, 40), st.integers(1, 3000))
@settings(max_examples=15)
def test_the_pool_is_drawn_from_the_union_of_shards(devices: int, most: int) -> None:
    mixture = table()
    counts = data.examples_of_all(mixture, devices, 5)
    features, labels = data.pooled(mixture, 5, devices, most)
    every = [data.shard(mixture, 5, k, int(n)) for k, n in enumerate(counts)]
    rows = {row.tobytes(): int(y) for x, own in every for row, y in zip(x, own, strict=True)}
    assert len(features) == len({row.tobytes() for row in features}) == min(most, counts.sum())
    assert [rows[row.tobytes()] for row in features] == labels.tolist()


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 90))
@settings(max_examples=30)
def test_a_round_walks_through_the_shard(device: int, round: int, rows: int) -> None:
    """Every example comes once before any comes twice, in an order of the round's own."""
    task = Mixture(configured(train__batch_rows=rows))
    size = task.examples(device)
    steps = -(-3 * size // rows)
    walk = np.concatenate([task.ids(device, round, step) for step in range(steps)])
    assert len(walk) == steps * rows
    for start in range(0, 3 * size, size):
        assert sorted(walk[start : start + size]) == list(range(size))
    assert walk[:size].tolist() != walk[size : 2 * size].tolist()
    batch, features = task.batch(device, round, 0), task.of(device, np.arange(size)).features
    torch.testing.assert_close(batch.features, features[torch.from_numpy(walk[:rows])], rtol=0, atol=0)


def test_central_has_the_batches_of_all_devices_together() -> None:
    devices, central = Mixture(configured()), Mixture(configured(strategy="central"))
    assert central.examples(0) == devices.examples_of_all().sum()
    whole, model = central.batch(0, 2, 1), central.build_model()
    parts = [devices.batch(k, 2, 1) for k in range(10)]
    torch.testing.assert_close(whole.features, torch.cat([part.features for part in parts]))
    losses = [devices.loss(model, part).item() for part in parts]
    weights = [devices.weight(part) for part in parts]
    assert central.loss(model, whole).item() == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


# --- model ------------------------------------------------------------------------------------------------


def test_the_model_is_the_seeds_and_all_of_it_trains() -> None:
    torch.manual_seed(0)
    one, again, other = (Mixture(configured(seed=seed)).build_model() for seed in (7, 7, 8))
    assert one.trainable_share() == 1.0 and not one.server_side()
    assert sum(p.numel() for p in one.parameters()) == 32 * 64 + 64 + 64 * 10 + 10
    for name, p in one.trainable().items():
        assert torch.equal(p, again.trainable()[name]) and not torch.equal(p, other.trainable()[name])


@pytest.mark.parametrize(("features", "hidden", "classes"), [(32, 64, 10), (7, 5, 3)])
def test_the_cost_is_what_torch_counts(features: int, hidden: int, classes: int) -> None:
    keys: Flat = {
        "mixture__features": features,
        "mixture__hidden": hidden,
        "mixture__classes": classes,
    }
    task = Mixture(configured(**keys))
    batch, counter = task.batch(0, 1, 0), FlopCounterMode(display=False)
    with counter:
        task.loss(task.build_model(), batch)
    cost = task.cost()
    assert cost.flops_device * len(batch.targets) == counter.get_total_flops()
    assert (cost.flops_server, cost.elements_embedding, cost.elements_representation) == (0, hidden, hidden)


def test_plain_descent_is_plain_descent() -> None:
    """w <- w - rate (g + decay w), with the rate of the round; one device's eight steps by hand."""
    config = configured(
        train__optimiser="sgd",
        train__lr=0.3,
        train__weight_decay=0.01,
        train__clip_norm=0.0,
        train__local_steps=8,
    )
    task, rate = Mixture(config), learning_rate(0.3, config.train.rounds, 4)
    vector, _ = Worker(config, task).train(Worker(config, task).initial, 3, 4)
    model = task.build_model()
    own = list(model.parameters())
    for step in range(8):
        gradients = torch.autograd.grad(task.loss(model, task.batch(3, 4, step)), own)
        with torch.no_grad():
            for p, gradient in zip(own, gradients, strict=True):
                p -= rate * (gradient + 0.01 * p)
    expected = torch.cat([p.detach().ravel() for p in own]).numpy()
    np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-7)


def test_the_optimiser_makes_a_difference_of_its_own() -> None:
    """AdamW's first step moves every parameter by the rate; plain descent by rate x gradient."""
    moved = {}
    for optimiser in ("adamw", "sgd"):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        train = configured(train__optimiser=optimiser, train__lr=0.1, train__clip_norm=0.0).train
        local_steps(lambda step, p=p: (p * torch.tensor([3.0, 0.5])).sum(), [p], train, 2, 1)
        moved[optimiser] = (p.detach() - torch.tensor([1.0, -2.0])) / -learning_rate(0.1, train.rounds, 2)
    torch.testing.assert_close(moved["adamw"], torch.tensor([1.0, 1.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved["sgd"], torch.tensor([3.0, 0.5]), rtol=1e-4, atol=0)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [name for name in ALGORITHMS if name not in WITHOUT_LORA])
def test_a_strategy_that_needs_a_backbone_is_refused_in_a_sentence(strategy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        checks.check(configured(strategy=strategy))
    said = str(refused.value)
    assert f"'strategy' = '{strategy}'" in said and "'task' = 'mixture'" in said
    assert said.endswith(
        "; the strategy must be one of adapter space that needs no LoRA, such as 'fedavg-lora'"
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "fedit"}, "'strategy' = 'fedit' needs LoRA, and 'task' = 'mixture' has no backbone"),
        ({"job": "case-study"}, "'task' = 'mixture' is not allowed with 'job' = 'case-study'"),
        ({"train.ranks": "4,8"}, "is not allowed with 'task' = 'mixture', which has no ranks"),
        ({"split.device-blocks": 2}, "'split.device-blocks' = 2 is not allowed with 'task' = 'mixture'"),
        ({"model.precision": "float64"}, "'model.precision' = 'float64' is not allowed"),
        ({"mixture.classes": 1}, "'mixture.classes' = 1"),
        ({"mixture.noise": 0.0}, "'mixture.noise' = 0.0"),
        ({"mixture.dirichlet": -0.5}, "'mixture.dirichlet' = -0.5"),
        ({"train.optimiser": "sdg"}, "'train.optimiser' = 'sdg'"),
    ],
)
def test_what_cannot_be_is_refused(keys: Flat, said: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + said.replace(".", r"\.")):
        checks.check(parse({"job": "train", "task": "mixture", **keys}))


def test_channels_texts_and_tuning_are_not_held_against_it() -> None:
    odd: Flat = {
        "data.source": "/nowhere.npz",
        "data.shards": 1,
        "text.source": "nothing",
        "model.name": "gru",
        "model.backbone": "none",
        "model.anchor": "ar",
    }
    for name in WITHOUT_LORA:
        config = parse({"job": "train", "task": "mixture", "strategy": name, **odd})
        checks.check(config)
        checks.check_files(config)


# --- runs -------------------------------------------------------------------------------------------------


def go(flat: Flat, nodes: int = 1, say: Callable[[str], None] = lambda line: None) -> RunFolder:
    flat = {**flat, "federation.supernodes": nodes}
    checks.check(parse(flat))
    folder = RunFolder.open(parse(flat))
    run_cells(InProcessGrid(app, nodes, flat), flat, cells_of(parse(flat)), folder, 1, say)
    return folder


def test_a_federation_learns_what_no_line_can_tell(tmp_path: Path) -> None:
    flat = tiny_mixture_run() | LEARNS | {"results": str(tmp_path), "train.evaluate-every": 30}
    flat |= {"job": "compare", "compare.strategies": "fedavg-lora,linear-probe,majority"}
    flat |= {"mixture.test": 1000, "mixture.noise": 0.9, "mixture.clusters": 4}
    config = parse(flat)
    folder = go(flat)
    finals = {r["cell"]: r for r in folder.read_metrics() if r.get("kind") == "final"}
    ours, line, most = (finals[name]["accuracy"] for name in ("fedavg-lora", "linear-probe", "majority"))
    assert ours > line + 0.05 and line > 0.5 and most < 0.2
    assert finals["fedavg-lora"]["loss"] < finals["linear-probe"]["loss"] < finals["majority"]["loss"]
    rounds = [r["train_loss"] for r in folder.read_metrics() if r["cell"] == "fedavg-lora"]
    assert rounds == sorted(rounds, reverse=True) and rounds[-1] < 0.5 * rounds[0]

    said: list[str] = []
    finish(folder, config, cells_of(config), said.append)
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "Gaussian mixture: strategies compared" in page and "Gaussians a class: 4" in page
    assert "backbone: minilm" not in page.split("<section>")[0]
    assert any("Held-out examples" in line for line in said)
    exported = load_file(folder.path / "adapter" / "device_modules.safetensors")
    assert sum(array.size for array in exported.values()) == 32 * 64 + 64 + 64 * 10 + 10


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown baseline 'ridge'; allowed are majority, linear-probe"):
        Mixture(configured()).baseline("ridge")


@pytest.mark.parametrize("strategy", WITHOUT_LORA)
def test_a_killed_run_goes_on_where_it_was(strategy: str, tmp_path: Path) -> None:
    """... and packing changes no bit: the straight run is on three SuperNodes, the killed one on two."""
    base = tiny_mixture_run() | {"strategy": strategy}
    straight = go({**base, "results": str(tmp_path / "straight")}, 3)

    def kill(line: str) -> None:
        if "round 2" in line:
            raise KeyboardInterrupt

    killed: Flat = {**base, "results": str(tmp_path / "killed")}
    with pytest.raises(KeyboardInterrupt):
        go(killed, 2, kill)
    resumed = go({**killed, "resume": True}, 2)
    last, again = straight.read_metrics()[-1], resumed.read_metrics()[-1]
    keys: tuple[str, ...] = ("round", "accuracy", "loss", "train_loss", "own_loss", "bytes_up", "failures")
    assert {key: last[key] for key in keys} == {key: again[key] for key in keys}
    assert last["failures"] == 0 and last["bytes_up"] > 0 and last["trainable_share"] == 1.0
    first: dict[str, Any] = straight.read_metrics()[0]
    assert last["train_loss"] < first["train_loss"]
    states = [load_file(next((f.path / "state").glob("*.safetensors"))) for f in (straight, resumed)]
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array, err_msg=name)
