"""Faults in the split: who is gone costs its share and no more, who lies is left out and named, no drift.

The yardstick is a run in which the device was not there in that step: lost, refused or rejected must be the
same to the last bit, on the server and in the memory of every device.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from clients.faults import vanishes
from fedlam_app.base.keys import rng
from fedlam_app.base.records import SplitOrder, SplitReport, decode, encode, join, kind_of, refuse, reply
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.split_payload import Uplink, from_bytes, from_integers, to_bytes, to_integers
from fedlam_app.client_app import app
from tests.split_runs import Client, Flat, Reference, Run, channel_run, text_run, tiny_backbones

__all__ = ["tiny_backbones"]  # a fixture that every test here uses

BAD, STEP = 1, 2  # the device that goes wrong, and the step in which it does
PLAIN: Flat = {"server.optimiser": "sgd", "server.momentum": 0.0, "train.clip-norm": 0.0}
Edit = Callable[[Message, SplitOrder, SplitReport], Message]


def client(change: Edit) -> Client:
    """Return the real client whose answer to the order of step ``STEP`` is changed after all its work."""

    def changed(message: Message, context: Context) -> Message:
        answer = app(message, context)
        if kind_of(message.content) != "SplitOrder" or answer.has_error():
            return answer
        order = decode(message.content, SplitOrder)
        if STEP not in order.shown or BAD not in order.devices:
            return answer
        return change(message, order, decode(answer.content, SplitReport))

    return changed


def packed(parts: list[NDArray[np.uint8]]) -> dict[str, Any]:
    payload, sizes = join(parts, np.uint8)
    return {"payload": payload, "sizes": sizes}


def lost(message: Message, order: SplitOrder, report: SplitReport) -> Message:
    """The SuperNode has one device, which did its work, and its word was lost on the way."""
    return reply(replace(report, devices=[], weights=[], losses=[], **packed([])), message)


def same(one: Run, other: Run) -> None:
    """Check that two runs agree to the last bit, on the server and on every device."""
    np.testing.assert_array_equal(one.lora, other.lora)
    assert one.federation.known == other.federation.known
    for device in one.federation.known:
        np.testing.assert_array_equal(one.kept(device), other.kept(device))


def at(run: Run, step: int) -> list[int]:
    """Return the devices of a step."""
    return [fold.device for fold in run.folds if fold.step == step]


# --- who is gone ------------------------------------------------------------------------------------


def test_a_third_vanishes_and_the_rest_is_renormalised(tmp_path: Path) -> None:
    """Three epochs: each step is the mean over those that answered, and heads know only what was answered."""
    keys = PLAIN | {"faults.vanish": 0.3, "train.rounds": 6, "train.local-steps": 2}
    run = Run(text_run(tmp_path) | keys, tmp_path)
    assert all(not cost.failures for cost in run.rounds()), "to vanish is no error"
    config, vector = run.config, run.start
    for step in range(1, 13):
        folds = [fold for fold in run.folds if fold.step == step]
        assert [fold.device for fold in folds] == [k for k in range(4) if not vanishes(config, k, step)]
        if folds:
            np.testing.assert_allclose(folds[0].at, vector, rtol=0, atol=1e-14)
            weights = np.array([fold.weight for fold in folds])
            mean = weights @ np.stack([fold.gradient for fold in folds]) / weights.sum()
            vector = folds[0].at - learning_rate(config.train.lr, config.train.rounds, step / 2) * mean
    assert 24 < len(run.folds) < 44
    np.testing.assert_allclose(run.lora, vector, rtol=0, atol=1e-14)
    reference = Reference(run)
    for fold, true in reference.follow(run.folds):
        np.testing.assert_allclose(fold.gradient, true, rtol=1e-8, atol=1e-12)
    for device, head in reference.heads.items():
        np.testing.assert_allclose(run.kept(device), head, rtol=1e-9, atol=1e-12)
    came = run.sent_up()
    assert len(came) == len(set(came)) == 64, "each embedding came up once, after whatever was lost"


@pytest.mark.parametrize(
    "keys", [{}, {"wire.delta": True}, {"wire.jacobian": "top-k"}], ids=["plain", "delta", "top-k"]
)
def test_a_lost_reply_is_as_if_the_device_had_not_been_asked(keys: Flat, tmp_path: Path) -> None:
    """Its head, and what its links remember, roll back, though it had stepped and saved."""

    def deaf(message: Message, context: Context) -> Message:
        if kind_of(message.content) == "SplitOrder":
            order = decode(message.content, SplitOrder)
            if STEP in order.shown and BAD in order.devices:
                return refuse("out of reach", message)
        return app(message, context)

    flat = text_run(tmp_path, train__rounds=9) | keys
    runs = [Run(flat, tmp_path, who, supernodes=4) for who in (client(lost), deaf, app)]
    costs = [run.rounds() for run in runs]
    same(runs[0], runs[1])
    assert at(runs[0], STEP) == at(runs[1], STEP) == [0, 2, 3]
    assert costs[1][STEP - 1].failures == [f"round {STEP}: out of reach"] and not costs[0][STEP - 1].failures
    assert not np.array_equal(runs[0].kept(BAD), runs[2].kept(BAD))
    for run in runs:
        came = run.sent_up()
        assert len(came) == len(set(came)) == 64


def test_a_supernode_that_fails_takes_only_its_devices_along(tmp_path: Path) -> None:
    """It had received embeddings and done the work of two devices; both are asked again in the next step."""
    run = Run(text_run(tmp_path), tmp_path, client(lambda message, *_: refuse("power cut", message)))
    costs = run.rounds()
    assert at(run, STEP) == [2, 3] and at(run, STEP + 1) == [0, 1, 2, 3]
    assert [cost.failures for cost in costs] == [[], [f"round {STEP}: power cut"], [], [], [], []]
    came = run.sent_up()
    assert len(came) == len(set(came)) == 64
    reference = Reference(run)
    for fold, true in reference.follow(run.folds):
        np.testing.assert_allclose(fold.gradient, true, rtol=1e-8, atol=1e-12)


def test_a_round_that_nobody_answers_is_an_error(tmp_path: Path) -> None:
    run = Run(text_run(tmp_path, faults__vanish=1.0), tmp_path)
    with pytest.raises(RuntimeError, match="no device finished round 1: every device vanished"):
        run.rounds()

    def broken(message: Message, context: Context) -> Message:
        return refuse("no power", message)

    run = Run(text_run(tmp_path), tmp_path, broken)
    with pytest.raises(RuntimeError, match=r"no device finished round 1: round 1: no power"):
        run.rounds()


@pytest.mark.parametrize("heads", ["personal", "averaged"])
def test_channels_go_on_without_those_who_vanish(heads: str, tmp_path: Path) -> None:
    """An embedding that trains: the gradient of a lost step never comes down, and nobody waits for it."""
    run = Run(channel_run(tmp_path, faults__vanish=0.4, split__heads=heads), tmp_path)
    assert all(not cost.failures for cost in run.rounds())
    for step in range(1, 7):
        assert at(run, step) == [k for k in range(4) if not vanishes(run.config, k, step)]
    if heads == "personal":
        for fold, true in Reference(run).follow(run.folds):
            assert np.linalg.norm(fold.gradient - true) < 1e-3 * np.linalg.norm(true)


# --- who lies ---------------------------------------------------------------------------------------


def lie(weight: float | None = None, loss: float | None = None, **parts: Callable[[bytes], bytes]) -> Edit:
    """Return an edit of what ``BAD`` sends, alone on its SuperNode: weight, loss, parts of its ``Uplink``."""

    def changed(message: Message, order: SplitOrder, report: SplitReport) -> Message:
        up = from_bytes(report.payload, Uplink)
        payloads = [to_bytes(replace(up, **{name: edit(getattr(up, name)) for name, edit in parts.items()}))]
        weights = report.weights if weight is None else [weight]
        losses = report.losses if loss is None else [loss]
        return reply(replace(report, weights=weights, losses=losses, **packed(payloads)), message)

    return changed


def doubles(value: float) -> Callable[[bytes], bytes]:
    return lambda data: data[:-8] + np.array([value]).tobytes()


def longer(data: bytes) -> bytes:
    """One sample has more tokens than the backbone has places."""
    lengths = from_integers(data)
    return to_integers(np.concatenate([[40], lengths[1:]]))


LIES: dict[str, tuple[Edit, str]] = {
    "nan Jacobian": (lie(jacobians=doubles(np.nan)), "Jacobians are not finite"),
    "infinite Jacobian": (lie(jacobians=doubles(np.inf)), "Jacobians are not finite"),
    "huge Jacobian": (lie(jacobians=doubles(-1e30)), "Jacobians must be at most 1e.12, got 1e.30"),
    "short Jacobian": (lie(jacobians=lambda data: data[:-8]), "in fp64 has .* bytes, got"),
    "no Jacobian": (lie(jacobians=lambda data: b""), "in fp64 has .* bytes, got 0"),
    "nan embedding": (lie(embeddings=doubles(np.nan)), "embeddings are not finite"),
    "short embedding": (lie(embeddings=lambda data: data[:-1]), "in fp64 has .* bytes, got"),
    "too many samples": (lie(lengths=lambda data: data + b"\x01\x00"), "samples where . were asked for"),
    "too few samples": (lie(lengths=lambda data: data[2:]), "samples where . were asked for"),
    "half a length": (lie(lengths=lambda data: data[1:]), "buffer size must be a multiple"),
    "a text of no tokens": (lie(lengths=lambda data: b"\0\0" + data[2:]), "must have 1 to 16 tokens, got 0"),
    "a text too long": (lie(lengths=longer), "must have 1 to 16 tokens, got"),
    "nan weight": (lie(weight=float("nan")), "weight must be a positive number, got nan"),
    "negative weight": (lie(weight=-4.0), "weight must be a positive number, got -4"),
    "infinite weight": (lie(weight=float("inf")), "weight must be a positive number, got inf"),
    "nan loss": (lie(loss=float("nan")), "loss must be a finite number, got nan"),
}
DONE: list[Run] = []


@pytest.fixture
def truth(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in which the word of ``BAD`` in step ``STEP`` was lost, done once."""
    if not DONE:
        folder = tmp_path_factory.mktemp("truth")
        DONE.append(Run(text_run(folder, train__rounds=3), folder, client(lost), supernodes=4))
        DONE[0].rounds()
    return DONE[0]


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_left_out_named_and_counted(name: str, truth: Run, tmp_path: Path) -> None:
    """And nobody else can tell: the same bits as if the liar had been out of reach."""
    change, sentence = LIES[name]
    run = Run(text_run(tmp_path, train__rounds=3), tmp_path, client(change), supernodes=4)
    costs = run.rounds()
    same(run, truth)
    ((failure,), others) = costs[STEP - 1].failures, costs[0].failures + costs[2].failures
    assert re.search(rf"step 2: device 1 was left out: .*{sentence}", failure) and not others


