"""The fleet in a federation: endings, the clock, who is trained, versions, unbiased sums, resumption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlam_app.client_app import app
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.tasks import TASKS
from fedlam_app.wireless.fleet import Load
from strategies.base import Federation
from strategies.concurrent import Concurrent
from strategies.endings import Course, deadline, over_selection, synchronous
from strategies.participation import Heard
from strategies.wireless import Wireless
from tests.tiny import tiny_run, tiny_text_run

FLEET: dict[str, Scalar] = {
    "fleet.profiles": "mixed",
    "fleet.on-share": 0.8,
    "selection.policy": "random",
    "train.cohort": 3,
}


# --- endings ----------------------------------------------------------------------------------------------


def course(
    down: Sequence[float],
    compute: Sequence[float],
    up: Sequence[float],
    session: Sequence[float] | float = np.inf,
    intact: Sequence[bool] | bool = True,
) -> Course:
    k = len(down)
    return Course(
        down_s=np.array(down, float),
        compute_s=np.array(compute, float),
        up_s=np.array(up, float),
        session_s=np.broadcast_to(np.array(session, float), (k,)),
        intact=np.broadcast_to(np.array(intact, bool), (k,)),
    )


def test_a_synchronous_round_by_hand() -> None:
    ending = synchronous(
        course(
            [1, 1, 1, 1],
            [2, 3, 10, 1],
            [1, 1, 1, np.inf],
            [np.inf, np.inf, 6, np.inf],
            [True, False, True, True],
        ),
        8,
    )
    assert ending.arrived.tolist() == [True, False, False, False]
    assert ending.lost.tolist() == [False, True, True, False]  # a lost packet, a session that broke at 6 s
    assert ending.late.tolist() == [False, False, False, True]  # no band: never asked
    assert ending.round_s == 6.0
    assert ending.worked_s.tolist() == [4, 5, 6, 0]
    assert ending.steps.tolist() == [8, 8, 8, 0]


def test_a_deadline_lets_each_do_what_fits() -> None:
    ending = deadline(course([1, 1, 1], [4, 16, 100], [1, 1, 1]), 8, 10.0)
    assert ending.steps.tolist() == [8, 4, 0]
    assert ending.arrived.tolist() == [True, True, False]
    assert ending.late.tolist() == [False, False, True]
    assert ending.time_s.tolist() == [6.0, 10.0, 102.0]
    assert ending.round_s == 10.0


def test_over_selection_ends_with_the_last_that_was_wanted() -> None:
    ending = over_selection(course([0] * 4, [1, 2, 3, 4], [0] * 4, intact=[True, False, True, True]), 8, 2)
    assert ending.arrived.tolist() == [True, False, True, False]
    assert ending.lost.tolist() == [False, True, False, False]
    assert ending.round_s == 3.0
    assert ending.worked_s.tolist() == [1, 2, 3, 3]


seconds = st.floats(0.0, 1e4)


@given(
    rows=st.lists(st.tuples(seconds, seconds, seconds, seconds, st.booleans()), min_size=1, max_size=12),
    wanted=st.integers(1, 12),
    limit=st.floats(0.1, 1e4),
)
def test_every_ending_sorts_each_device_into_one_of_three(
    rows: list[tuple[float, float, float, float, bool]], wanted: int, limit: float
) -> None:
    down, compute, up, session, intact = map(np.array, zip(*rows, strict=True))
    given_course = course(down, compute, up, session, intact)
    whole = synchronous(given_course, 8)
    by_deadline = deadline(given_course, 8, limit)
    first = over_selection(given_course, 8, wanted)
    for ending in (whole, by_deadline, first):
        assert not (ending.arrived & ending.lost).any()
        assert (ending.arrived | ending.lost | ending.late).all()
        assert (ending.time_s[ending.arrived] <= ending.round_s * (1 + 1e-12)).all()
        assert (ending.steps[ending.arrived] > 0).all()
        assert (ending.worked_s <= ending.round_s + 1e-9).all()
    assert by_deadline.round_s <= limit * (1 + 1e-9)
    assert first.round_s <= whole.round_s
    assert first.arrived.sum() == min(wanted, whole.arrived.sum())


# --- a federation in a fleet ------------------------------------------------------------------------------


def federation_of(flat: dict[str, Scalar]) -> tuple[RunConfig, Federation]:
    config = parse({"federation.supernodes": 1, **flat})
    task = TASKS[config.task](config)
    task.prepare()
    return config, federate(config, "{}", task, task.build_model())


def trained(flat: dict[str, Scalar], rounds: int, supernodes: int = 1, resume_after: int = 0) -> Federation:
    """Run some rounds in process; stop after ``resume_after`` of them, and go on from the saved arrays."""
    flat = {**flat, "federation.supernodes": supernodes}
    _, federation = federation_of(flat)
    grid = InProcessGrid(app, supernodes, flat)
    for number in range(1, rounds + 1):
        federation.train_round(grid, number)
        if number == resume_after:
            saved = {key: np.array(value) for key, value in federation.state().items()}
            _, federation = federation_of(flat)
            federation.load(saved)
            grid = InProcessGrid(app, supernodes, flat)
    return federation


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setenv("FEDLAM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkey.setenv("FEDLAM_DEVICES", str(tmp_path_factory.mktemp("devices")))


MODES: dict[str, dict[str, Scalar]] = {
    "synchronous": {},
    "deadline": {"selection.deadline-s": 20.0},
    "over-selection": {},
    "asynchronous": {"fedbuff.buffer": 2},
}


def in_fleet(flat: dict[str, Scalar], mode: str, **more: Scalar) -> dict[str, Scalar]:
    extra = {key.replace("__", "."): value for key, value in more.items()}
    return {**flat, **FLEET, "train.devices": 8, "selection.mode": mode, **MODES[mode], **extra}


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    flat = tiny_run(tmp_path_factory.mktemp("channels"), users=60)
    return {**flat, "data.users": 48, "data.shards": 8, "data.share": 0.125}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    return tiny_text_run(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", ["fedavg-lora", "fedsgd-lora", "median", "flora"])
def test_the_control_plane_is_one_for_any_supernodes_and_after_a_resume(
    texts: dict[str, Scalar], strategy: str, mode: str
) -> None:
    flat = in_fleet(texts, mode, strategy=strategy, wireless__loss="rayleigh", robust__byzantine=0)
    one = trained(flat, 3)
    for other in (trained(flat, 3, supernodes=3), trained(flat, 3, resume_after=2)):
        ours, theirs = one.state(), other.state()
        assert set(ours) == set(theirs)
        for key, array in ours.items():
            np.testing.assert_array_equal(array, theirs[key], err_msg=key)
    assert one.seconds() > 0.0


@pytest.mark.parametrize("mode", MODES)
def test_only_those_who_arrive_are_trained_and_every_chosen_one_is_counted(
    texts: dict[str, Scalar], mode: str
) -> None:
    """Half of the packets are lost, and the devices' own work is counted where it is done."""
    flat = in_fleet(texts, mode, strategy="fedavg-lora", wireless__loss="rayleigh")
    flat |= {
        "wireless.radius-m": 3000.0,
        "wireless.tx-power-dbm": 5.0,
        "train.cohort": 6,
        "federation.supernodes": 2,
    }
    _, federation = federation_of(flat)
    grid = InProcessGrid(app, 2, flat)
    for number in range(1, 7):
        federation.train_round(grid, number)
    orders = [
        device
        for message in grid.delivered
        if message.metadata.message_type == "train"
        and "devices" in message.content.config_records["config"]
        and message.content.config_records["config"]["type"] == "TrainOrder"
        for device in message.content.config_records["config"]["devices"]  # type: ignore[union-attr]
    ]
    said = federation.hands.participation.summary()
    assert len(orders) == said["arrived"]
    assert said["trained"] == said["arrived"] + said["lost"]
    assert said["chosen"] == said["trained"] + said["late"]
    assert said["lost"] > 0


