"""The input-private split: one noised, projected vector a text, released once, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from clients.adapter import Worker
from clients.released import Releases
from fedlam_app import rules_split
from fedlam_app.base.records import kind_of
from fedlam_app.base.split_bytes import uplink_bytes
from fedlam_app.base.split_payload import from_integers
from fedlam_app.base.vectors import pack
from fedlam_app.base.wire import FORMATS
from fedlam_app.config import Scalar, parse
from fedlam_app.data.text import TextSet
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.models.split import Tokens, select
from fedlam_app.models.text import Texts
from fedlam_app.privacy import inversion, projection
from fedlam_app.privacy.accounting import BudgetSpent, Ledger, Release
from fedlam_app.privacy.projection import principal, public_projection
from fedlam_app.tasks import TASKS
from tests.split_runs import Flat, Run, text_run, tiny_backbones, with_keys
from tests.test_split_schema import FLOATS, UPLINK, forms, found_in, label_forms, module_forms, token_forms
from tests.tiny import write_texts

__all__ = ["tiny_backbones"]  # a fixture that every test here uses

OPEN = float("inf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of projections for every test."""
    monkeypatch.setenv("FEDLAM_CACHE", str(tmp_path / "cache"))


def once_run(folder: Path, **keys: Scalar) -> Flat:
    """Return a tiny run with one block on the device and public texts of another kind."""
    public = write_texts(folder / "public.jsonl", 90)
    base = text_run(folder, privacy__mechanism="release-once", split__device_blocks=1)
    return with_keys(base | {"privacy.public-texts": str(public), "privacy.dimensions": 8}, **keys)


def worker_of(flat: Flat, folder: Path) -> Worker:
    config = parse({**flat, "results": str(folder / "own")})
    return Worker(config, TASKS[config.task](config))


def clear(worker: Worker, device: int) -> NDArray[np.float64]:
    """Return a device's clean clipped vectors (n, d)."""
    return Releases(worker)._clipped(device)


# --- the public projection --------------------------------------------------------------------------------


def test_the_directions_are_principal_and_half_of_the_public_texts_are_short() -> None:
    draw = np.random.default_rng(1)
    basis = np.linalg.qr(draw.standard_normal((20, 20)))[0]
    vectors = 3.0 + draw.standard_normal((500, 20)) * np.array([9.0, 5.0, 3.0, *[0.1] * 17]) @ basis.T
    found = principal(vectors, 3)
    np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(3), atol=1e-12)
    _, _, turned = np.linalg.svd(np.cov(vectors.T))
    np.testing.assert_allclose(np.abs(np.sum(found.directions * turned[:3].T, 0)), 1.0, atol=1e-9)
    lengths = np.linalg.norm((vectors - found.mean) @ found.directions / found.scale, axis=1)
    assert np.median(lengths) == pytest.approx(1.0)
    assert principal(vectors, 3).directions.max(0) == pytest.approx(
        principal(vectors[::-1], 3).directions.max(0)
    )
    with pytest.raises(ValueError, match=r"'privacy.dimensions' = 21 .* at most 20"):
        principal(vectors, 21)


def test_a_projection_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def features(texts: TextSet) -> NDArray[np.float64]:
        made.append(len(texts))
        return np.random.default_rng(2).standard_normal((len(texts), 6))

    config = parse(once_run(tmp_path))
    args: Any = (config.text, config.privacy.public_texts)
    first = public_projection(*args, 2, ("a",), "", features)
    again = public_projection(*args, 2, ("a",), "", features)
    assert made == [72] and np.array_equal(first.directions, again.directions)
    public_projection(*args, 2, ("b",), "", features)  # another front
    public_projection(*args, 3, ("a",), "", features)
    assert made == [72] * 3
    monkeypatch.setattr(projection, "PUBLIC_TEXTS", 10)
    projection._sample.cache_clear()
    public_projection(*args, 2, ("a",), "", features)
    assert made[3:] == [10]
    projection._sample.cache_clear()


