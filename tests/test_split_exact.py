"""The split changes where things are computed, not what: it is the unsplit model, and pooled training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlam_app.base import sparse
from fedlam_app.base.keys import seed_of
from fedlam_app.base.split_payload import position
from fedlam_app.base.vectors import pack, unpack
from fedlam_app.base.wire import FORMATS
from fedlam_app.client_app import app
from fedlam_app.config import parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder
from fedlam_app.grid import InProcessGrid
from fedlam_app.models.split import flat as packed
from tests.split_runs import FP32, Flat, Reference, Run, channel_run, text_run, tiny_backbones

__all__ = ["tiny_backbones"]  # a fixture that every test here uses

PATHS: list[Flat] = [
    {"model.backbone": "tiny-bert", "text.pool": "mean"},
    {"model.backbone": "tiny-bert", "text.pool": "first"},
    {"model.backbone": "tiny-llama", "text.pool": "last"},
    {"model.backbone": "tiny-llama", "text.pool": "mean", "model.lora-on": "attention"},
    {"model.backbone": "tiny-gpt2", "text.pool": "last"},
    {"model.backbone": "tiny-llama", "task": "language-modelling", "text.supervise": "all"},
    {"model.backbone": "tiny-gpt2", "task": "language-modelling", "text.supervise": "answer"},
]


def apart(found: NDArray[Any], true: NDArray[Any]) -> float:
    """Return ||found - true|| / ||true||."""
    assert np.linalg.norm(true) > 0.0, "there is nothing to compare"
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


@pytest.mark.parametrize("keys", PATHS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_gradient_equals_that_of_the_unsplit_model(keys: Flat, tmp_path: Path) -> None:
    """Three rounds of two steps: own batch, own head, every LoRA tensor, in double precision."""
    run = Run(text_run(tmp_path, train__rounds=3, train__local_steps=2) | keys, tmp_path)
    run.rounds()
    assert len(run.folds) == 3 * 2 * 4
    reference = Reference(run)
    for fold, true in reference.follow(run.folds):
        parts = reference.tensors(fold.gradient)
        for name, part in reference.tensors(true).items():
            assert np.abs(part).max() > 0.0, f"{name} has no gradient"
            assert np.abs(parts[name] - part).max() <= 1e-9 * np.abs(part).max(), name
    for device, head in reference.heads.items():
        if len(head):
            np.testing.assert_allclose(run.kept(device), head, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-gpt2", "random"])
def test_without_batching_single_precision_is_that_of_the_unsplit_model(
    backbone: str, tmp_path: Path
) -> None:
    flat = text_run(tmp_path, model__backbone=backbone, model__precision="float32", train__rounds=2) | FP32
    run = Run(flat | {"split.batched": False}, tmp_path)
    run.rounds()
    for fold, unsplit in Reference(run).follow(run.folds):
        assert apart(fold.gradient, unsplit) <= 1e-6


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-gpt2", "random"])
def test_single_precision_adds_no_more_than_its_own_rounding(backbone: str, tmp_path: Path) -> None:
    """The server sums in another order than transformers do; neither order is nearer to the truth."""
    flat = text_run(tmp_path, model__backbone=backbone, model__precision="float32", train__rounds=2) | FP32
    run = Run(flat, tmp_path)
    run.rounds()
    truths = [true for _, true in Reference(run, double=True).follow(run.folds)]
    errors = []
    for (fold, unsplit), true in zip(Reference(run).follow(run.folds), truths, strict=True):
        errors.append((apart(fold.gradient, true), apart(unsplit, true)))
        assert apart(fold.gradient, unsplit) < 2e-6
    split, plain = np.mean(errors, axis=0)
    assert split < 1.5 * plain < 3e-6


def test_a_wire_of_single_precision_carries_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings, representations and Jacobians as read from a message are those that were computed."""
    run = Run(text_run(tmp_path, model__precision="float32", train__rounds=1) | FP32, tmp_path)
    outputs, server = [], run.federation.large.backbone
    forward = server.forward
    monkeypatch.setattr(server, "forward", lambda *given: outputs.append(forward(*given)) or outputs[-1])
    run.rounds()
    reference, decode, place_of = Reference(run), FORMATS["fp32"].decode, 0
    came: dict[int, bytes] = {}
    for order, place, down, up in run.payloads():
        device = order.devices[place]
        batch = run.task.batch(device, 1, 0)
        came.setdefault(device, up.embeddings)
        if not order.shown[place]:
            continue
        with torch.no_grad():
            tokens = packed(reference.model.embedding(batch.texts)[0])
        sent = decode(came[device], *tokens.values.shape)
        np.testing.assert_array_equal(sent.view(np.uint32), tokens.values.numpy().view(np.uint32))
        shown = decode(down.representations, len(batch.targets), tokens.values.shape[1])
        made = outputs[0].numpy()[place_of : place_of + len(shown)]
        place_of += len(shown)
        np.testing.assert_array_equal(shown.view(np.uint32), made.view(np.uint32))
        leaf = torch.from_numpy(shown).requires_grad_(True)
        run.task.criterion(reference.model.head(leaf, None), batch).backward()
        assert leaf.grad is not None
        jacobian = decode(up.jacobians, *shown.shape)
        np.testing.assert_array_equal(jacobian.view(np.uint32), leaf.grad.numpy().view(np.uint32))
    assert len(came) == 4 and place_of == len(outputs[0])


