"""A run's folder: whole records or none, whole states or none, and never two runs in one place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlam_app.config import ConfigError, RunConfig, parse
from fedlam_app.experiments.track import CONFIG, METRICS, RunFolder


def config_of(path: Path, **changes: object) -> RunConfig:
    return parse({"results": str(path), **{key.replace("__", "."): value for key, value in changes.items()}})  # type: ignore[dict-item]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(config_of(tmp_path / "run"))


def record(key: str, round: int, **more: object) -> dict[str, object]:
    return {"key": key, "cell": key.split("-seed")[0], "label": key, "round": round, **more}


def test_a_new_folder_says_what_was_asked_and_with_what(folder: RunFolder) -> None:
    about = folder.config()
    assert about["config"]["data.users"] == 300
    assert about["versions"]["numpy"] == np.__version__
    assert about["machine"]["cpu"]


def test_records_come_back_as_plain_json(folder: RunFolder) -> None:
    folder.append_metrics(
        {"a": np.float32(0.5), "b": np.arange(3), "c": math.nan, "d": (1, 2), "e": Path("/x")}
    )
    assert folder.read_metrics() == [{"a": 0.5, "b": [0, 1, 2], "c": None, "d": [1, 2], "e": "/x"}]


@settings(max_examples=30)
@given(cut=st.integers(0, 200))
def test_a_kill_in_the_middle_of_a_line_costs_that_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "run"
    first = RunFolder.open(config_of(path))
    for round in range(4):
        first.append_metrics(record("fed-2", round, text="é\u2028"))
    metrics = path / METRICS
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[: max(0, len(whole) - cut)])
    survivors = whole[: max(0, len(whole) - cut)].count(b"\n")

    again = RunFolder.open(config_of(path, resume=True))
    assert [r["round"] for r in again.read_metrics()] == list(range(survivors))
    again.append_metrics(record("fed-2", 99))
    assert [r["round"] for r in again.read_metrics()] == [*range(survivors), 99]


def test_a_damaged_record_before_the_end_is_an_error(folder: RunFolder) -> None:
    (folder.path / METRICS).write_text('{"round": 1}\n{"rou\n{"round": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        folder.read_metrics()


def test_resuming_drops_what_will_be_measured_again(folder: RunFolder) -> None:
    for key in ("fed-2-seed1", "fed-2-seed2"):
        for round in range(3):
            folder.append_metrics(record(key, round))
        folder.append_metrics(record(key, 2, kind="final"))
    folder.drop_after("fed-2-seed1", 1)
    kept = [(r["key"], r["round"], r.get("kind")) for r in folder.read_metrics()]
    assert kept == [
        ("fed-2-seed1", 0, None),
        ("fed-2-seed1", 1, None),
        *[("fed-2-seed2", round, None) for round in range(3)],
        ("fed-2-seed2", 2, "final"),
    ]
    assert not folder.finished("fed-2-seed1")
    assert folder.finished("fed-2-seed2")


def test_state_comes_back_bit_for_bit(folder: RunFolder) -> None:
    arrays = {"models": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32), "ids": np.arange(4)}
    meta = {"round": 7, "totals": {"cpu_s": 1.5}}
    folder.save_state("fed-10", arrays, meta)
    loaded = folder.load_state("fed-10")
    assert loaded is not None
    assert loaded[1] == meta
    for name, array in arrays.items():
        assert loaded[0][name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[0][name], array)
    assert folder.load_state("never") is None


def test_a_failed_save_leaves_the_state_before(folder: RunFolder) -> None:
    folder.save_state("fed-1", {"v": np.zeros(2, np.float32)}, {"round": 1})
    with pytest.raises(TypeError):
        folder.save_state("fed-1", {"v": np.ones(2, np.float32)}, {"round": object()})
    loaded = folder.load_state("fed-1")
    assert loaded is not None
    assert loaded[1] == {"round": 1}
    assert [path.name for path in (folder.path / "state").iterdir()] == ["fed-1.safetensors"]


def test_the_folder_of_another_run_is_refused_and_left_alone(folder: RunFolder) -> None:
    before = (folder.path / CONFIG).read_bytes()
    with pytest.raises(ConfigError, match=r"holds another run: its 'seed' is 2025 and this one's is 1"):
        RunFolder.open(config_of(folder.path, seed=1))
    with pytest.raises(ConfigError, match="holds another run"):
        RunFolder.open(config_of(folder.path, seed=1, resume=True))
    assert (folder.path / CONFIG).read_bytes() == before


def test_results_are_not_overwritten_without_resume(folder: RunFolder) -> None:
    RunFolder.open(config_of(folder.path))  # nothing measured yet: the same run may start again
    folder.append_metrics(record("fed-1", 0))
    with pytest.raises(ConfigError, match="already holds this run's results; continue it with resume = true"):
        RunFolder.open(config_of(folder.path))
    assert len(RunFolder.open(config_of(folder.path, resume=True)).read_metrics()) == 1


def test_another_number_of_workers_may_resume(folder: RunFolder) -> None:
    folder.append_metrics(record("fed-1", 0))
    RunFolder.open(config_of(folder.path, resume=True, federation__supernodes=9))


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        RunFolder.open(config_of(tmp_path))


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a run to resume, and .* holds none"):
        RunFolder.open(config_of(tmp_path / "absent", resume=True))
    assert not (tmp_path / "absent").exists()


def test_a_broken_config_is_an_error_in_one_sentence(folder: RunFolder) -> None:
    (folder.path / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        RunFolder.open(config_of(folder.path, resume=True))
    (folder.path / CONFIG).write_text(json.dumps({"seed": 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match="has no table 'config'"):
        RunFolder.open(config_of(folder.path, resume=True))