# --- the front --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "pool"), [(0, "mean"), (1, "mean"), (1, "first")])
def test_the_front_is_still_pools_projects_and_clips(blocks: int, pool: str, tmp_path: Path) -> None:
    flat = once_run(tmp_path, split__device_blocks=blocks, text__pool=pool)
    worker = worker_of(flat, tmp_path)
    front, task = worker.model.embedding, worker.task
    assert isinstance(front, PooledEmbedding) and front.dimensions == worker.model.crossing == 8
    assert not any(p.requires_grad for p in front.parameters())
    assert any("lora_" in name for name, _ in front.named_parameters()) == bool(blocks)
    texts: Texts = task.of(0, np.arange(task.examples(0))).texts
    words = front.embedding.table(texts.ids)
    tokens = Tokens(words, texts.lengths, texts.rows)
    states = select(front.front(tokens).values, tokens)  # (B, D)
    flat_states = (states - front.mean) @ front.directions / front.scale
    norms = flat_states.norm(dim=1)
    front.clip = float(norms.median())
    wanted = flat_states * (front.clip / norms).clamp(max=1.0)[:, None]
    torch.testing.assert_close(front.vectors(texts), wanted, rtol=1e-9, atol=1e-12)
    seen, _ = front(texts)
    assert seen.lengths.tolist() == [1] * len(texts.lengths)
    back = (seen.values - front.mean) @ front.directions / front.scale  # lifting loses nothing
    torch.testing.assert_close(back, wanted, rtol=1e-9, atol=1e-12)


def test_blocks_that_stay_learn_nothing_and_the_others_do(tmp_path: Path) -> None:
    run = Run(once_run(tmp_path), tmp_path)
    names = [name for name, _ in run.task.build_model().trainable().items()]
    assert names and not any(name.startswith("embedding.") for name in names)
    run.rounds(1, 2)
    assert not np.array_equal(run.lora, run.start)


# --- one release ------------------------------------------------------------------------------------------


def test_whoever_asks_again_gets_the_same_bytes(tmp_path: Path) -> None:
    """In any order, in another process, from the file or without it, and for one charge."""
    flat = once_run(tmp_path, wire__embedding="fp32")
    run = Run(flat, tmp_path)
    run.rounds(1, 4)
    sent: dict[tuple[int, int], bytes] = {}
    for order, place, down, up in run.payloads():
        ids = from_integers(down.missing, "<u4").tolist()
        for n, i in enumerate(ids):
            sent[order.devices[place], i] = up.embeddings[32 * n : 32 * (n + 1)]
    assert len(sent) == 64
    book = Ledger.from_json(run.federation.ledgers[2])
    worker = Worker(run.config, run.task)
    path = worker.ledgers.folder / "released" / "2.npz"
    assert path.is_file()
    for lost in (False, True):
        if lost:
            path.unlink()
        vectors = Releases(worker).of(2).vectors.astype(np.float32)
        assert all(sent[2, i] == vectors[i].tobytes() for i in range(len(vectors)))
        assert worker.ledgers.of(2) == book
    assert path.is_file()


def test_many_epochs_cost_what_one_release_does(tmp_path: Path) -> None:
    run = Run(once_run(tmp_path, train__rounds=9, split__cache=False), tmp_path)  # asked for at every step
    run.rounds()
    assert len(run.sent_up()) > 2 * 64
    for text in run.federation.ledgers.values():
        book = Ledger.from_json(text)
        assert 7.99 <= book.epsilon <= 8.0 and book.pure == pytest.approx(1.6)
        ((q, z, steps),) = book.events
        assert (q, steps) == (1.0, 1)
        other = Ledger(8.0, 1e-5)
        other.charge(Release(group="x", z=z))
        assert other.epsilon + 1.6 == pytest.approx(book.epsilon)


def test_the_noise_is_as_charged_and_no_two_vectors_share_it(tmp_path: Path) -> None:
    flat = once_run(tmp_path, privacy__dimensions=24, privacy__clip=2.0, text__partition="iid")
    worker = worker_of(flat, tmp_path)
    releases = Releases(worker)
    noises = [releases.of(k).vectors - clear(worker, k) for k in range(4)]
    drawn = np.concatenate([noise.ravel() for noise in noises])  # 64 x 24
    std = 2.0 * worker.ledgers.of(0).least_z
    assert abs(drawn.std() / std - 1.0) < 4.0 / np.sqrt(2 * len(drawn))
    assert stats.kstest(drawn / std, "norm").pvalue > 0.01
    rows = np.concatenate(noises) / std
    between = (rows @ rows.T / 24)[np.triu_indices(len(rows), 1)]
    assert np.abs(between).max() < 6.0 / np.sqrt(24)  # of 2016 pairs
    same = [np.corrcoef(noises[0].ravel(), other.ravel())[0, 1] for other in noises[1:]]
    assert np.abs(same).max() < 4.0 / np.sqrt(noises[0].size)


def test_equal_texts_get_unlike_noise(tmp_path: Path) -> None:
    """The key has the sample and the device, not the vector alone."""
    worker = worker_of(once_run(tmp_path, text__partition="iid"), tmp_path)
    task: Any = worker.task
    text = task.encoded["train"][int(task.shards[0][0])]
    for k in (0, 1):
        for i in (0, 1):
            task.encoded["train"][int(task.shards[k][i])] = text
    vectors = [Releases(worker).of(k).vectors[i] for k in (0, 1) for i in (0, 1)]
    assert np.ptp([clear(worker, k)[i] for k in (0, 1) for i in (0, 1)], axis=0).max() < 1e-9
    assert min(np.linalg.norm(vectors[i] - vectors[j]) for i in range(4) for j in range(i)) > 0.1


