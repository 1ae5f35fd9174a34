"""Channel prediction as a task: keyed batches, a fixed evaluation, and sums that give the right metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlam_app.base import metrics
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.models.classical import fb_ar
from fedlam_app.models.rows import Rows
from fedlam_app.tasks.channel_prediction import ChannelPrediction
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    own = {"data.users": 40, "data.test-users": 20, "data.share": 0.2, "train.devices": 2}
    return {**tiny_run(tmp_path_factory.mktemp("data"), users=60), **own}


def task(flat: dict[str, Scalar], **keys: Scalar) -> ChannelPrediction:
    return ChannelPrediction(parse({**flat, **{k.replace("__", "."): v for k, v in keys.items()}}))


def test_a_batch_is_a_function_of_its_key(flat: dict[str, Scalar]) -> None:
    one, again = (task(flat).batch(1, 2, 3) for _ in range(2))
    assert torch.equal(one[0].history, again[0].history) and torch.equal(one[1], again[1])
    for other in ((0, 2, 3), (1, 1, 3), (1, 2, 0)):
        assert not torch.equal(task(flat).batch(*other)[0].history, one[0].history)


def test_the_pooled_bound_owns_all_shards_and_all_rows(flat: dict[str, Scalar]) -> None:
    pooled, federated = task(flat, strategy="central"), task(flat)
    both = np.concatenate([federated.users(0), federated.users(1)])
    np.testing.assert_array_equal(pooled.users(0), both)
    assert pooled.examples(0) == federated.examples(0) + federated.examples(1)
    assert len(pooled.batch(0, 1, 0)[1]) == 2 * len(federated.batch(0, 1, 0)[1])


def test_the_global_loss_is_over_every_shard_however_few_take_part(flat: dict[str, Scalar]) -> None:
    few, many = task(flat, train__devices=1), task(flat, train__devices=4)
    for split in ("train", "test"):
        for one, two in zip(few.chunks(split), many.chunks(split), strict=True):
            np.testing.assert_array_equal(few.observed(one).history, many.observed(two).history)
    users = sum(len(many.observed(chunk).history) for chunk in many.chunks("train"))
    assert users == sum(len(shard) for shard in many.shards) == 32


def test_naming_the_same_file_twice_does_not_test_on_training_users(flat: dict[str, Scalar]) -> None:
    t = task({**flat, "data.test-source": flat["data.source"]})
    users = {user.tobytes() for user in t.train.history}
    assert len(users) == 40 and not any(user.tobytes() in users for user in t.test.history)


class Oracle(nn.Module):
    """Returns given rows, whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, rows: Rows) -> Tensor:
        return self.answer


def test_a_perfect_forecast_scores_perfectly(flat: dict[str, Scalar]) -> None:
    t = task(flat)
    tables = []
    for chunk in t.chunks("test"):
        clean = torch.view_as_real(torch.from_numpy(t.observed(chunk).clean)).flatten(0, 1)
        tables.append(t.evaluate(Oracle(clean), chunk, 0))  # type: ignore[arg-type]
    scores = t.metrics("test", np.concatenate(tables))
    assert scores["nmse_clean_db"] == -math.inf
    assert scores["spectral_efficiency_bps_hz"] == pytest.approx(math.log2(1 + 10 * 16), abs=1e-3)
    # Only the label's own noise is left: 18 dB below a future that has about the history's power.
    assert scores["nmse_noisy_db"] == pytest.approx(metrics.noisy_floor_db(18.0), abs=0.6)


def test_the_baseline_is_scored_like_a_model(flat: dict[str, Scalar]) -> None:
    t = task(flat)
    seen = [t.observed(chunk) for chunk in t.chunks("test")]
    history, clean = (np.concatenate([getattr(s, name) for s in seen]) for name in ("history", "clean"))
    expected = metrics.nmse_db(*metrics.nmse_sums(fb_ar(history, 4), clean))
    assert t.baseline("ar")["nmse_clean_db"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["repeat-last", "pad", "ridge", "wiener-ar"])
def test_every_classical_competitor_is_scored(flat: dict[str, Scalar], name: str) -> None:
    scores = task(flat).baseline(name)
    assert scores["train_loss_db"] < 10 and math.isfinite(scores["nmse_clean_db"])


def test_anchored_rows_carry_the_forecast_of_their_whole_user(flat: dict[str, Scalar]) -> None:
    seen = task(flat, model__anchor="ar").observed(0)
    assert seen.anchor is not None
    np.testing.assert_allclose(seen.anchor, fb_ar(seen.history, 4), rtol=1e-5)
    rows, label = seen.rows(np.array([1, 1]), np.array([3, 7]))
    assert rows.anchor is not None and rows.anchor.shape == label.shape == (2, 4, 48, 2)
    np.testing.assert_array_equal(torch.view_as_complex(rows.anchor)[1].numpy(), seen.anchor[1, 7])


def test_cost_counts_what_crosses_the_cuts(flat: dict[str, Scalar]) -> None:
    cost = task(flat).cost()
    assert cost.elements_embedding == cost.elements_representation == 2 * 384
    assert cost.flops_server > 0 and cost.flops_device > 0


def test_the_case_study_has_every_cell_of_every_seed() -> None:
    cells = cells_of(parse({"case-study.seeds": "1,2", "case-study.servers": "1,10"}))
    assert [cell.name for cell in cells if cell.seed == 1][:2] == ["fed-10", "fed-1"]
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(parse(cell.overrides).seed == cell.seed for cell in cells)
    small = cells_of(parse({"case-study.competitors": "central,central-small"}))[-2:]
    budgets = [parse(cell.overrides).train for cell in small]
    rows = [train.batch_rows * train.local_steps for train in budgets]
    assert rows[0] == pytest.approx(rows[1], rel=0.02)
