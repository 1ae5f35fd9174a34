"""Labels at the second cut: clip, noise and charge, by the code that a real exchange runs; and an attack.

Every device here answers real orders (``private_devices.py``); the mutants at the end break one part each and
must be found out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from clients import split_private
from fedlam_app.base.records import SplitReport, TrainOrder, decode, kind_of
from fedlam_app.base.wire import FORMATS
from fedlam_app.privacy.accounting import ORDERS, BudgetSpent, Ledger, epsilon_of
from fedlam_app.privacy.clip import clip_samples, sample_norms
from fedlam_app.privacy.labels import chances, randomised
from fedlam_app.privacy.noise import Stream
from fedlam_app.privacy.statement import statement
from tests.broken_privacy import Break, over_the_batch, unclipped
from tests.private_devices import Alone, clipped, guessed, private_run
from tests.split_runs import Run, tiny_backbones, with_keys

__all__ = ["tiny_backbones"]  # a fixture that every test here uses

MODES = ("jacobian", "logit", "randomised-response")
NOISED = ("jacobian", "logit")


# --- the clip ----------------------------------------------------------------------------------------


def test_the_clip_is_that_of_a_loop_over_samples() -> None:
    draw = np.random.default_rng(1)
    counts = [1, 4, 2, 7, 1]
    rows = draw.standard_normal((sum(counts), 6)) * draw.uniform(0.01, 3.0, (sum(counts), 1))
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-7)):
        found = clip_samples(torch.from_numpy(rows).to(dtype), counts, 1.5)
        for part, own in zip(found.split(counts), np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            true = own * min(1.0, 1.5 / np.linalg.norm(own))
            assert np.abs(part.numpy() - true).max() <= tolerance * np.abs(own).max()
        assert float(sample_norms(found, counts).max()) <= 1.5 * (1.0 + 1e-6)


@given(st.lists(st.floats(width=32), min_size=8, max_size=8), st.floats(1e-3, 1e3))
def test_no_sample_is_longer_than_the_clip_nor_touches_another(values: list[float], clip: float) -> None:
    rows = torch.tensor(values, dtype=torch.float32).reshape(4, 2)
    found = clip_samples(rows, [2, 1, 1], clip)
    assert torch.isfinite(found).all()
    assert float(sample_norms(found, [2, 1, 1]).max()) <= clip * (1.0 + 1e-6)
    rows[3] = math.nan
    changed = clip_samples(rows, [2, 1, 1], clip)
    assert torch.equal(changed[:3], found[:3])
    assert not changed[3].any()


@given(st.integers(0, 4), st.integers(0, 4), st.floats(0.05, 3.0), st.integers(0, 99))
def test_a_label_moves_a_clipped_logit_gradient_by_no_more_than_its_sensitivity(
    one: int, other: int, clip: float, seed: int
) -> None:
    logits = torch.from_numpy(4.0 * np.random.default_rng(seed).standard_normal(5))
    both = torch.softmax(logits, 0) - torch.eye(5, dtype=torch.float64)[[one, other]]
    first, second = clip_samples(both, [1, 1], clip)
    assert float((first - second).norm()) <= min(2.0 * clip, math.sqrt(2.0)) * (1.0 + 1e-12)


# --- what a device sends -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.1, 0.6, 50.0])
def test_without_noise_a_device_sends_each_samples_own_clipped_gradient(tmp_path: Path, clip: float) -> None:
    alone = Alone(private_run(tmp_path, "jacobian", privacy__target_epsilon=math.inf, privacy__clip=clip))
    shown = alone.rows(0, 1, np.random.default_rng(1))
    sent, loss = alone.answer(0, 1, shown)
    own = alone.gradients(shown, alone.targets(0, 1))
    assert np.abs(sent - clipped(own, clip)).max() <= 1e-12
    assert loss == 0.0  # a loss tells of labels
    changed = shown.copy()
    changed[1] += 1.0
    again, _ = alone.answer(0, 1, changed)
    assert (again[0] == sent[0]).all()
    assert (again[2:] == sent[2:]).all()
    assert (again[1] != sent[1]).any()


@pytest.mark.parametrize("mechanism", NOISED)
def test_representations_of_an_enemy_do_not_pass_the_clip(tmp_path: Path, mechanism: str) -> None:
    keys = {"privacy.target-epsilon": math.inf, "privacy.clip": 0.2}
    alone = Alone(private_run(tmp_path, mechanism) | keys)
    shown = alone.rows(0, 1, np.random.default_rng(1))
    weight, _ = alone.head()
    largest = 0.2 * np.linalg.norm(weight, 2) if mechanism == "logit" else 0.2
    clean, _ = alone.answer(0, 1, shown)
    for bad in (math.nan, math.inf, 1e308, -1e200, 1e30):
        shown[2] = bad
        sent, _ = alone.answer(0, 1, shown)
        assert np.isfinite(sent).all()
        assert np.linalg.norm(sent, axis=1).max() <= largest * (1.0 + 1e-6)
        assert np.abs(np.delete(sent, 2, 0) - np.delete(clean, 2, 0)).max() <= 1e-12
        if not math.isfinite(bad):
            assert not sent[2].any()
    assert all(np.isfinite(part).all() for part in alone.head())


def test_logit_noise_is_all_that_jacobian_and_head_are_made_of(tmp_path: Path) -> None:
    alone = Alone(private_run(tmp_path, "logit", privacy__noise_multiplier=2.0, privacy__clip=0.5))
    weight, bias = alone.head()
    shown = alone.rows(0, 1, np.random.default_rng(1))
    sent, loss = alone.answer(0, 1, shown)
    noised, *_ = np.linalg.lstsq(weight[:1].T, sent.T, rcond=None)  # of two classes, w_1 = -w_0
    assert np.abs(weight[:1].T @ noised - sent.T).max() <= 1e-12
    assert loss == 0.0
    logits = shown @ weight.T + bias
    own = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[alone.targets(0, 1)]
    key = split_private.digest  # the device's own noise, drawn again
    said = key("logit", 1, alone.device.cut._ids(split_private.Event(0, 1)), shown,
               np.concatenate([weight.ravel(), bias]), 0.5, 1.0)  # fmt: skip
    noise = alone.worker.ledgers.stream(0, "logit", 1, key(said, alone.targets(0, 1)))
    d = clipped(own, 0.5) + noise.normal((len(shown), 2), 1.0)
    assert np.abs(d @ weight - sent).max() <= 1e-12
    rate = alone.device._rate(1)
    trained, moved = alone.head()
    assert np.abs(trained - (weight - rate * d.T @ shown / len(shown))).max() <= 1e-12
    assert np.abs(moved - (bias - rate * d.sum(0) / len(shown))).max() <= 1e-12


def noise_of(alone: Alone, device: int, step: int, shown: NDArray[Any], **also: Any) -> NDArray[Any]:
    """Return what a device adds to its clipped Jacobians."""
    sent, _ = alone.answer(device, step, shown, **also)
    return sent - clipped(alone.gradients(shown, alone.targets(device, step)), alone.config.privacy.clip)


def test_noise_is_gaussian_of_the_right_width(tmp_path: Path) -> None:
    keys = {"privacy__noise_multiplier": 0.7, "privacy__clip": 0.3, "privacy__target_epsilon": math.inf}
    alone = Alone(private_run(tmp_path, "jacobian", train__batch_rows=12, **keys))
    draw = np.random.default_rng(1)
    found = [noise_of(alone, 0, 1, alone.rows(0, 1, draw)).ravel() for _ in range(270)]
    noise = np.concatenate(found) / (0.7 * 0.3)
    assert len(noise) >= 100_000
    assert abs(noise.std() - 1.0) <= 0.01
    assert abs(noise.mean()) <= 4.0 / math.sqrt(len(noise))
    assert stats.kstest(noise, "norm").pvalue > 0.01


def test_noise_is_new_for_every_device_step_content_and_width(tmp_path: Path) -> None:
    keys = {"privacy__noise_multiplier": 1.0, "privacy__target_epsilon": math.inf}
    alone = Alone(private_run(tmp_path, "jacobian", train__batch_rows=12, **keys))
    shown = alone.rows(0, 1, np.random.default_rng(1))
    near = shown + 1e-12
    noises = [
        noise_of(alone, 0, 1, shown),
        noise_of(alone, 1, 1, shown),
        noise_of(alone, 0, 2, shown),
        noise_of(alone, 0, 1, near),
        noise_of(alone, 0, 1, shown, noise=[2.0]) / 2.0,
    ]
    related = np.corrcoef([noise.ravel() for noise in noises])
    assert np.abs(related[np.triu_indices(len(noises), 1)]).max() < 4.0 / math.sqrt(noises[0].size)


@pytest.mark.parametrize("mechanism", NOISED)
def test_a_repeated_release_is_the_same_and_costs_nothing(tmp_path: Path, mechanism: str) -> None:
    keys = {"privacy__target_epsilon": math.inf, "privacy__noise_multiplier": 1.0}
    flat = private_run(tmp_path, mechanism, **keys)
    alone = Alone(flat)
    shown = alone.rows(0, 1, np.random.default_rng(1))

    def events() -> int:
        return sum(steps for _, _, steps in alone.ledger(0).events)

    first, _ = alone.answer(0, 1, shown)
    again, _ = alone.answer(0, 1, shown)
    assert (first == again).all()
    assert events() == 1
    assert (Alone(flat).answer(0, 1, shown)[0] == first).all()  # in another process, say
    assert events() == 1
    alone.answer(0, 2, alone.rows(0, 2, np.random.default_rng(2)))  # other samples of the same epoch
    assert events() == 1
    alone.answer(0, 1, shown + 0.1)  # the same samples
    assert events() == 2
    alone.answer(0, 4, alone.rows(0, 4, np.random.default_rng(2)))  # the next epoch
    assert events() == 3


def test_a_ledger_tells_nothing_of_labels_though_the_noise_depends_on_them(tmp_path: Path) -> None:
    flat = private_run(tmp_path, "jacobian", privacy__noise_multiplier=2.0)
    alone = Alone(flat)
    shown = alone.rows(0, 1, np.random.default_rng(1))
    noise = noise_of(alone, 0, 1, shown)
    book = alone.ledger(0).to_json()
    other = Alone(flat)
    other.task.encoded["train"][:] = [(ids, 1 - label) for ids, label in other.task.encoded["train"]]
    changed = noise_of(other, 0, 1, shown)
    assert other.targets(0, 1).tolist() == (1 - alone.targets(0, 1)).tolist()
    assert other.ledger(0).to_json() == book
    assert abs(np.corrcoef(noise.ravel(), changed.ravel())[0, 1]) < 4.0 / math.sqrt(noise.size)


# --- orders ------------------------------------------------------------------------------------------


def test_the_schedule_scales_the_noise_and_the_charge(tmp_path: Path) -> None:
    alone = Alone(private_run(tmp_path, "jacobian", privacy__noise_multiplier=4.0, train__batch_rows=12))
    noise = noise_of(alone, 0, 1, alone.rows(0, 1, np.random.default_rng(1)), noise=[1.5])
    assert abs(noise.std() / 6.0 - 1.0) < 4.0 / math.sqrt(2 * noise.size)
    assert alone.ledger(0).events == [(1.0, 3.0, 1)]


@pytest.mark.parametrize("counts", [False, True])
def test_noise_of_the_channel_counts_only_where_it_may(tmp_path: Path, counts: bool) -> None:
    keys = {"privacy__noise_multiplier": 4.0, "train__batch_rows": 12, "privacy__count_channel_noise": counts}
    if counts:
        keys |= {"fleet__profiles": "mixed", "wireless__transport": "analog"}
    alone = Alone(private_run(tmp_path, "jacobian", **keys))
    noise = noise_of(alone, 0, 1, alone.rows(0, 1, np.random.default_rng(1)), free=[2.4])
    expected = 3.2 if counts else 4.0
    assert abs(noise.std() / expected - 1.0) < 4.0 / math.sqrt(2 * noise.size)
    assert alone.ledger(0).events == [(1.0, 2.0, 1)]  # in full, whoever makes the noise


@pytest.mark.parametrize(
    "also", [{"noise": [math.nan]}, {"noise": [0.0]}, {"noise": [-1.0]}, {"free": [math.nan]}]
)
def test_an_order_of_no_noise_is_refused(tmp_path: Path, also: dict[str, list[float]]) -> None:
    alone = Alone(private_run(tmp_path, "jacobian"))
    with pytest.raises(ValueError, match="noise must be multiplied by a positive number"):
        alone.answer(0, 1, alone.rows(0, 1, np.random.default_rng(1)), **also)
    assert alone.ledger(0).events == []


# --- the ledger --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mechanism", "apart"), [("jacobian", 2.0), ("logit", math.sqrt(2.0))])
def test_the_ledger_is_that_of_a_gaussian_between_two_labels(
    tmp_path: Path, mechanism: str, apart: float
) -> None:
    z, k = 3.0, 4
    alone = Alone(private_run(tmp_path, mechanism, privacy__noise_multiplier=z))
    for epoch in range(k):
        for step in range(3 * epoch + 1, 3 * epoch + 4):
            alone.answer(0, step, alone.rows(0, step, np.random.default_rng(step)))
    mu = apart * math.sqrt(k) / z
    delta = alone.config.privacy.delta
    assert alone.ledger(0).epsilon == pytest.approx(epsilon_of(ORDERS * mu**2 / 2.0, delta), abs=1e-9)


def test_a_device_that_may_spend_no_more_sends_nothing(tmp_path: Path) -> None:
    alone = Alone(private_run(tmp_path, "jacobian", privacy__target_epsilon=2.0))
    for step in range(1, 7):  # the two epochs of the plan
        alone.answer(0, step, alone.rows(0, step, np.random.default_rng(step)))
    assert 1.99 <= alone.ledger(0).epsilon <= 2.0
    before = alone.ledger(0).to_json()
    with pytest.raises(BudgetSpent, match="device 0"):
        alone.answer(0, 7, alone.rows(0, 7, np.random.default_rng(7)))
    assert alone.ledger(0).to_json() == before


@pytest.mark.parametrize("mechanism", ["jacobian", "logit", "randomised-response"])
def test_an_order_that_the_mechanism_is_not_made_for_is_refused(tmp_path: Path, mechanism: str) -> None:
    """A whole model trained without noise would be handed in, and nothing charged."""
    worker = Alone(private_run(tmp_path, mechanism)).worker
    order = TrainOrder(
        cell="{}", round=1, devices=[0], rows=[0], ranks=[worker.layout.rank], known=[0], steps=[1],
        factors=[1.0], noise=[], free=[], chunks=[], width=0, trains="a+b+other", returns="a+b+other",
        keeps="", proximal=0.0, probe=False, compact=False, vectors=worker.initial.astype(np.float32),
        sizes=[len(worker.initial)], kinds=[], entry_ranks=[], first=0, entries=np.zeros(0, np.float32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not make private"):
        worker.obey(order, 0)
    flat = with_keys(private_run(tmp_path, "none"), privacy__mechanism="dp-sgd")
    with pytest.raises(ValueError, match="nothing of what crosses a split"):
        Alone(flat)


def test_what_earlier_runs_spent_on_the_same_data_counts(tmp_path: Path) -> None:
    keys = {"privacy__ledgers": str(tmp_path / "books")}
    for number, target in enumerate((2.0, 5.0)):
        flat = private_run(tmp_path, "jacobian", privacy__target_epsilon=target, **keys)
        alone = Alone(with_keys(flat, results=str(tmp_path / f"run {number}")))
        for step in range(1, 5):
            alone.answer(0, step, alone.rows(0, step, np.random.default_rng(step)))
            alone = Alone(with_keys(flat, results=str(tmp_path / f"run {number}")))  # killed and resumed
        assert target - 0.01 <= alone.ledger(0).epsilon <= target


# --- randomised response -----------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 1.0), (5, 0.5), (5, 3.0)])
def test_labels_are_kept_as_often_as_epsilon_says(classes: int, epsilon: float) -> None:
    n = 100_000
    labels = np.random.default_rng(1).integers(classes, size=n)
    told = randomised(labels, classes, epsilon, Stream(b"secret", classes, epsilon))
    p, q = chances(classes, epsilon)
    assert p / q == pytest.approx(math.exp(epsilon))
    assert p + (classes - 1) * q == pytest.approx(1.0)
    for label in range(classes):
        counts = np.bincount(told[labels == label], minlength=classes)
        expected = counts.sum() * np.where(np.arange(classes) == label, p, q)
        assert stats.chisquare(counts, expected).pvalue > 0.001
    assert (randomised(labels, classes, math.inf, Stream(b"secret")) == labels).all()


def test_labels_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="labels must be 0 to 1, got 0 to 2"):
        randomised(np.array([0, 2]), 2, 1.0, Stream(b"secret"))


def test_a_label_is_randomised_once_and_charged_once(tmp_path: Path) -> None:
    alone = Alone(private_run(tmp_path, "randomised-response", privacy__target_epsilon=1.5))
    told: dict[int, set[int]] = {}
    for step in range(1, 13):  # four epochs
        event = split_private.Event(0, step)
        batch = alone.task.batch(0, (step + 1) // 2, (step - 1) % 2)
        again = alone.device.cut.relabelled(batch, event)
        for i, label in zip(alone.device.cut._ids(event).tolist(), again.targets.tolist(), strict=True):
            told.setdefault(i, set()).add(label)
        assert alone.ledger(0).epsilon == 1.5
    assert len(told) == alone.task.examples(0)
    assert all(len(labels) == 1 for labels in told.values())
    assert alone.ledger(0).pure == 1.5
    true = alone.task.texts[0].labels[alone.task.shards[0]]
    flips = [next(iter(told[i])) != true[i] for i in told]
    assert 0 < sum(flips) < len(flips)


def test_randomised_labels_are_what_gradient_loss_and_head_see(tmp_path: Path) -> None:
    alone = Alone(private_run(tmp_path, "randomised-response", privacy__target_epsilon=0.5))
    shown = alone.rows(0, 1, np.random.default_rng(1), scale=3.0)
    labels, _ = split_private.told_labels(alone.worker, 0, 0.5)
    told = labels[alone.device.cut._ids(split_private.Event(0, 1))]
    assert (told != alone.targets(0, 1)).any()
    own = alone.gradients(shown, told, p=1.0 / (1.0 + math.exp(-0.5)))
    sent, loss = alone.answer(0, 1, shown)
    assert np.abs(sent - own).max() <= 1e-12
    assert loss > 0.0
    true = Alone(private_run(tmp_path, "randomised-response", privacy__target_epsilon=math.inf))
    own = true.gradients(shown, true.targets(0, 1))
    assert np.abs(true.answer(0, 1, shown)[0] - own).max() <= 1e-12


# --- attacks -----------------------------------------------------------------------------------------


def recovered(alone: Alone, k: int) -> float:
    """Return the share of labels that a server finds which knows the head and shows every sample k times."""
    z, clip = alone.config.privacy.noise_multiplier, alone.config.privacy.clip
    assert z > 0.0
    draw, right = np.random.default_rng(3), []
    for _ in range(12 if k > 1 else 40):
        for device in range(4):
            shown = [alone.rows(device, 1, draw) for _ in range(k)]
            sent = np.stack([alone.answer(device, 1, rows)[0] for rows in shown])
            pairs = [[clipped(alone.gradients(r, np.full(len(r), y)), clip) for r in shown] for y in (0, 1)]
            found = guessed(sent, np.stack(pairs[0]), np.stack(pairs[1]))
            right += (found == alone.targets(device, 1)).tolist()
    return float(np.mean(right))


def attacked(folder: Path, **keys: Any) -> Alone:
    """Return devices whose gradients are all longer than the clip: the bound is then tight."""
    keys = {"privacy__clip": 0.05, "privacy__target_epsilon": math.inf, "train__batch_rows": 12, **keys}
    return Alone(private_run(folder, "jacobian", **keys))


@pytest.mark.parametrize(("z", "k"), [(1.0, 1), (2.0, 4)])
def test_labels_are_recovered_no_better_than_the_noise_allows(tmp_path: Path, z: float, k: int) -> None:
    bound = stats.norm.cdf(math.sqrt(k) / z)
    found = recovered(attacked(tmp_path, privacy__noise_multiplier=z), k)
    assert bound - 0.06 <= found <= bound + 0.03  # and the attack is a real one


@pytest.mark.parametrize("mutant", [unclipped, over_the_batch])
def test_mutants_are_found_by_the_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Break
) -> None:
    mutant(monkeypatch)
    bound = stats.norm.cdf(1.0 / 2.0)
    assert recovered(attacked(tmp_path, privacy__noise_multiplier=2.0), 1) > bound + 0.03


def test_clear_embeddings_give_every_token_away(tmp_path: Path) -> None:
    run = Run(private_run(tmp_path, "jacobian", wire__embedding="fp32"), tmp_path)
    run.rounds()
    table = run.task.build_model().embedding.table.weight.detach().numpy()  # type: ignore[union-attr,operator]
    right = []
    for order, place, down, up in run.payloads():
        lengths = np.frombuffer(up.lengths, "<u2")
        if len(lengths):
            values = FORMATS["fp32"].decode(up.embeddings, int(lengths.sum()), table.shape[1])
            ids = np.frombuffer(down.missing, "<u4").astype(np.int64)
            true = run.task.of(order.devices[place], ids).texts.ids.numpy()
            far = ((values[:, None] - table[None]) ** 2).sum(2)
            right += (far.argmin(1) == true).tolist()
    assert len(right) > 100
    assert all(right)


def test_the_servers_pass_turns_noise_into_the_cascade(tmp_path: Path) -> None:
    """u~ = J^T g~ is linear in g~, so its covariance is (z C / B)^2 sum_i J_i^T J_i."""
    run = Run(private_run(tmp_path, "jacobian"), tmp_path)
    model, batch = run.task.build_model(), run.task.batch(0, 1, 0)
    tokens, _ = model.embedding(run.task.inputs(model, batch))
    samples, width = len(batch.targets), int(model.backbone.width)  # type: ignore[arg-type]

    def into_lora(rows: NDArray[Any]) -> NDArray[Any]:
        run.federation.large.forward(run.lora[None], [0], tokens, np.zeros(samples, np.intp))
        gradients, _ = run.federation.large.backward(rows, False)
        return np.asarray(gradients[0])

    units = np.eye(samples * width).reshape(-1, samples, width)
    through = np.stack([into_lora(unit) for unit in units])  # (B D, P): all J_i, one over the other
    draws = np.random.default_rng(1).standard_normal((100, samples, width))
    cascaded = np.stack([into_lora(noise) for noise in draws])
    assert np.abs(cascaded - draws.reshape(100, -1) @ through).max() <= 1e-12 * np.abs(cascaded).max() * 100
    energy = (cascaded**2).sum(1)
    assert abs(energy.mean() / (through**2).sum() - 1.0) < 4.0 * energy.std() / energy.mean() / 10.0


# --- whole federations -------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", MODES)
@pytest.mark.parametrize("strategy", ["fedsgd-lora", "median"])
def test_a_federation_spends_its_budget_and_not_more(tmp_path: Path, mechanism: str, strategy: str) -> None:
    keys = {"strategy": strategy, "privacy__device_epsilons": "3,6", "wire__jacobian": "int8"}
    heads = {"jacobian": "frozen", "logit": "averaged", "randomised-response": "personal"}
    run = Run(private_run(tmp_path, mechanism, split__heads=heads[mechanism], **keys), tmp_path)
    before = run.lora.copy()
    costs = run.rounds()
    assert (run.lora != before).any()
    assert np.isfinite(run.lora).all()
    assert not [reason for cost in costs for reason in cost.failures]
    assert math.isnan(run.federation.loss) == (mechanism in NOISED)
    for device in range(4):
        budget = (3.0, 6.0)[device % 2]
        assert budget - 0.01 <= Ledger.from_json(run.federation.ledgers[device]).epsilon <= budget
    replies = [reply.content for reply in run.grid.delivered[1::2]]
    shown = [decode(found, SplitReport) for found in replies if kind_of(found) == "SplitReport"]
    losses = {loss for report in shown for loss, of in zip(report.losses, report.weights, strict=True) if of}
    assert losses
    assert (losses == {0.0}) == (mechanism in NOISED)


@pytest.mark.parametrize("mechanism", NOISED)
def test_devices_that_are_refused_leave_the_model_as_it_is(tmp_path: Path, mechanism: str) -> None:
    keys = {"privacy__noise_multiplier": 1.5, "privacy__target_epsilon": 1.0}  # one epoch costs more
    run = Run(private_run(tmp_path, mechanism, **keys), tmp_path)
    before = run.lora.copy()
    costs = run.rounds()
    assert (run.lora == before).all()
    assert any("its privacy budget is spent" in reason for cost in costs for reason in cost.failures)
    assert run.federation.refused == {0, 1, 2, 3}
    assert not any(up.jacobians for *_, up in run.payloads())


@pytest.mark.parametrize("mechanism", MODES)
def test_the_promise_is_of_labels_and_of_nothing_else(tmp_path: Path, mechanism: str) -> None:
    promised = statement(Alone(private_run(tmp_path, mechanism)).config)
    assert promised is not None
    assert promised.label == "label-DP given embeddings"
    assert promised.unit == "the label of one training sample"
    said = [line for line in promised.text().splitlines() if "epsilon at most" in line or "input" in line]
    assert len(said) == 2
    assert "input" not in said[0].replace("label-DP given embeddings", "")
    assert "NOT covered" in said[1]
    assert "every token can be read" in said[1]