def content(report: SplitReport, **scalars: Any) -> RecordDict:
    """Return a report's record with some scalars replaced (``None``: taken out)."""
    whole = encode(report)
    kept = {**whole.config_records["config"], **scalars}
    config = ConfigRecord({key: value for key, value in kept.items() if value is not None})
    return RecordDict({"arrays": whole.array_records["arrays"], "config": config})


def with_array(data: bytes) -> Callable[[SplitReport], RecordDict]:
    def made(report: SplitReport) -> RecordDict:
        array = Array("uint8", (len(report.payload),), "numpy.ndarray", data)
        return RecordDict({**content(report), "arrays": ArrayRecord({"payload": array})})

    return made


NOISE = rng(7, "garbage").bytes(999)
GARBAGE: dict[str, Callable[[SplitReport], RecordDict]] = {
    "noise for a payload": lambda r: encode(replace(r, **packed([np.frombuffer(NOISE, np.uint8)]))),
    "a payload of two bytes": lambda r: encode(replace(r, **packed([np.zeros(2, np.uint8)]))),
    "noise for an array": with_array(NOISE),
    "no bytes for an array": with_array(b""),
    "a zip for an array": with_array(b"PK\x03\x04" + NOISE),
    "no array": lambda r: RecordDict({"config": content(r)["config"]}),
    "sizes that do not fit": lambda r: content(r, sizes=[7]),
    "a field too few": lambda r: content(r, weights=None),
    "a field too many": lambda r: content(r, labels=[0, 1]),
    "another schema": lambda r: content(r, schema=99),
    "another type": lambda r: content(r, type="TrainReport"),
    "words for weights": lambda r: content(r, weights=["heavy"]),
    "a number for a list": lambda r: content(r, weights=4.0),
    "more weights than devices": lambda r: content(r, weights=[4.0, 4.0]),
    "a device that was not asked": lambda r: content(r, devices=[99]),
    "somebody else's name": lambda r: content(r, devices=[2]),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_reply_that_did_not_come(name: str, truth: Run, tmp_path: Path) -> None:
    sender = client(lambda message, _, report: Message(GARBAGE[name](report), reply_to=message))
    run = Run(text_run(tmp_path, train__rounds=3), tmp_path, sender, supernodes=4)
    costs = run.rounds()
    same(run, truth)
    assert [len(cost.failures) for cost in costs] == [0, 1, 0]


def test_a_token_that_is_none_is_refused(tmp_path: Path) -> None:
    flat = text_run(tmp_path, wire__embedding="token-ids", train__rounds=3)
    liar = client(lie(embeddings=lambda data: to_integers(np.array([65535])) + data[2:]))
    runs = [Run(flat, tmp_path, who, supernodes=4) for who in (liar, client(lost))]
    costs = [run.rounds() for run in runs]
    same(*runs)
    (failure,) = costs[0][STEP - 1].failures
    assert "token 65535 is not in a vocabulary of 4096" in failure


@pytest.mark.parametrize("attack", ["nan", "shape"])
def test_attackers_that_cannot_be_read_change_nothing(attack: str, tmp_path: Path) -> None:
    run = Run(text_run(tmp_path, faults__attack=attack, faults__attackers=2, train__rounds=3), tmp_path)
    costs = run.rounds()
    assert [len(cost.failures) for cost in costs] == [2, 2, 2]
    assert {fold.device for fold in run.folds} == {2, 3}
    for fold, true in Reference(run).follow(run.folds):
        np.testing.assert_allclose(fold.gradient, true, rtol=1e-8, atol=1e-12)
