"""The door: what is let in comes back as it went in, and every refusal says what to do."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedlam_app.config import (
    COMPETITORS,
    SCENARIOS,
    ConfigError,
    Scalar,
    defaults,
    describe,
    identity,
    parse,
    results_folder,
    to_flat,
)

ROOT = Path(__file__).resolve().parents[1]


def lists(values: st.SearchStrategy[Any], least: int) -> st.SearchStrategy[str]:
    """Comma lists of distinct values."""
    return st.lists(values, min_size=least, max_size=4, unique=True).map(lambda v: ",".join(map(str, v)))


VALID = {
    "seed": st.integers(0, 2**63 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "data.scenario": lists(st.sampled_from(SCENARIOS), 1),
    "data.duplex": st.sampled_from(["tdd", "fdd"]),
    "data.users": st.integers(20, 10_000),
    "data.speed-min-kmh": st.floats(0, 100) | st.integers(0, 100),
    "data.speed-max-kmh": st.floats(100, 500),
    "data.snr-test-db": st.floats(-50, 100),
    "model.name": st.sampled_from(["llm4cp-clean", "llm4cp", "gru", "transformer"]),
    "model.backbone": st.sampled_from(["minilm", "smollm2", "gpt2", "random"]),
    "model.tuning": st.sampled_from(["lora", "ln"]),
    "model.rank": st.integers(1, 512),
    "train.lr": st.floats(1e-8, 10, exclude_min=True),
    "train.rounds": st.integers(1, 10**6),
    "federation.supernodes": st.integers(1, 1024),
    "case-study.servers": lists(st.integers(1, 10), 1),
    "case-study.seeds": lists(st.integers(0, 2**40), 1) | st.integers(0, 9),
    "case-study.competitors": lists(st.sampled_from(COMPETITORS), 0),
}


@given(st.fixed_dictionaries({}, optional=VALID))
def test_what_is_rendered_is_what_is_parsed(flat: dict[str, Scalar]) -> None:
    config = parse(flat)
    again = to_flat(config)
    assert parse(again) == config
    assert set(again) == set(defaults())
    for key, value in flat.items():
        assert str(again[key]) == str(value) or float(again[key]) == float(value)


def test_defaults_are_those_of_pyproject_and_are_valid() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table = project["tool"]["flwr"]["app"]["config"]
    assert defaults()["data.users"] == table["data"]["users"]
    assert to_flat(parse({})) == defaults()
    assert "federations" not in project["tool"]["flwr"]  # flwr rewrites the file where it finds them


def test_every_key_says_what_it_means() -> None:
    for key, _, allowed, meaning in describe():
        assert meaning not in ("", "None"), key
        assert allowed


def test_a_configuration_is_frozen() -> None:
    config = parse({})
    with pytest.raises(ValidationError, match="frozen"):
        config.data.users = 3  # type: ignore[misc]


TEXT: dict[str, Scalar] = {"job": "train", "task": "text-classification"}
FLEET: dict[str, Scalar] = {"job": "train", "fleet.profiles": "phones"}
AIR: dict[str, Scalar] = {"wireless.transport": "air"}
BAD: list[tuple[dict[str, Scalar], str]] = [
    ({"data.user": 3}, "unknown key 'data.user'; did you mean 'data.users'?"),
    (
        {"train.rounds": "three"},
        "'train.rounds' = 'three' is not allowed: it must be an integer of at least 1",
    ),
    ({"train.rounds": 3.0}, "'train.rounds' = 3.0 is not allowed: it must be an integer of at least 1"),
    ({"train.rounds": True}, "'train.rounds' = True is not allowed: it must be an integer of at least 1"),
    ({"model.blocks": 0}, "'model.blocks' = 0 is not allowed: it must be an integer of at least 1"),
    ({"train.batch-rows": 0}, "'train.batch-rows' = 0 is not allowed: it must be an integer of at least 1"),
    ({"train.lr": 0}, "'train.lr' = 0 is not allowed: it must be a number above 0"),
    ({"train.lr": True}, "'train.lr' = True is not allowed: it must be a number above 0"),
    ({"train.lr": float("inf")}, "'train.lr' = inf is not allowed: it must be a number above 0"),
    (
        {"data.share": float("nan")},
        "'data.share' = nan is not allowed: it must be a number above 0 and at most 1",
    ),
    ({"resume": 1}, "'resume' = 1 is not allowed: it must be true or false"),
    ({"strategy": ""}, "'strategy' = '' is not allowed: it must be text that is not empty"),
    (
        {"model.tuning": "lorra"},
        "'model.tuning' = 'lorra' is not allowed: it must be 'lora', 'ln', 'full' or 'none'; did"
        " you mean 'lora'?",
    ),
    ({"data.scenario": "umo-nlos"}, "'data.scenario' = 'umo-nlos' is not allowed: it must be a comma list"),
    ({"data.scenario": "uma-nlos,uma-nlos"}, "'data.scenario' names uma-nlos twice"),
    (
        {"case-study.servers": "1,two"},
        "'case-study.servers' = '1,two' is not allowed: it must be a comma list",
    ),
    (
        {"case-study.servers": ""},
        "'case-study.servers' = '' is not allowed: it must be a comma list (not empty)",
    ),
    ({"case-study.competitors": "ridg"}, "did you mean 'ridge'?"),
    (
        {"data.speed-min-kmh": 120.0},
        "'data.speed-min-kmh' = 120 must not be above 'data.speed-max-kmh' = 100",
    ),
    ({"data.snr-train-min-db": 30.0}, "must not be above 'data.snr-train-max-db' = 20"),
    (
        {"case-study.servers": "1,30"},
        "more servers than shards: 'case-study.servers' = 30, but 'data.shards' = 10",
    ),
    ({"job": "train", "train.devices": 11}, "at most 10 servers are allowed, or more shards"),
    ({"data.shards": 21}, "is 105% of them; at most 20 shards are allowed"),
    ({"data.users": 19}, "leaves a shard without a user; at least 20 users are needed"),
    ({"data.partition": "scenario"}, "needs two scenarios or more; 'data.scenario' = 'uma-nlos' names one"),
    ({"data.partition": "speed", "data.speed-min-kmh": 100.0}, "needs a range of speeds; all are 100 km/h"),
    (
        {"model.anchor": "ar", "model.name": "gru"},
        "'model.anchor' = 'ar' is not allowed with 'model.name' = 'gru'",
    ),
    ({"model.backbone": "none"}, "'model.tuning' = 'lora' is not allowed with 'model.backbone' = 'none'"),
    ({"data.source": "channels.npz"}, "it must be 'sionna' or an absolute path"),
    ({"data.source": ""}, "it must be 'sionna' or an absolute path"),
    ({"data.source": "/nowhere/channels.npz"}, "'data.source' = '/nowhere/channels.npz' does not exist"),
    ({"data.source": __file__}, "it must be an .npz file or a folder of .mat files"),
    ({"data.test-source": "/nowhere"}, "'data.test-source' = '/nowhere' does not exist"),
    ({"model.weights": "/nowhere"}, "'model.weights' = '/nowhere' does not exist"),
    ({"compare.seeds": "1,2,1"}, "'compare.seeds' names 1 twice"),
    ({"compare.strategies": "fedit,median,fedit"}, "'compare.strategies' names fedit twice"),
    ({"job": "compare", "compare.strategies": ""}, "'compare.strategies' = '' is not allowed"),
    ({"job": "compare", "compare.seeds": ""}, "'compare.seeds' = '' is not allowed"),
    (
        {"job": "train", "train.devices": 4, "train.cohort": 5},
        "'train.cohort' = 5 must not be above 'train.devices' = 4",
    ),
    ({"model.blocks": 7}, "'model.blocks' = 7 is not allowed with 'model.backbone' = 'minilm', which has 6"),
    ({"train.ranks": "2,4"}, "the largest must be 'model.rank', and is 4"),
    ({"train.ranks": "2,16"}, "the largest must be 'model.rank', and is 16"),
    ({"train.ranks": "0,8"}, "'train.ranks' = '0,8' is not allowed"),
    ({"train.ranks": "4,8", "model.tuning": "ln"}, "is not allowed with 'model.tuning' = 'ln'"),
    ({"train.ranks": "4,8", "model.name": "gru"}, "is not allowed with 'model.name' = 'gru'"),
    ({"faults.attack": "nan"}, "'faults.attackers' = 0 is not allowed with 'faults.attack' = 'nan'"),
    (
        {"job": "train", "faults.attack": "nan", "faults.attackers": 11},
        "'faults.attackers' = 11 is not allowed with 'faults.attack' = 'nan' and 'train.devices' = 10",
    ),
    ({"faults.attack": "nan", "faults.attackers": 2}, "and 'case-study.servers' = 1: it must be 1 to 1"),
    (
        {"model.precision": "float64"},
        "with 'task' = 'channel-prediction', whose data are float32",
    ),
    (
        {"split.heads": "frozen"},
        "with 'task' = 'channel-prediction', whose head starts at zero",
    ),
    (
        TEXT | {"text.source": "rotten-tomatos"},
        "'text.source' = 'rotten-tomatos' is not allowed: it must be rotten-tomatoes, imdb, bbc-news,"
        " hub:OWNER/NAME or an absolute path; did you mean 'rotten-tomatoes'?",
    ),
    (TEXT | {"text.source": "texts/mine.csv"}, "'text.source' = 'texts/mine.csv' is not allowed: it must be"),
    (TEXT | {"text.source": "hub:"}, "'text.source' = 'hub:' is not allowed: it must be"),
    (TEXT | {"text.source": "/nowhere.csv"}, "'text.source' = '/nowhere.csv' does not exist"),
    (TEXT | {"text.pool": "first", "model.backbone": "random-gpt2"}, "'text.pool' = 'first' is not allowed"),
    (TEXT | {"task": "language-modelling"}, "'model.backbone' = 'minilm' is not allowed with 'task'"),
    (TEXT | {"model.backbone": "none", "model.name": "gru"}, "is not allowed with 'model.backbone' = 'none'"),
    (
        FLEET | {"job": "case-study"},
        "'fleet.profiles' = 'phones' is not allowed with 'job' = 'case-study', whose servers have wires;",
    ),
    (
        FLEET | AIR | {"selection.mode": "asynchronous"},
        "'wireless.transport' = 'air' is not allowed with 'selection.mode' = 'asynchronous', whose devices do"
        " not send together; it must be 'ofdma', or the mode 'synchronous'",
    ),
    (
        FLEET | AIR | {"selection.mode": "over-selection"},
        "with 'selection.mode' = 'over-selection', which would add up the late ones too; it must be 'ofdma'",
    ),
    (
        FLEET | AIR | {"fleet.capacity": __file__},
        "'wireless.transport' = 'air' is not allowed with 'fleet.capacity', whose links are rates",
    ),
    (
        FLEET | AIR | {"fleet.speeds": __file__},
        "'air' is not allowed with 'fleet.speeds', whose links are rates",
    ),
    (
        FLEET | {"selection.mode": "asynchronous", "fedbuff.buffer": 4, "train.cohort": 3},
        "'fedbuff.buffer' = 4 could never fill: 3 devices are at work; it must be 1 to 3",
    ),
    (
        FLEET | {"wireless.scenario": "indoor", "wireless.indoor-share": 0.5},
        "'wireless.indoor-share' = 0.5 is not allowed with 'wireless.scenario' = 'indoor'",
    ),
    (
        FLEET | {"fleet.behaviour": "mine.csv"},
        "'fleet.behaviour' = 'mine.csv' is not allowed: it must be an abs",
    ),
    (
        FLEET | {"fleet.capacity": "/nowhere"},
        "'fleet.capacity' = '/nowhere' does not exist; it must name a file",
    ),
    (FLEET | {"fleet.profiles": "phone"}, "'fleet.profiles' = 'phone' is not allowed: it must be"),
    (
        FLEET | {"selection.deadline-s": 0},
        "'selection.deadline-s' = 0 is not allowed: it must be a number above 0",
    ),
    (FLEET | {"wireless.cells": 3}, "'wireless.cells' = 3 is not allowed: it must be"),
    ({"results": "runs/1"}, "'results' = 'runs/1' is not allowed: it must be an absolute path"),
    ({"results": __file__}, "is a file; it must be a folder"),
]


@pytest.mark.parametrize(
    ("flat", "reason"), BAD, ids=[", ".join(f"{k}={v}" for k, v in f.items())[:50] for f, _ in BAD]
)
def test_what_cannot_run_is_refused_in_one_sentence(flat: dict[str, Scalar], reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(flat)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_twenty_shards_of_a_twentieth_are_exactly_enough() -> None:
    assert parse({"job": "train", "data.shards": 20, "train.devices": 20}).train.devices == 20
    assert parse({"data.shards": 20, "case-study.servers": "20"}).case_study.servers == (20,)


def test_what_a_job_does_not_use_is_not_held_against_it() -> None:
    halves = {"case-study.servers": "1,2", "data.share": 0.5, "data.shards": 2}
    assert parse(halves).train.devices > 2
    assert parse({"model.name": "gru", "model.backbone": "none"}).model.name == "gru"


def test_a_text_task_ignores_channels_and_their_models() -> None:
    channels: dict[str, Scalar] = {
        "data.shards": 3,
        "data.source": "/nowhere.npz",
        "data.speed-min-kmh": 120.0,
        "data.partition": "scenario",
        "model.name": "gru",
        "model.anchor": "ar",
    }
    assert parse(TEXT | channels | {"model.precision": "float64"}).train.devices == 10
    language = {"task": "language-modelling", "model.backbone": "smollm2", "text.pool": "first"}
    assert parse(TEXT | language | {"text.source": "hub:imdb"}).text.pool == "first"


def test_the_rules_know_what_there_is() -> None:
    from fedlam_app import rules
    from fedlam_app.data.text import PACKAGES
    from fedlam_app.models import backbones
    from fedlam_app.tasks import TASKS

    assert set(rules.TEXT_SOURCES) == set(PACKAGES)
    assert set(rules.TEXT_TASKS) == set(TASKS) - {"channel-prediction", rules.MIXTURE}
    assert {*rules.CAUSAL, *rules.NOT_CAUSAL} >= set(backbones.NAMES)
    assert set(rules.BLOCKS) >= set(backbones.NAMES) - {"none"}
    for name in ("random", "random-gpt2"):  # those that need no weights
        with pytest.raises(ValueError, match=f"1 to {rules.BLOCKS[name]} blocks"):
            backbones.load(name, blocks=rules.BLOCKS[name] + 1)


def test_identity_ignores_where_a_run_executes() -> None:
    base = defaults()
    moved = base | {"results": "/elsewhere", "resume": True, "federation.supernodes": 7}
    assert identity(moved) == identity(base)
    assert identity(base | {"seed": 1}) != identity(base)


def test_results_have_a_folder_of_their_own(home: Path) -> None:
    assert results_folder(parse({})) == home / "fedlam-runs" / "case-study"
    assert results_folder(parse({"results": "/x"})) == Path("/x")
