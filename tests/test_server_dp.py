"""DP-SGD on the trusted server: exact without noise, bounded with it, and accounted step by step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from clients import split as device_side
from fedlam_app import rules_split
from fedlam_app.base.keys import rng
from fedlam_app.config import Scalar, parse
from fedlam_app.privacy.accounting import Ledger
from fedlam_app.tasks.text import TextTask
from strategies import large_model, link
from strategies.large_model import clipped_sum
from strategies.server_dp import TrustedFederation
from tests.split_runs import Flat, Reference, Run, text_run, tiny_backbones, with_keys

__all__ = ["tiny_backbones"]  # a fixture that every test here uses

INT8: Flat = {f"wire.{part}": "int8" for part in ("embedding", "representation", "jacobian")}
PLAIN: Flat = {"server.optimiser": "sgd", "server.momentum": 0.0, "train.clip-norm": 0.0}


def private_run(folder: Path, **keys: Scalar) -> Flat:
    """Return a tiny run with a trusted server."""
    flat = text_run(folder, privacy__mechanism="server-dp-sgd", split__heads="frozen")
    return with_keys(flat | PLAIN, **keys)


def trusted(run: Run) -> TrustedFederation:
    assert isinstance(run.federation, TrustedFederation)
    return run.federation


def distance(found: NDArray[Any], true: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


# --- exactness --------------------------------------------------------------------------------------------


def own_gradients(run: Run, step: int) -> list[NDArray[Any]]:
    """Return autograd's LoRA gradient (p,) of every sample of a step, one text at a time, unsplit."""
    reference, task = Reference(run), run.task
    assert isinstance(task, TextTask)
    whole, lora = reference.model, list(reference.lora.values())
    with torch.no_grad():
        for p, part in zip(lora, np.split(run.start, np.cumsum([p.numel() for p in lora])[:-1]), strict=True):
            p.copy_(torch.from_numpy(part).view_as(p))
    found = []
    for device in run.federation.devices:
        for i in task.ids(device, step, 0).tolist():
            loss = task.loss(whole, task.of(device, np.array([i])))
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora)]).numpy())
    return found


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_the_sum_is_that_of_a_loop_over_samples(
    pool: str, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped or not, and whether or not the batch fits into one part."""
    causal: Flat = {"model.backbone": "tiny-llama"} if pool == "last" else {}
    keys = {"text.pool": pool, "privacy.clip": clip, "privacy.target-epsilon": float("inf")} | causal
    monkeypatch.setattr(large_model, "GRADIENTS", 5000)  # a few samples at a time
    run = Run(private_run(tmp_path) | keys, tmp_path)
    run.rounds(1, 1)
    samples = own_gradients(run, 1)
    assert len(samples) * run.lora.size > 2 * 5000
    norms = [float(np.linalg.norm(g)) for g in samples]
    assert clip > 1.0 or max(norms) > clip  # then clipping does something
    wanted = sum(g * min(1.0, clip / norm) for g, norm in zip(samples, norms, strict=True))
    expected = sum(trusted(run).expected.values())
    assert [fold.weight for fold in run.folds] == [1.0]
    assert distance(run.folds[0].gradient * expected, np.asarray(wanted)) < 1e-12


def test_without_noise_it_is_the_step_without_privacy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same batch, no clip that matters: the steps differ by the constant that stands for the batch size."""
    run = Run(private_run(tmp_path, privacy__target_epsilon=float("inf"), privacy__clip=1e9), tmp_path)
    run.rounds(1, 1)
    task = run.task
    assert isinstance(task, TextTask)
    drawn = {k: task.ids(k, 1, 0) for k in run.federation.devices}
    monkeypatch.setattr(TextTask, "ids", lambda self, device, round, step: drawn[device])
    other = Run(with_keys(run.flat, privacy__mechanism="none"), tmp_path)
    assert not isinstance(other.federation, TrustedFederation)
    other.rounds(1, 1)
    size, expected = sum(map(len, drawn.values())), sum(trusted(run).expected.values())
    assert size != expected
    moved = (run.lora - run.start) * expected
    assert distance(moved, (other.lora - other.start) * size) < 1e-12


# --- sensitivity ------------------------------------------------------------------------------------------


def sums(flat: Flat, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the clipped sum of a step, and what it is with one sample less."""
    whole = Run(flat, folder)
    whole.rounds(1, 1)
    ids = TextTask.ids

    def fewer(self: TextTask, device: int, round: int, step: int) -> NDArray[np.int64]:
        drawn = ids(self, device, round, step)
        return drawn[1:] if device == 0 else drawn

    with monkeypatch.context() as patch:
        patch.setattr(TextTask, "ids", fewer)
        less = Run(flat, folder)
        less.rounds(1, 1)
    return trusted(whole)._total, trusted(less)._total


@pytest.mark.parametrize("wire", [{}, INT8], ids=["fp64", "int8"])
def test_a_sample_moves_the_sum_by_no_more_than_its_clip(
    wire: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are clipped, so it is by C exactly: what is sent of the others did not change with the batch."""
    flat = private_run(tmp_path, privacy__clip=1e-3, privacy__sampling_rate=0.6) | wire
    whole, less = sums(flat, tmp_path, monkeypatch)
    assert np.linalg.norm(whole - less) <= 1e-3 * (1 + 1e-6)
    assert np.linalg.norm(whole - less) >= 1e-3 * (1 - 1e-6)


def test_a_draw_for_the_whole_batch_would_move_the_others_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: stochastic rounding as without privacy; a sample less shifts everybody's draws."""

    def shared(config: Any, device: int, step: int) -> np.random.Generator:
        return rng(config.seed, "jacobian", device, step)

    for module in (link, device_side):
        monkeypatch.setattr(module, "jacobian_draw", shared)
    flat = private_run(tmp_path, privacy__clip=1e-3, privacy__sampling_rate=0.6) | INT8
    whole, less = sums(flat, tmp_path, monkeypatch)
    assert abs(np.linalg.norm(whole - less) / 1e-3 - 1.0) > 1e-4


def test_what_is_not_finite_counts_as_zero() -> None:
    rows = rng(1, "rows").standard_normal((4, 50)).astype(np.float32)
    rows[1, 3], rows[2, 0] = np.nan, np.inf
    found = clipped_sum(rows, np.array([0.5, 0.5, 0.5, 100.0]))
    wanted = rows[0].astype(float) * 0.5 / np.linalg.norm(rows[0].astype(float)) + rows[3]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


# --- noise and ledger -------------------------------------------------------------------------------------


def test_the_noise_is_gaussian_of_the_planned_size_and_new_at_every_step(tmp_path: Path) -> None:
    run = Run(private_run(tmp_path, train__rounds=8), tmp_path)
    federation, noises = trusted(run), []
    for number in range(1, 9):
        run.rounds(number, number)
        expected = sum(federation.expected.values())
        noises.append(run.folds[-1].gradient * expected - federation._total)
    std = min(federation.noise.values())  # times C = 1
    drawn = np.concatenate(noises)
    assert abs(drawn.std() / std - 1.0) < 4.0 / np.sqrt(2 * len(drawn))
    assert stats.kstest(drawn / std, "norm").pvalue > 0.01
    for one, other in itertools.pairwise(noises):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.0 / np.sqrt(len(one))


def test_each_book_ends_at_its_own_budget(tmp_path: Path) -> None:
    """Unlike budgets and unlike rates: the noise is one, and whoever needs more clips lower."""
    run = Run(private_run(tmp_path, privacy__device_epsilons="1,4"), tmp_path)
    run.rounds()
    federation = trusted(run)
    books = {k: Ledger.from_json(text) for k, text in federation.ledgers.items()}
    for k, book in books.items():
        assert (1.0, 4.0)[k % 2] - 0.01 <= book.epsilon <= (1.0, 4.0)[k % 2]
        assert book.events == [(federation.rates[k], federation.noise[k], 6)]
    least = min(federation.noise.values())
    for k, z in federation.noise.items():
        assert federation._clips[k] == pytest.approx(least / z) and federation._std / federation._clips[
            k
        ] == (pytest.approx(z))
    assert len(set(federation._clips.values())) > 2
    assert np.isnan(federation.loss)  # no loss left a device
    assert not federation.heard.norm and not federation.heard.loss  # nor is anything of one device told


def test_a_partial_cohort_pays_for_its_own_steps_alone(tmp_path: Path) -> None:
    run = Run(private_run(tmp_path, train__cohort=2, train__rounds=5), tmp_path)
    run.rounds()
    steps = {k: Ledger.from_json(t).events[0][2] for k, t in run.federation.ledgers.items()}
    assert sum(steps.values()) == 10 and len(set(steps.values())) > 1
    for text in run.federation.ledgers.values():
        assert 7.99 <= Ledger.from_json(text).epsilon <= 8.0


def test_a_step_that_nobody_is_drawn_for_is_noise_and_charged(tmp_path: Path) -> None:
    run = Run(private_run(tmp_path, privacy__sampling_rate=1e-9, privacy__noise_multiplier=1.0), tmp_path)
    (cost,) = run.rounds(1, 1)
    assert cost.exchanges == 0 and not trusted(run)._total.any()
    assert run.folds[0].gradient.std() > 0.0 and not np.array_equal(run.lora, run.start)
    assert [Ledger.from_json(t).events for t in run.federation.ledgers.values()] == [[(1e-9, 1.0, 1)]] * 4


def test_who_has_spent_its_budget_is_left_out(tmp_path: Path) -> None:
    """Too little noise for more than some steps: no book passes its budget, and then the model rests."""
    run = Run(private_run(tmp_path, privacy__noise_multiplier=0.8, privacy__device_epsilons="5,1"), tmp_path)
    run.rounds(1, 1)
    assert run.federation.refused == {1, 3}
    run.rounds(2, 6)
    after = run.lora.copy()
    assert run.federation.refused == {0, 1, 2, 3}
    run.rounds(6, 6)
    assert np.array_equal(run.lora, after)
    for k, text in run.federation.ledgers.items():
        assert 0.0 <= Ledger.from_json(text).epsilon <= (5.0, 1.0)[k % 2]


def test_who_vanishes_has_paid(tmp_path: Path) -> None:
    run = Run(private_run(tmp_path, faults__vanish=0.3), tmp_path)
    run.rounds()
    asked = sum(bool(s) for sent in run.grid.delivered[::2] for s in sent.content["config"]["shown"])  # type: ignore
    assert sum(bool(order.shown[place]) for order, place, *_ in run.payloads()) < asked
    assert {Ledger.from_json(t).events[0][2] for t in run.federation.ledgers.values()} == {6}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    flat = private_run(tmp_path, server__optimiser="adamw")
    whole = Run(flat, tmp_path)
    whole.rounds()
    first = Run(flat, tmp_path)
    first.rounds(1, 3)
    state = {name: array.copy() for name, array in first.federation.state().items()}
    then = Run(flat, tmp_path)
    then.federation.load(state)
    then.rounds(4, 6)
    assert np.array_equal(then.lora, whole.lora)
    wanted = {k: Ledger.from_json(text).events for k, text in whole.federation.ledgers.items()}
    assert {k: Ledger.from_json(text).events for k, text in then.federation.ledgers.items()} == wanted


def test_books_outlive_a_run_where_they_have_a_folder(tmp_path: Path) -> None:
    """The second run plans with what the first has left: nothing, so everybody is refused."""
    flat = private_run(tmp_path, privacy__ledgers=str(tmp_path / "books"), train__rounds=2)
    Run(flat, tmp_path).rounds()
    again = Run(flat, tmp_path)
    again.rounds(1, 1)
    assert again.federation.refused == {0, 1, 2, 3} and np.array_equal(again.lora, again.start)


# --- batches ----------------------------------------------------------------------------------------------


def test_a_step_begun_again_with_other_answers_is_another_release(tmp_path: Path) -> None:
    """The books of the disk know the step; whether it is the same sum, they must ask."""
    keys: Flat = {"privacy__ledgers": str(tmp_path / "books"), "privacy__noise_multiplier": 2.0}
    for other, events in ((False, 1), (False, 1), (True, 2)):
        run = Run(private_run(tmp_path, train__local_steps=1, **keys), tmp_path)
        if other:
            trusted(run).samples.clipped = lambda *_: np.zeros(1)  # type: ignore[method-assign]
        run.rounds(1, 1)
        assert [steps for _, _, steps in Ledger.from_json(run.federation.ledgers[0]).events] == [events]


def test_every_sample_has_its_own_coin(tmp_path: Path) -> None:
    task = Run(private_run(tmp_path, privacy__sampling_rate=0.3), tmp_path).task
    assert isinstance(task, TextTask)
    drawn = np.zeros((4, 300, 64))
    for device in range(4):
        for step in range(300):
            ids = task.ids(device, step + 1, 0)
            assert np.array_equal(ids, np.unique(ids))
            drawn[device, step, ids] = 1.0
    coins = np.concatenate([drawn[k, :, : task.examples(k)].ravel() for k in range(4)])
    assert abs(coins.mean() - 0.3) < 4.0 * np.sqrt(0.21 / len(coins))
    size = drawn[0].sum(1)
    assert size.std() > 0.5  # a batch is no fixed number
    n = task.examples(0)
    between = np.corrcoef(drawn[0, :, :n].T)[np.triu_indices(n, 1)]
    assert np.abs(between).mean() < 2.0 / np.sqrt(300)  # of independent coins: sqrt(2 / pi) / sqrt(300)


def test_the_shards_default_rate_is_the_batch_over_the_shard(tmp_path: Path) -> None:
    task = Run(private_run(tmp_path), tmp_path).task
    assert isinstance(task, TextTask)
    assert [task.rate(k) * task.examples(k) for k in range(4)] == pytest.approx([4.0] * 4)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"strategy": "median"}, "it must be 'fedsgd-lora'"),
        ({"wire.jacobian": "top-k"}, "it must be a number format"),
    ],
)
def test_what_would_break_the_bound_is_refused(keys: Flat, wanted: str, tmp_path: Path) -> None:
    assert rules_split.broken(parse(private_run(tmp_path))) is None
    sentence = rules_split.broken(parse(private_run(tmp_path) | keys))
    assert sentence is not None and wanted in sentence and "'server-dp-sgd'" in sentence
