"""Flower's ``Grid`` in one process: the same ClientApp, the same messages, the same bytes, no Ray.

For tests, for debugging with breakpoints in client code, and as the plain reference that a Ray run
must equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlam_app.config import Scalar


class InProcessGrid(Grid):
    """``supernodes`` nodes that all live here; a message is worked off when its reply is pulled."""

    def __init__(self, client: ClientApp, supernodes: int, run_config: Mapping[str, Scalar]) -> None:
        # A message's metadata names the task that sends it; without a SuperLink that is us.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
        self._client = client
        self._contexts = {
            # Like a simulation's: random-looking ids, and a state that survives between messages.
            7_000_003 * (node + 1): Context(
                run_id=1,
                node_id=7_000_003 * (node + 1),
                node_config={"partition-id": node, "num-partitions": supernodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node in range(supernodes)
        }
        self._sent: dict[str, Message] = {}
        self.delivered: list[Message] = []  # every message and reply, for tests that look at the wire

    def set_run(self, run: Run) -> None:
        raise RuntimeError("an in-process grid has no SuperLink, so it cannot join another run")

    @property
    def run(self) -> Run:
        raise RuntimeError("an in-process grid has no SuperLink, so it has no run record")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            name = str(uuid4())
            message.metadata.__dict__["_message_id"] = name
            self._sent[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            if (message := self._sent.pop(name, None)) is not None:
                reply = self._client(message, self._contexts[message.metadata.dst_node_id])
                self.delivered += [message, reply]
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))