def wireless(config: RunConfig, steps: int = 1, examples: NDArray[np.float32] | None = None) -> Wireless:
    own = np.full(config.train.devices, 20.0, np.float32) if examples is None else examples
    kind = Concurrent if config.selection.mode == "asynchronous" else Wireless
    return kind(config, steps, own)


LOAD = Load(flops=2e9, bits_up=8e6, bits_down=8e6, broadcast=True)


def heard(ids: Sequence[int]) -> Heard:
    return Heard(loss=dict.fromkeys(ids, 1.0), norm=dict.fromkeys(ids, 1.0))


def test_concurrent_events_come_in_the_order_of_virtual_finishing_times() -> None:
    config = parse(
        {
            **FLEET,
            "job": "train",
            "train.devices": 60,
            "train.cohort": 12,
            "selection.mode": "asynchronous",
            "fedbuff.buffer": 3,
            "data.shards": 60,
            "data.share": 0.01,
            "data.users": 300,
        }
    )
    fleet = wireless(config)
    assert isinstance(fleet, Concurrent)
    finishes: list[float] = []
    for number in range(1, 40):
        turn = fleet.turn(number, lambda: LOAD, None)
        back = fleet._back
        assert back is not None
        events = back.jobs["finish_s"].tolist()
        assert events == sorted(events)
        assert len(turn.ids) == 3 == int(back.jobs["arrives"].sum())
        assert all(version < number for version in turn.versions)
        finishes += events
        fleet.settle(heard(turn.ids))
        assert fleet.seconds() == events[-1]
        assert len(fleet.work) <= 12
    assert finishes == sorted(finishes)


