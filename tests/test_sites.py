"""Placement: each SuperNode one device, who is refused, who is gone, and what is done elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from fedlam_app.base.records import SiteOrder, SiteReport, order, reply
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.tasks.channel_prediction import ChannelPrediction
from strategies.base import Federation
from strategies.sites import Sites, exchange
from tests.tiny import tiny_run

Flat = dict[str, Scalar]
DEVICES = 3


class Field(InProcessGrid):
    """SuperNodes with operators: each says its own ``partition-id``, some are gone, some are silent."""

    def __init__(self, flat: Flat, says: list[object], client: ClientApp = app) -> None:
        super().__init__(client, len(says), flat)
        self.nodes = list(self._contexts)
        for node, device in zip(self.nodes, says, strict=True):
            self._contexts[node].node_config["partition-id"] = device  # type: ignore[assignment]
        self.gone: set[int] = set()  # not listed any more
        self.killed: set[int] = set()  # still listed, answered for by the SuperLink
        self.silent: set[int] = set()  # still listed, without an answer

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self._contexts if node not in self.gone]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            node = self._sent[name].metadata.dst_node_id
            if node in self.killed | self.gone:
                error = Error(code=2, reason="Node Unavailable")
                replies.append(Message(error, reply_to=self._sent.pop(name)))
            elif node not in self.silent:
                replies += super().pull_messages([name])
        return replies

    def asked(self, kind: str) -> list[int]:
        """The SuperNodes that worked on messages of this type."""
        orders = self.delivered[0::2]
        return [m.metadata.dst_node_id for m in orders if m.metadata.message_type == kind]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Flat:
    return tiny_run(tmp_path_factory.mktemp("data")) | {
        "train.devices": DEVICES,
        "federation.supernodes": DEVICES,
        "federation.placement": "sites",
        "federation.timeout-s": 20.0,
    }


def start(flat: Flat) -> Federation:
    config = parse(flat)
    task = ChannelPrediction(config)
    return federate(config, json.dumps({}), task, task.build_model())


def test_a_device_is_worked_for_at_its_own_site_and_the_model_is_the_packed_one(flat: Flat) -> None:
    says = [2, 0, 1]
    field, sites = Field(flat, says), start(flat)
    packed = {**flat, "federation.placement": "packed", "federation.supernodes": 1}
    alone, plain = start(packed), InProcessGrid(app, 1, packed)
    for number in (1, 2):
        assert not sites.train_round(field, number).failures
        alone.train_round(plain, number)
    np.testing.assert_array_equal(sites.algorithm.models(), alone.algorithm.models())
    assert field.asked("query") == field.nodes, "each is asked once"
    # In the order of devices 0, 1, 2, each round.
    assert field.asked("train") == [field.nodes[says.index(k)] for k in range(DEVICES)] * 2


@given(st.lists(st.integers(-2, 5), min_size=1, max_size=6), st.data())
def test_each_device_has_the_first_living_site_that_claims_it(says: list[int], data: st.DataObject) -> None:
    field = Field({}, list(says))
    sites, refused = Sites(range(4)), list[str]()
    at = sites.places(field, field.nodes, 20.0, refused.append)
    valid = [k for k in says if 0 <= k < 4]
    assert {k: field.nodes[says.index(k)] for k in valid} == at
    assert len(refused) == len(says) - len(set(valid))
    gone = data.draw(st.sets(st.sampled_from(field.nodes)))
    left = [node for node in field.nodes if node not in gone]
    again = sites.places(field, left, 20.0, refused.append)
    of = dict(zip(field.nodes, says, strict=True))
    claims = [of[node] for node in left if 0 <= of[node] < 4]
    assert again == {k: next(node for node in left if of[node] == k) for k in claims}
    assert len(field.asked("query")) == len(says), "who is known is not asked again"
    sites.places(field, field.nodes, 20.0, refused.append)
    assert len(field.asked("query")) == len(says) + len(gone), "who returns is asked again"


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ([0, 1, 1], "it says it is device 1, and so does another"),
        ([0, 1, 3], "it says it is device 3, and 'partition-id' must be from 0 to 2"),
        ([0, 1, -1], "it says it is device -1, and 'partition-id' must be from 0 to 2"),
        ([0, 1, "two"], "'partition-id' = 'two' in this site's --node-config is no device"),
    ],
)
def test_a_site_that_cannot_be_placed_is_refused_and_the_round_goes_on(
    flat: Flat, says: list[object], sentence: str
) -> None:
    field, federation = Field(flat, says), start(flat)
    first, second = federation.train_round(field, 1), federation.train_round(field, 2)
    refusal, left_out = first.failures
    assert refusal.startswith(f"SuperNode {field.nodes[2]} was refused: ") and sentence in refusal
    assert left_out == "device 2 was left out: no SuperNode answers for it"
    assert second.failures == [left_out], "it is refused once, and its device missed every round"
    assert set(field.asked("train")) == set(field.nodes[:2])


def test_a_site_that_restarted_as_another_device_works_for_none(flat: Flat) -> None:
    field, federation = Field(flat, [0, 1, 2]), start(flat)
    federation.train_round(field, 1)
    field._contexts[field.nodes[2]].node_config["partition-id"] = 1
    (failure,) = federation.train_round(field, 2).failures
    assert failure == "round 2: train of [2]: ValueError: this site is device 1"


def test_a_killed_site_costs_its_device_and_not_the_round(flat: Flat) -> None:
    field, federation = Field(flat, [0, 1, 2]), start(flat)
    chunks, node = federation_chunks(flat), field.nodes[1]
    federation.train_round(field, 1)
    field.killed = {node}
    (failure,) = federation.train_round(field, 2).failures
    assert failure == f"round 2: train of [1]: SuperNode {node}: Node Unavailable"
    elsewhere = federation.evaluate(field, chunks, 2)
    (failure,) = federation.cost.failures
    assert failure.startswith("evaluation, to be done elsewhere: evaluate of [") and "Unavailable" in failure
    field.killed = set()
    np.testing.assert_array_equal(elsewhere, federation.evaluate(field, chunks, 2))
    field.gone = {node}
    (failure,) = federation.train_round(field, 3).failures
    assert failure == "device 1 was left out: no SuperNode answers for it"
    federation.evaluate(field, chunks, 2)
    assert not federation.cost.failures


@pytest.mark.parametrize("placement", ["sites", "packed"])
def test_a_silent_site_is_waited_for_until_the_timeout(flat: Flat, placement: str) -> None:
    short = {**flat, "federation.timeout-s": 1.0, "federation.placement": placement}
    field, federation = Field(short, [0, 1, 2]), start(short)
    assert not federation.train_round(field, 1).failures
    field.silent = {field.nodes[0]}
    (failure,) = federation.train_round(field, 2).failures
    expected = f"train of [0]: SuperNode {field.nodes[0]}: no answer within federation.timeout-s = 1"
    assert failure == f"round 2: {expected}"
    elsewhere = federation.evaluate(field, federation_chunks(flat), 2)
    assert len(federation.cost.failures) == 1
    field.silent = set()
    np.testing.assert_array_equal(elsewhere, federation.evaluate(field, federation_chunks(flat), 2))


def test_an_evaluation_that_nobody_can_do_is_an_error(flat: Flat) -> None:
    field, federation = Field(flat, [0, 1, 2]), start(flat)
    federation.train_round(field, 1)
    field.killed = set(field.nodes)
    with pytest.raises(RuntimeError, match=r"an evaluation failed: evaluate of \[.*Node Unavailable"):
        federation.evaluate(field, federation_chunks(flat), 2)


def test_a_message_that_the_superlink_does_not_take_is_answered_for(flat: Flat) -> None:
    class Refusing(Field):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            _, *others = messages
            return [None, *super().push_messages(others)]  # type: ignore[list-item]

    field = Refusing(flat, [0, 1])
    messages = [order(SiteOrder(), node, "query", "sites") for node in field.nodes]
    first, second = exchange(field, messages, 20.0)
    assert first.error.reason.endswith("the SuperLink did not take the message")
    assert second.has_content()


def test_too_few_at_the_start_are_named(flat: Flat) -> None:
    short = {**flat, "federation.timeout-s": 0.1}
    with pytest.raises(RuntimeError, match=r"federation.supernodes = 3, but only 2 registered within 0.1 s"):
        start(short).train_round(Field(short, [0, 1]), 1)


def test_an_answer_that_is_no_site_report_is_refused() -> None:
    client = ClientApp()

    @client.query()
    def query(message: Message, context: Context) -> Message:
        return reply(SiteOrder() if context.node_config["partition-id"] else SiteReport(device=0), message)

    field, refused = Field({}, [0, 1], client), list[str]()
    assert Sites([0, 1]).places(field, field.nodes, 20.0, refused.append) == {0: field.nodes[0]}
    assert len(refused) == 1 and "expected SiteReport" in refused[0]


def federation_chunks(flat: Flat) -> list[int]:
    task = ChannelPrediction(parse(flat))
    return [*task.chunks("train"), *task.chunks("test")]
