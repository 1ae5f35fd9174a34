"""Read labelled texts of the user's own: .csv and .jsonl files, folders of them, and the Hugging Face hub.

A row is (text, label), both as words; a numeric label is its JSON spelling. A folder (or data set) with
a ``train`` and a ``test`` has made its own split, and its ``validation`` comes along; the files of any
other folder are one pool, ``all``. Every fault raises ``ValueError`` in one sentence that names the file,
the line, what was found and what is expected.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Rows = list[tuple[str, str]]  # (text, label)
SPLITS = ("train", "validation", "test")


def read_path(path: Path, text_column: str, label_column: str) -> dict[str, Rows]:
    """Return the rows of a file or folder by split: ``train``, ``test`` (and ``validation``), or ``all``."""
    if not path.exists():
        raise ValueError(
            f"text.source = '{path}': there is no such file or folder; "
            "expected a .csv or .jsonl file, or a folder of them"
        )
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS) if path.is_dir() else [path]
    if not files or files[0].suffix.lower() not in READERS:
        what = "holds no .csv or .jsonl file" if path.is_dir() else "is neither a .csv nor a .jsonl file"
        raise ValueError(f"text.source = '{path}' {what}; save the texts as one of these")
    parted = {"train", "test"} <= {file.stem.lower() for file in files}
    found: dict[str, Rows] = {}
    for file in files:
        split = file.stem.lower() if parted else "all"
        if split in SPLITS or not parted:
            found.setdefault(split, []).extend(read_file(file, text_column, label_column))
    return found


def read_file(path: Path, text_column: str = "text", label_column: str = "label") -> Rows:
    """Return the rows of one .csv file (comma-separated, a header line first) or .jsonl file, in UTF-8."""
    content = path.read_bytes()
    try:
        whole = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    rows = []
    for line, record in READERS[path.suffix.lower()](path, whole):
        rows.append(_row(record, text_column, label_column, f"{path}, line {line}"))
    if not rows:
        raise ValueError(f"{path} holds no rows; expected columns {text_column} and {label_column}")
    return rows


def read_hub(name: str, text_column: str, label_column: str) -> dict[str, Rows]:
    """Return the rows of the hub's data set ``OWNER/NAME`` by split, or its one split ``train`` as ``all``.

    A data set without a ``test``, or with the labels of its ``test`` kept secret, is tested on its
    ``validation``.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"text.source = 'hub:{name}' needs the package datasets, which is not installed: "
            "pip install 'fedlam[hub]'"
        )
    try:
        found: Mapping[str, Any] = importlib.import_module("datasets").load_dataset(name)
        records = {split: _hub_records(found[split], label_column) for split in SPLITS if split in found}
    except Exception as error:  # the hub's clients raise a dozen types: each means "not to be had"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"text.source = 'hub:{name}' cannot be loaded from the hub ({type(error).__name__}: {reason}); "
            "check the name and the network"
        ) from None
    if "train" not in records:
        raise ValueError(f"text.source = 'hub:{name}' has no split train, only {', '.join(found) or 'none'}")
    if "validation" in records and all(r.get(label_column) is None for r in records.get("test", [])):
        records["test"] = records.pop("validation")
    rows = {
        split: [
            _row(record, text_column, label_column, f"hub:{name}, {split} row {number}")
            for number, record in enumerate(part, 1)
        ]
        for split, part in records.items()
    }
    return rows if "test" in rows else {"all": rows["train"]}


def _csv_records(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the header has "
                    f"{len(header)}; put a text that holds commas or quotes in double quotes"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error})") from None


def _json_records(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f'{path}, line {number} is not an object such as {{"text": ..., "label": ...}}')
        yield number, record


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": _csv_records,
    ".jsonl": _json_records,
}


def _hub_records(split: Any, label_column: str) -> list[Mapping[str, Any]]:
    """Return a split's records; the index of a class becomes the name that the data set gives it."""
    names = getattr(split.features.get(label_column), "names", None)
    if not names:
        return list(split)
    return [{**r, label_column: names[r[label_column]] if r[label_column] >= 0 else None} for r in split]


def _row(record: Mapping[str, Any], text_column: str, label_column: str, where: str) -> tuple[str, str]:
    """Return one record's text and label, or say what is wrong with it."""
    for key, column in (("text-column", text_column), ("label-column", label_column)):
        if column not in record:
            raise ValueError(
                f"{where}: there is no column '{column}' (text.{key}); the columns are {', '.join(record)}"
            )
    text, label = record[text_column], record[label_column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: column '{text_column}' must hold a text that is not empty, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character, and tokenisers fail on it
        raise ValueError(
            f"{where}: column '{text_column}' holds half a surrogate pair, which is no text"
        ) from None
    missing = label is None or (isinstance(label, float) and math.isnan(label))
    if missing or (isinstance(label, str) and label.strip().lower() in ("", "nan")):
        raise ValueError(f"{where}: column '{label_column}' holds no label, got {label!r}")
    if not isinstance(label, str | int | float):
        raise ValueError(f"{where}: column '{label_column}' must hold a word or a number, got {label!r}")
    return text, label.strip() if isinstance(label, str) else json.dumps(label)