def test_another_release_of_the_same_texts_is_charged_and_refused(tmp_path: Path) -> None:
    flat = once_run(tmp_path, privacy__ledgers=str(tmp_path / "books"))
    Run(flat, tmp_path).rounds(1, 1)
    again = Run(flat, tmp_path)  # another run, the same release: it costs nothing
    again.rounds(1, 1)
    assert not again.federation.refused and again.sent_up()
    other = Run(with_keys(flat, privacy__clip=0.5), tmp_path)
    other.rounds(1, 1)
    assert other.federation.refused == {0, 1, 2, 3} and not other.sent_up()
    assert np.array_equal(other.lora, other.start)
    worker = Worker(other.config, other.task)
    with pytest.raises(BudgetSpent, match="device 1: epsilon 8 of 8 is spent"):
        Releases(worker).of(1)
    assert worker.ledgers.of(1).epsilon <= 8.0


def test_budgets_are_the_devices_own(tmp_path: Path) -> None:
    run = Run(once_run(tmp_path, privacy__device_epsilons="2,6"), tmp_path)
    run.rounds(1, 1)
    spent = [Ledger.from_json(run.federation.ledgers[k]).epsilon for k in range(4)]
    assert spent == pytest.approx([2.0, 6.0, 2.0, 6.0], abs=0.01)


def test_without_a_budget_there_is_no_noise_and_the_clip_stays(tmp_path: Path) -> None:
    worker = worker_of(once_run(tmp_path, privacy__target_epsilon=OPEN, privacy__clip=0.7), tmp_path)
    vectors = Releases(worker).of(0).vectors
    assert np.array_equal(vectors, clear(worker, 0))
    assert np.linalg.norm(vectors, axis=1).max() == pytest.approx(0.7)


# --- what leaves ------------------------------------------------------------------------------------------


def of_16_texts(folder: Path, **keys: Scalar) -> Flat:
    return once_run(folder, text__partition="iid", train__batch_rows=16, train__rounds=3, **keys)


def vector_forms(run: Run) -> set[bytes]:
    """Return every training text's clear vector, in each type."""
    worker = Worker(run.config, run.task)
    rows = np.concatenate([clear(worker, k) for k in run.federation.devices])
    return set().union(*(forms(row, FLOATS) for row in rows))


@pytest.mark.parametrize("budget", [8.0, OPEN])
def test_nothing_but_the_release_goes_up(budget: float, tmp_path: Path) -> None:
    """Neither tokens, labels, heads, lengths nor clear vectors; the search finds those that have no noise."""
    run = Run(of_16_texts(tmp_path, privacy__target_epsilon=budget, wire__embedding="fp64"), tmp_path)
    heads = [pack(run.task.build_model().device_side().values())]
    for number in (1, 2, 3):
        run.rounds(number, number)
        heads += [run.kept(device) for device in run.federation.devices]
    run.federation.evaluate(run.grid, run.task.chunks("test"), 2)
    for answer in run.grid.delivered[1::2]:
        assert kind_of(answer.content) in UPLINK and kind_of(answer.content) != "ModulesReport"
    told = 0
    for _, _, down, up in run.payloads():
        if up.embeddings:
            assert set(from_integers(up.lengths).tolist()) == {1} and not up.tails
            told += len(from_integers(down.missing, "<u4"))
            assert len(up.embeddings) == 8 * 8 * len(from_integers(down.missing, "<u4"))
    assert told == 64  # once each
    wanted = set().union(*token_forms(run)) | label_forms(run) | module_forms(heads)
    assert not found_in(run.grid.uplink, wanted)
    found = found_in(run.grid.uplink, vector_forms(run))
    assert len(found) == (64 if budget == OPEN else 0)


def test_what_crosses_is_d_numbers_a_sample_and_was_planned(tmp_path: Path) -> None:
    run = Run(of_16_texts(tmp_path, wire__embedding="int8", privacy__dimensions=5), tmp_path)
    run.rounds(1, 1)
    ups = [up for *_, up in run.payloads() if up.embeddings]
    assert [len(up.embeddings) for up in ups] == [FORMATS["int8"].size(16, 5)] * 4 == [16 * 7] * 4
    planned = uplink_bytes(run.config.wire, 32, tokens=16, samples=16, crossing=5, payloads=0, messages=0)
    assert planned == len(ups[0].embeddings) + len(ups[0].lengths)
    cost = run.task.cost()
    assert (cost.elements_embedding, cost.elements_representation) == (5, 32)


