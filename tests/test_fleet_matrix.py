"""Every rule under every policy and mode of the fleet: each pair under one mode, the product nightly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedlam_app import checks
from fedlam_app.config import parse
from strategies import ALGORITHMS, wireless
from strategies.selection import POLICIES
from strategies.wireless import IDLE_WAIT_S
from tests.fleet_runs import FLEET, Flat, Made, run, survives
from tests.tiny import tiny_mixture_run, tiny_run, tiny_text_run

RADIO = [name for name in ALGORITHMS if name not in ("local", "central")]  # those two have none
MODES: dict[str, Flat] = {
    "synchronous": {},
    "deadline": {"selection.deadline-s": 25.0},
    "over-selection": {},
    "asynchronous": {},
}
OWN: dict[str, Flat] = {
    "fedavg-full": {"model.tuning": "full"},
    "trimmed-mean": {"robust.trim": 0.34},
    "multi-krum": {"robust.byzantine": 0},
    "hetlora": {"train.ranks": "2,8"},
    "flexlora": {"train.ranks": "2,8"},
    "flora": {"train.ranks": "2,8"},
    "fed-sb": {"train.cohort": 2},  # its probe is dear
}


@pytest.fixture(scope="module", autouse=True)
def one_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("FEDLAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Flat]:
    folder = tmp_path_factory.mktemp("data")
    channels = tiny_run(folder, users=60)
    return {
        "text-classification": tiny_text_run(folder) | {"text.max-tokens": 8},
        "channel-prediction": channels | {"data.users": 48, "data.shards": 8, "data.share": 0.125},
        "mixture": tiny_mixture_run(),
    }


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    return {}


def dealt(strategy: str, policy: str) -> str:
    """The mode under which a strategy meets a policy where not all are run."""
    return list(MODES)[(RADIO.index(strategy) + list(POLICIES).index(policy)) % len(MODES)]


def saves(strategy: str, policy: str) -> bool:
    """Whether a dealt run is saved and loaded: a quarter of them are."""
    return (RADIO.index(strategy) + list(POLICIES).index(policy) * 3) % 4 == 0


def flat_of(base: Flat, strategy: str, policy: str, mode: str) -> Flat:
    named: Flat = {"strategy": strategy, "selection.policy": policy, "selection.mode": mode}
    return {**base, **FLEET, **MODES[mode], **OWN.get(strategy, {}), **named, "federation.server-threads": 1}


# --- the matrix -------------------------------------------------------------------------------------------

DEALT = [(strategy, policy) for strategy in RADIO for policy in POLICIES]


@pytest.mark.parametrize(("strategy", "policy"), DEALT, ids=["-".join(pair) for pair in DEALT])
def test_every_strategy_runs_under_every_policy(
    tasks: dict[str, Flat], made: dict[str, Made], strategy: str, policy: str
) -> None:
    flat = flat_of(tasks["text-classification"], strategy, policy, dealt(strategy, policy))
    checks.check(parse(flat))
    federation, _ = run(flat, made, 2)
    if saves(strategy, policy):
        survives(federation, flat, made)


def test_the_deal_leaves_out_no_policy_or_mode() -> None:
    for strategy in RADIO:
        assert {dealt(strategy, policy) for policy in POLICIES} == set(MODES)
    pairs = {(policy, dealt(strategy, policy)) for strategy, policy in DEALT}
    assert len(pairs) == len(POLICIES) * len(MODES)
    for name in range(2):  # every strategy and every policy is saved and loaded
        assert len({pair[name] for pair in DEALT if saves(*pair)}) == (len(RADIO), len(POLICIES))[name]


OTHERS = [
    ("channel-prediction", "fedsgd-lora"),  # the embedding trains: two exchanges a step
    ("channel-prediction", "fedavg-lora"),
    ("mixture", "fedavg-full"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("task", "strategy"), OTHERS, ids=["-".join(pair) for pair in OTHERS])
def test_other_tasks_too(
    tasks: dict[str, Flat], made: dict[str, Made], task: str, strategy: str, mode: str
) -> None:
    flat = flat_of(tasks[task], strategy, "lyapunov", mode)
    checks.check(parse(flat))
    federation, _ = run(flat, made, 2)
    survives(federation, flat, made)


# --- worlds in which nothing comes ------------------------------------------------------------------------


def test_a_round_that_nobody_can_be_in_time_for_takes_time(
    tasks: dict[str, Flat], made: dict[str, Made]
) -> None:
    flat = flat_of(tasks["text-classification"], "fedavg-lora", "random", "deadline")
    federation, _ = run({**flat, "selection.deadline-s": 1e-3}, made, 3)
    said = federation.hands.participation.summary()
    assert said["late"] == said["chosen"] > 0
    assert federation.hands.participation.seconds() == 3 * IDLE_WAIT_S


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_where_nobody_can_ever_be_reached_the_run_ends_with_a_sentence(
    tasks: dict[str, Flat], made: dict[str, Made], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(wireless, "LONGEST_WAIT_S", 6 * 3600.0)  # a week takes the test too long
    flat = flat_of(tasks["text-classification"], "fedavg-lora", "random", mode)
    with pytest.raises(RuntimeError, match=r"no device could be reached for 0\.25 days of virtual time; see"):
        run({**flat, "wireless.tx-power-dbm": -150.0}, made, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", RADIO)
def test_the_whole_product(
    tasks: dict[str, Flat], made: dict[str, Made], strategy: str, policy: str, mode: str
) -> None:
    flat = flat_of(tasks["text-classification"], strategy, policy, mode)
    federation, _ = run(flat, made, 3)
    survives(federation, flat, made)