def pooled(run: Run) -> tuple[NDArray[Any], NDArray[Any]]:
    """Train the unsplit model on all devices' batches as one: AdamW on LoRA, plain descent on the head."""
    config, task, reference = run.config, run.task, Reference(run)
    lora = list(reference.lora.values())
    unpack(run.start, lora)
    adamw = torch.optim.AdamW(
        lora,
        betas=(config.server.beta_1, config.server.beta_2),
        eps=config.server.epsilon,
        weight_decay=config.train.weight_decay,
    )
    for step in range(1, config.train.rounds * config.train.local_steps + 1):
        at = position(step, config.train.local_steps)
        chosen = [i for k in run.federation.devices for i in task.shards[k][task.ids(k, *at)]]
        reference.model.zero_grad()
        batch = task.collate([task.encoded["train"][i] for i in chosen])
        task.loss(reference.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(lora, config.train.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = reference.rate(config.train.lr, step)
        adamw.step()
        reference.descend(step)
    return pack(lora), pack(reference.modules.values())


POOLED: list[Flat] = [
    {"split.heads": "averaged", "train.rounds": 20},
    {"split.heads": "frozen", "train.rounds": 20, "model.backbone": "tiny-llama"},
    {"task": "language-modelling", "text.supervise": "all", "model.backbone": "tiny-gpt2"},
    {"split.heads": "averaged", "train.rounds": 3, "model.backbone": "minilm", "model.blocks": 1},
]


@pytest.mark.parametrize("keys", POOLED, ids=lambda keys: "-".join(map(str, keys.values())))
def test_the_federation_equals_training_on_the_pooled_batches(keys: Flat, tmp_path: Path) -> None:
    flat = text_run(tmp_path, train__weight_decay=0.01, train__clip_norm=0.3) | keys
    run = Run(flat, tmp_path, supernodes=3)
    run.rounds()
    assert len({fold.weight for fold in run.folds}) > 1, "the batches must be unequal"
    lora, modules = pooled(run)
    assert apart(run.lora, lora) < 1e-10
    assert apart(run.lora, run.start) > 1e-3
    if run.config.split.heads == "averaged":
        assert apart(run.federation.modules.mean, modules) < 1e-10
        assert apart(run.federation.modules.mean, Reference(run).first) > 1e-3


def test_how_devices_are_packed_does_not_change_a_bit(tmp_path: Path) -> None:
    flat = text_run(tmp_path, train__rounds=3, train__local_steps=2)
    runs = [Run(flat, tmp_path, supernodes=nodes) for nodes in (1, 2, 4)]
    for run in runs:
        run.rounds()
        np.testing.assert_array_equal(run.lora, runs[0].lora)
        for device in range(4):
            np.testing.assert_array_equal(run.kept(device), runs[0].kept(device))
    assert not np.array_equal(runs[0].kept(0), runs[0].kept(1)), "heads are personal"


# --- links that round, and links that remember ------------------------------------------------------


def test_top_k_sends_late_and_loses_nothing(tmp_path: Path) -> None:
    """Sample by sample over three epochs: what was decoded, and what is owed, is what was handed in."""
    keys: Flat = {"wire.jacobian": "top-k", "wire.top-k": 0.2, "split.heads": "frozen", "faults.vanish": 0.2}
    run = Run(text_run(tmp_path, train__rounds=12) | keys, tmp_path)
    run.rounds()
    reference, width = Reference(run), run.federation.link.width
    total: dict[tuple[int, int], NDArray[Any]] = {}
    for order, place, down, up in run.payloads():
        device, step = order.devices[place], order.shown[place]
        if step:
            batch, ids = run.task.batch(device, step, 0), run.task.ids(device, step, 0)
            shown = FORMATS["fp64"].decode(down.representations, len(batch.targets), width)
            leaf = torch.from_numpy(shown).requires_grad_(True)
            run.task.criterion(reference.model.head(leaf, None), batch).backward()
            decoded = sparse.decode(up.jacobians, *shown.shape, run.config.wire.top_k)
            for i, given, sent in zip(ids.tolist(), leaf.grad.numpy(), decoded, strict=True):
                assert np.count_nonzero(sent) <= 7
                total[device, i] = total.get((device, i), 0.0) + given - sent
    assert len(total) == 64
    for device in range(4):
        owed = run.memory.load(device, run.federation.known[device])
        for i, rest in ((i, rest) for (k, i), rest in total.items() if k == device):
            np.testing.assert_allclose(owed[f"owed.{i}"][0], rest, rtol=1e-4, atol=1e-7)
            assert np.abs(rest).max() > 0.0


@pytest.mark.parametrize("form", ["int8", "fp64"])
def test_delta_coding_keeps_both_ends_alike_bit_for_bit(form: str, tmp_path: Path) -> None:
    keys: Flat = {"wire.delta": True, "wire.representation": form, "train.rounds": 9, "faults.vanish": 0.2}
    run = Run(text_run(tmp_path) | keys, tmp_path)
    run.rounds()
    seen = run.federation.link._seen
    assert len(seen) > 56, "some never answered"
    for (device, i), rows in seen.items():
        kept = run.memory.load(device, run.federation.known[device])
        np.testing.assert_array_equal(kept[f"seen.{i}"], rows)
    plain = Run(text_run(tmp_path) | keys | {"wire.delta": False}, tmp_path)
    plain.rounds()
    assert apart(run.lora, plain.lora) < (1e-12 if form == "fp64" else 0.05)


@pytest.mark.parametrize("form", ["fp16", "bf16", "int8", "int4"])
def test_coarse_wires_point_the_same_way(form: str, tmp_path: Path) -> None:
    links = {f"wire.{link}": form for link in ("embedding", "representation", "jacobian")}
    exact, coarse = (Run(text_run(tmp_path) | keys, tmp_path) for keys in ({}, links))
    for run in (exact, coarse):
        assert not any(cost.failures for cost in run.rounds())
    assert np.isfinite(coarse.lora).all() and len(coarse.folds) == len(exact.folds)
    first = zip(exact.folds[:4], coarse.folds[:4], strict=True)
    for one, other in ((a.gradient, b.gradient) for a, b in first):
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert cosine > {"fp16": 0.99999, "bf16": 0.9995, "int8": 0.999, "int4": 0.85}[form]


def test_token_ids_give_the_gradients_of_exact_embeddings(tmp_path: Path) -> None:
    flat = text_run(tmp_path, model__precision="float32") | FP32
    runs = [Run({**flat, "wire.embedding": form}, tmp_path) for form in ("fp32", "token-ids")]
    for run in runs:
        run.rounds()
    for one, other in zip(runs[0].folds, runs[1].folds, strict=True):
        np.testing.assert_array_equal(one.gradient, other.gradient)


# --- channels: an embedding that trains -------------------------------------------------------------


@pytest.mark.parametrize("model", ["llm4cp-clean", "llm4cp"])
def test_an_embedding_that_trains_descends_as_if_it_were_whole(model: str, tmp_path: Path) -> None:
    """One step: the LoRA gradient, and the device's modules after dL/dE came back to them."""
    run = Run(channel_run(tmp_path, train__rounds=1, train__local_steps=1, model__name=model), tmp_path)
    run.rounds()
    reference = Reference(run)
    for fold in run.folds:
        torch.manual_seed(seed_of(run.config.seed, "dropout", fold.device, fold.step))
        assert apart(fold.gradient, reference.gradient(fold, reference.first)) < 2e-6
        reference.descend(1)
        moved = pack(reference.modules.values()) - reference.first
        assert apart(run.kept(fold.device) - reference.first, moved) < 1e-4


def test_averaged_modules_of_channels_equal_pooled_descent(tmp_path: Path) -> None:
    """Three steps: every device goes on from the average, embedding and head alike."""
    flat = channel_run(tmp_path, split__heads="averaged", train__rounds=3, train__local_steps=1)
    run = Run(flat, tmp_path)
    run.rounds()
    reference = Reference(run)
    modules = reference.first
    for step in (1, 2, 3):
        steps = [fold for fold in run.folds if fold.step == step]
        after, weights = [], []
        for fold in steps:
            assert apart(fold.gradient, reference.gradient(fold, modules)) < 1e-4
            reference.descend(step)
            after.append(pack(reference.modules.values()).astype(np.float64))
            weights.append(fold.weight)
        modules = np.average(after, axis=0, weights=weights)
    assert apart(run.federation.modules.mean - reference.first, modules - reference.first) < 1e-4


# --- resumption -------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.mark.parametrize("kind", ["text", "channels"])
def test_a_killed_run_resumes_with_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """All but what is measured, and bytes: the server asks for embeddings again, and they are spent again."""
    keys: Flat = {"train.rounds": 3, "train.local-steps": 2, "train.evaluate-every": 1}
    flat = (text_run(tmp_path) if kind == "text" else channel_run(tmp_path)) | keys
    whole = _records({**flat, "results": str(tmp_path / "whole")})

    def kill(line: str) -> None:
        if "round 2" in line:
            raise Stop

    killed: Flat = {**flat, "results": str(tmp_path / "killed")}
    with pytest.raises(Stop):
        _records(killed, kill)
    assert _records({**killed, "resume": True}) == whole and len(whole) == 4


def _records(flat: Flat, say: Any = lambda line: None) -> list[dict[str, Any]]:
    config = parse(flat)
    folder = RunFolder.open(config)
    run_cells(InProcessGrid(app, 2, flat), flat, cells_of(config), folder, 1, say)
    records = folder.read_metrics()
    return [{k: r[k] for k in r if not k.endswith("_s") and "bytes" not in k} for r in records]
