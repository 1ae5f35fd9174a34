"""What goes up: a list of fields that is all there is, and a search of the bytes for what must not be there.

The search reads what Flower would put on a socket, and is shown to find what is there: token ids where the
wire carries them, modules where they are handed in, labels where a record is made to hold them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

from fedlam_app.base import records
from fedlam_app.base.records import SplitReport, encode, kind_of
from fedlam_app.base.split_payload import Uplink
from fedlam_app.base.vectors import pack
from tests.split_runs import FP32, Flat, Run, channel_run, text_run, tiny_backbones

__all__ = ["tiny_backbones"]  # a fixture that every test here uses

COMMON = {"cpu_s", "peak_rss_bytes"}
PRIVACY = {"refused", "ledgers"}
UPLINK = {
    "TrainReport": COMMON | PRIVACY | {"devices", "weights", "losses", "norms", "vectors", "sizes", "sums"},
    "SplitReport": COMMON | PRIVACY | {"devices", "weights", "losses", "payload", "sizes"},
    "ModulesReport": COMMON | {"devices", "vectors"},
    "EvaluateReport": COMMON | {"rows", "chunks", "users", "table"},
    "SecureReport": COMMON | {"devices", "complaints", "payload", "sizes"},
}
ARRAYS = {
    "TrainReport": {"vectors", "sums"},
    "SplitReport": {"payload"},
    "ModulesReport": {"vectors"},
    "EvaluateReport": {"table"},
}
INTEGERS = ("<u1", "<u2", "<u4", "<u8", ">u2", ">u4", ">u8", "<f4", "<f8")
FLOATS = ("<f2", "<f4", "<f8")
WIRES: list[Flat] = [
    FP32 | {"model.precision": "float32"},
    {f"wire.{link}": "int8" for link in ("embedding", "representation", "jacobian")},
    {"wire.embedding": "int4", "wire.jacobian": "top-k", "wire.delta": True},
]


def test_an_uplink_record_has_these_fields_and_no_other() -> None:
    reports = {kind.__name__: {field.name for field in fields(kind)} for kind in get_args(records.Report)}
    assert reports == UPLINK
    assert [field.name for field in fields(Uplink)] == ["jacobians", "lengths", "tails", "embeddings"]


def test_a_modules_report_is_the_only_new_word_for_modules() -> None:
    """A device's share of ``SplitReport`` is scalars and one ``Uplink``: nowhere for a head to sit."""
    hints = {field.name: field.type for field in fields(SplitReport)}
    assert hints["payload"] == "NDArray[np.uint8]" and hints["weights"] == "list[float]"


def serialised(content: RecordDict) -> bytes:
    """Return the bytes of a message's content."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def varints(values: NDArray[np.integer]) -> bytes:
    """Return integers as Flower's ConfigRecord packs them: zigzag varints."""
    found = bytearray()
    for value in values.tolist():
        rest = value << 1
        while rest > 127:
            found.append(rest & 127 | 128)
            rest >>= 7
        found.append(rest)
    return bytes(found)


def forms(values: NDArray[Any], dtypes: Iterable[str]) -> set[bytes]:
    """Return what a vector looks like in each type that can hold it."""
    wanted = set()
    for name in dtypes:
        kind = np.dtype(name)
        if kind.kind == "f" or values.max() <= np.iinfo(kind).max:
            wanted.add(values.astype(kind).tobytes())
    return wanted


def windows(values: NDArray[Any], length: int) -> Iterable[NDArray[Any]]:
    return (values[i : i + length] for i in range(len(values) - length + 1))


def token_forms(run: Run) -> list[set[bytes]]:
    """Return, for every training text, each stretch of four of its tokens in each type, and as varints."""
    found = []
    for ids, _ in run.task.encoded["train"]:  # type: ignore[attr-defined]
        parts = list(windows(np.asarray(ids[1:], np.int64), 4))
        found.append({form for part in parts for form in (*forms(part, INTEGERS), varints(part))})
    return found


def label_forms(run: Run) -> set[bytes]:
    """Return the labels of every device's batch and shard, in each type."""
    wanted = set()
    for device in run.federation.devices:
        shard = run.task.shards[device]  # type: ignore[attr-defined]
        for chosen in (shard, *(shard[run.task.ids(device, step, 0)] for step in (1, 2, 3))):
            labels = np.array([run.task.encoded["train"][i][1] for i in chosen])  # type: ignore[attr-defined]
            assert len(labels) >= 12 and len(set(labels.tolist())) > 1, "these labels would be found anywhere"
            wanted |= forms(labels, INTEGERS) | {varints(labels)}
    return wanted