def test_the_server_works_on_what_it_got(tmp_path: Path) -> None:
    """The server's tokens are the released vectors, lifted by the public projection."""
    run = Run(once_run(tmp_path), tmp_path)
    run.rounds(1, 1)
    worker = Worker(run.config, run.task)
    front = worker.model.embedding
    assert isinstance(front, PooledEmbedding)
    device, sample = run.sent_up()[0]
    seen = run.federation.link.tokens([(device, sample)])
    wanted = front.lift(torch.from_numpy(Releases(worker).of(device).vectors[[sample]]))
    torch.testing.assert_close(seen.values, wanted, rtol=1e-12, atol=1e-12)


# --- attacks ----------------------------------------------------------------------------------------------


def one_word_vectors(front: PooledEmbedding, words: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what texts of one word each would release without noise, (V, d)."""
    ids = torch.from_numpy(words)
    with torch.no_grad():
        return front.vectors(Texts(ids, torch.ones_like(ids), None)).double().numpy()


def test_tokens_cannot_be_read_from_a_release(tmp_path: Path) -> None:
    """As many best guesses as a text has words, of the whole vocabulary; of clear embeddings, every token."""
    worker = worker_of(once_run(tmp_path, text__train=64, split__device_blocks=0), tmp_path)
    task: Any = worker.task
    front = worker.model.embedding
    assert isinstance(front, PooledEmbedding)
    words = np.arange(1, 4096)
    candidates = one_word_vectors(front, words)
    right = total = 0.0
    for k in range(4):
        texts = [np.unique(task.encoded["train"][i][0][1:]).astype(np.int64) for i in task.shards[k]]
        guesses = words[inversion.best_guesses(Releases(worker).of(k).vectors, candidates, 16)]
        right += inversion.found_in_texts(guesses, texts) * sum(map(len, texts))
        total += sum(map(len, texts))
    assert right / total <= 0.01
    table = front.embedding.table.weight.numpy()
    batch = task.of(0, np.arange(task.examples(0)))
    assert (
        inversion.recovered(inversion.nearest(table[batch.texts.ids], table), batch.texts.ids.numpy()) == 1.0
    )
    # The attack is no straw man: texts of one word, in all directions and without noise, are read.
    bare = with_keys(once_run(tmp_path), split__device_blocks=0, privacy__dimensions=32, privacy__clip=99.0)
    open_front = worker_of(bare, tmp_path).model.embedding
    assert isinstance(open_front, PooledEmbedding)
    every = one_word_vectors(open_front, words)
    assert np.array_equal(words[inversion.best_guesses(every[:200], every, 1)[:, 0]], words[:200])


# --- rules ------------------------------------------------------------------------------------------------


def test_what_would_let_more_leave_is_refused(tmp_path: Path) -> None:
    flat = once_run(tmp_path)
    assert rules_split.broken(parse(flat)) is None
    assert rules_split.broken(parse(flat | {"split.heads": "frozen"})) is None  # blocks that stand still
    assert rules_split.broken(parse(flat | {"split.heads": "frozen", "privacy.mechanism": "none"}))
    for keys, wanted in (
        ({"wire.embedding": "token-ids", "split.device-blocks": 0}, "it must be a number format"),
        ({"text.pool": "first", "split.device-blocks": 0}, "it must be 'mean'"),
        ({"privacy.public-texts": flat["text.source"]}, "the texts that devices hold are not public"),
    ):
        sentence = rules_split.broken(parse(flat | keys))
        assert sentence is not None and wanted in sentence


def test_an_adapter_is_exported_for_the_whole_backbone(tmp_path: Path) -> None:
    """Blocks that stood still on the device are in it as they started."""
    from safetensors.numpy import load_file

    from fedlam_app.experiments.cells import cells_of
    from fedlam_app.experiments.finish import export_adapter
    from fedlam_app.experiments.track import RunFolder

    run = Run(once_run(tmp_path), tmp_path)
    run.rounds(1, 2)
    folder = RunFolder(tmp_path / "exported")
    (cell,) = cells_of(run.config)
    folder.save_state(cell.key, run.federation.state(), {"round": 2})
    export_adapter(folder, run.config, cell)
    kept = load_file(tmp_path / "exported" / "adapter" / "adapter_model.safetensors")
    b = {name: array for name, array in kept.items() if "lora_B" in name}
    assert all(array.any() == ("layer.1." in name) for name, array in b.items()) and len(b) == 12