def test_the_payload_that_really_went_moves_the_clock() -> None:
    config = parse(
        {
            **FLEET,
            "job": "train",
            "train.devices": 20,
            "data.shards": 20,
            "data.share": 0.05,
            "fleet.on-share": 1.0,
        }
    )
    planned, real = wireless(config), wireless(config)
    turn = planned.turn(1, lambda: LOAD, None)
    planned.settle(heard(turn.ids))
    turn = real.turn(1, lambda: LOAD, None)
    told = heard(turn.ids)
    told.bytes_up = dict.fromkeys(turn.ids, 2_000_000)  # twice what was planned
    real.settle(told)
    assert real.seconds() > planned.seconds() + 0.1


def test_weights_make_up_for_how_devices_are_drawn() -> None:
    """The mean of the updates over many draws is everyone's, and lost packets do not bend it."""
    devices = 40
    config = parse(
        {
            **FLEET,
            "job": "train",
            "train.devices": devices,
            "train.cohort": 6,
            "data.shards": devices,
            "data.share": 0.02,
            "data.users": 300,
            "selection.policy": "importance",
            "fleet.on-share": 1.0,
            "fleet.moving": 0.0,
            "wireless.loss": "rayleigh",
            "wireless.radius-m": 1500.0,
        }
    )
    draw = np.random.default_rng(5)
    examples = draw.integers(10, 40, devices).astype(np.float32)
    update = draw.standard_normal(devices)
    fleet = wireless(config, examples=examples)
    fleet.history.norm[:] = draw.uniform(0.5, 3.0, devices)
    found, plain = [], []
    for number in range(1, 2001):
        turn = fleet.turn(number, lambda: LOAD, None)
        weight = np.array(turn.factors) * examples[turn.ids]
        found.append(float(weight @ update[turn.ids]) / turn.base)
        plain.append(float(np.average(update[turn.ids], weights=examples[turn.ids])) if turn.ids else 0.0)
        fleet.settle(Heard())  # nothing heard: norms stay, so that the draws are alike
    reached = fleet.fleet.look(1, 6, LOAD).ids
    truth = float(examples[reached] @ update[reached]) / float(examples[reached].sum())
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 3.0 * error
    assert abs(np.mean(plain) - truth) > 3.0 * np.std(plain) / np.sqrt(len(plain))


def plain_fleet(**more: Scalar) -> RunConfig:
    flat: dict[str, Scalar] = {
        **FLEET,
        "job": "train",
        "train.devices": 60,
        "train.cohort": 10,
        "data.shards": 60,
        "data.share": 0.01,
        "data.users": 300,
        "fleet.on-share": 1.0,
    }
    return parse(flat | {key.replace("__", ".").replace("_", "-"): value for key, value in more.items()})


@pytest.mark.parametrize("mode", ["synchronous", "deadline"])
def test_least_energy_does_not_whisper_below_what_is_heard(mode: str) -> None:
    """Small payloads with much time: the solver would spread them over the band at next to no power."""
    config = plain_fleet(wireless__allocation="min-energy", selection__mode=mode)
    fleet, small = wireless(config), Load(flops=1e9, bits_up=2.4e5, bits_down=2.4e5, broadcast=True)
    for number in range(1, 11):
        fleet.settle(heard(fleet.turn(number, lambda: small, None).ids))
    assert fleet.tally.arrived == fleet.tally.chosen == 100


def test_who_does_not_answer_a_poll_is_chosen_last() -> None:
    fleet = wireless(plain_fleet(selection__policy="power-of-choice", selection__candidates=3.0))
    asked: list[int] = []

    def poll(ids: Sequence[int]) -> dict[int, float]:
        asked[:] = ids
        return {k: 1.0 + k for k in ids[:15]}

    turn = fleet.turn(1, lambda: LOAD, poll)
    assert len(asked) == 30
    assert set(turn.ids) <= set(asked[:15])
    fleet.settle(heard(turn.ids))
    assert fleet.tally.polled == 30 and fleet.tally.poll_bytes > 30 * 1e6
    assert fleet.seconds() > 0.0


@pytest.mark.parametrize(("mode", "budget_j"), [("synchronous", 0.01), ("asynchronous", 0.001)])
def test_a_budget_that_is_spent_recovers_with_time(mode: str, budget_j: float) -> None:
    """Lyapunov chooses nobody while its energy queues are full, and time still goes on."""
    config = plain_fleet(
        selection__policy="lyapunov",
        selection__energy_budget_j=budget_j,
        selection__mode=mode,
        fedbuff__buffer=3,
    )
    fleet, arrived = wireless(config), []
    for number in range(1, 200):
        turn = fleet.turn(number, lambda: LOAD, None)
        fleet.settle(heard(turn.ids))
        arrived.append(len(turn.ids))
    assert 0 in arrived and sum(arrived[30:]) > 0