def module_forms(vectors: Iterable[NDArray[Any]]) -> set[bytes]:
    """Return stretches of eight weights, in each type; zeros say nothing."""
    wanted = set()
    for vector in vectors:
        for start in range(0, len(vector) - 8, max(8, len(vector) // 64)):
            part = vector[start : start + 8]
            if np.count_nonzero(part) > 4:
                wanted |= forms(part, FLOATS)
    return wanted


def found_in(messages: Iterable[bytes], wanted: Iterable[bytes]) -> list[bytes]:
    joined = b"\n".join(messages)
    return [form for form in wanted if form in joined]


def rounds_with_heads(run: Run) -> list[NDArray[Any]]:
    """Run every round, then an evaluation; return the modules that any device had after any round."""
    heads = [pack(run.task.build_model().device_side().values())]
    for number in range(1, run.config.train.rounds + 1):
        run.rounds(number, number)
        heads += [run.kept(device) for device in run.federation.devices]
    run.federation.evaluate(run.grid, run.task.chunks("test"), 2)
    return heads


def of_16_texts(folder: Path, keys: Flat) -> Flat:
    """Return a run whose batches are whole shards of 16 texts, long enough to be told from chance."""
    return text_run(folder, text__partition="iid", train__batch_rows=16, train__rounds=3) | keys


@pytest.mark.parametrize("keys", WIRES, ids=["fp32", "int8", "sparse"])
def test_no_label_token_or_head_goes_up(keys: Flat, tmp_path: Path) -> None:
    run = Run(of_16_texts(tmp_path, keys), tmp_path)
    heads = module_forms(rounds_with_heads(run))
    for answer in run.grid.delivered[1::2]:
        kind = kind_of(answer.content)
        assert kind in ("SplitReport", "EvaluateReport")
        assert set(answer.content.config_records["config"]) == UPLINK[kind] - ARRAYS[kind] | {
            "schema",
            "type",
        }
        assert set(answer.content.array_records["arrays"]) == ARRAYS[kind]
    assert len(heads) > 50
    assert not found_in(run.grid.uplink, heads)
    assert not found_in(run.grid.uplink, label_forms(run))
    tokens = token_forms(run)
    assert len(tokens) == 64 and min(len(forms) for forms in tokens) >= 9
    assert not found_in(run.grid.uplink, set().union(*tokens))


def test_the_search_finds_tokens_where_the_wire_carries_them(tmp_path: Path) -> None:
    """Under ``token-ids`` every text is read off the wire; labels and heads still are not."""
    run = Run(of_16_texts(tmp_path, {"wire.embedding": "token-ids"}), tmp_path)
    heads = rounds_with_heads(run)
    for text in token_forms(run):
        assert found_in(run.grid.uplink, text)
    assert not found_in(run.grid.uplink, label_forms(run) | module_forms(heads))


def test_the_search_finds_labels_that_a_record_was_made_to_hold(tmp_path: Path) -> None:
    run = Run(of_16_texts(tmp_path, {}), tmp_path)
    labels = np.array([run.task.encoded["train"][i][1] for i in run.task.shards[0]])  # type: ignore[attr-defined]
    for fields_of in (
        {"weights": labels.astype(float).tolist(), "payload": np.zeros(1, np.uint8)},
        {"weights": [1.0], "payload": labels.astype(np.uint8)},
        {"weights": [1.0], "payload": labels.astype(np.int64).view(np.uint8)},
    ):
        whole: dict[str, Any] = {
            "devices": [0],
            "losses": [0.0],
            "refused": [],
            "ledgers": [],
            "cpu_s": 0.0,
            "peak_rss_bytes": 1,
            "sizes": [1],
        }
        assert found_in([serialised(encode(SplitReport(**whole, **fields_of)))], label_forms(run))
    whole["sizes"] = labels.tolist()
    report = SplitReport(**whole, weights=[1.0], payload=np.zeros(1, np.uint8))
    assert found_in([serialised(encode(report))], label_forms(run))


def test_only_a_modules_report_carries_modules(tmp_path: Path) -> None:
    """Heads that are averaged are handed in, by that message and by no other."""
    run = Run(of_16_texts(tmp_path, {"split.heads": "averaged"}), tmp_path)
    handed_in, others = [], []
    heads = module_forms(rounds_with_heads(run))
    for answer, sent in zip(run.grid.delivered[1::2], run.grid.uplink, strict=True):
        (handed_in if kind_of(answer.content) == "ModulesReport" else others).append(sent)
    assert len(handed_in) == 2 * run.config.train.rounds and others
    assert len(found_in(handed_in, heads)) > 50
    assert not found_in(others, heads)
    assert not found_in(run.grid.uplink, label_forms(run) | set().union(*token_forms(run)))


def test_no_channel_label_or_module_goes_up(tmp_path: Path) -> None:
    """Channel prediction with modules of its own: neither they, nor histories, nor futures."""
    run = Run(channel_run(tmp_path), tmp_path)
    modules = module_forms(rounds_with_heads(run))
    assert len(modules) > 50 and not found_in(run.grid.uplink, modules)
    wanted = set()
    for device in run.federation.devices:
        for step in range(run.config.train.local_steps):
            rows, label = run.task.batch(device, 1, step)
            for values in (rows.history.numpy().ravel(), label.numpy().ravel()):
                wanted |= module_forms([values])
    assert len(wanted) > 1000 and not found_in(run.grid.uplink, wanted)
