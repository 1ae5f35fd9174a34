"""The SuperNodes of a federation: who is there, which device each one is, and the exchange with them.

In a simulation every SuperNode can work for every device. In a real federation (``federation.placement =
"sites"``) each one owns the data of one device, and its operator says of which: ``--node-config
"partition-id=K"``. The server asks each SuperNode once, when it appears. Of two that claim one device the
first to answer has it while it is there; the other is refused, and so is one that no device belongs to.

Flower's SuperLink lists a SuperNode that was killed until two heartbeats are overdue (up to 60 s), and then
answers for it with an error; ``timeout_s`` may be shorter. Either way there is one reply to each message, so
that whoever sent it knows what was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedlam_app.base.records import SiteOrder, SiteReport, decode, order, refuse

PULL_INTERVAL_S = 0.01  # Flower's default of 0.1 s would quantise the short rounds of a simulation
NETWORK_PULL_INTERVAL_S = (
    0.3  # every pull is a request to the SuperLink, and SuperNodes ask for work every 3 s
)
NOBODY = -1  # what a SuperNode claims that was refused


class Sites:
    """Which SuperNode is which device, where each is one."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = set(devices)
        self._claims: dict[int, int] = {}  # the device of each SuperNode that is there, as they answered

    def places(
        self, grid: Grid, nodes: Sequence[int], timeout_s: float, failed: Callable[[str], None]
    ) -> dict[int, int]:
        """Return the SuperNode of each device that has one among ``nodes``; new ones are asked first.

        One that does not answer within ``timeout_s`` seconds, or is refused, is named to ``failed``. A
        SuperNode that has gone is asked again when it returns: it may be another device by then.
        """
        self._claims = {node: device for node, device in self._claims.items() if node in nodes}
        new = [node for node in nodes if node not in self._claims]
        messages = [order(SiteOrder(), node, "query", "sites") for node in new]
        for node, message in zip(new, exchange(grid, messages, timeout_s), strict=True):
            try:
                device = self._claim(message)
            except ValueError as error:
                failed(f"SuperNode {node} was refused: {error}")
                device = NOBODY
            if device in self._claims.values() and device != NOBODY:
                failed(
                    f"SuperNode {node} was refused: it says it is device {device}, and so does another;"
                    " give each site a 'partition-id' of its own"
                )
            self._claims[node] = device
        found: dict[int, int] = {}
        for node, device in self._claims.items():
            if device != NOBODY:
                found.setdefault(device, node)
        return found

    def _claim(self, message: Message) -> int:
        """Return the device that an answer names; ``ValueError`` where there is none."""
        if message.has_error():
            raise ValueError(message.error.reason)
        device = decode(message.content, SiteReport).device
        if device not in self._devices:
            last = max(self._devices)
            raise ValueError(f"it says it is device {device}, and 'partition-id' must be from 0 to {last}")
        return device


def wait_for_nodes(grid: Grid, expected: int, timeout_s: float) -> list[int]:
    """Return the SuperNodes that are there, sorted, once they are ``expected``.

    Flower may start the ServerApp before they register; too few after ``timeout_s`` is a ``RuntimeError``.
    """
    deadline = time.monotonic() + timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"federation.supernodes = {expected}, but only {len(nodes)} registered within {timeout_s} s"
            )
        time.sleep(0.1)
    return nodes


def exchange(grid: Grid, messages: Iterable[Message], timeout_s: float) -> Iterator[Message]:
    """Send, then yield one reply to each message in the order of sending, each as soon as its turn has come.

    The reply is an error where the SuperLink says that the SuperNode is gone, and where nothing came within
    ``timeout_s`` seconds: it names the work that was lost.
    """
    sent = list(messages)  # a networked grid reads them twice
    interval_s = NETWORK_PULL_INTERVAL_S
    if hasattr(grid, "pull_interval"):
        grid.pull_interval = interval_s = PULL_INTERVAL_S
    names: list[str | None] = [*grid.push_messages(sent)] if sent else []
    names += [None] * (len(sent) - len(names))  # a networked grid drops what the SuperLink does not take
    arrived: dict[str | None, Message] = {}
    deadline = time.monotonic() + timeout_s
    for place, (message, name) in enumerate(zip(sent, names, strict=True)):
        while name is not None and name not in arrived:
            for answer in grid.pull_messages([i for i in names[place:] if i and i not in arrived]):
                arrived[answer.metadata.reply_to_message_id] = answer
            if name in arrived or time.monotonic() > deadline:
                break
            time.sleep(interval_s)
        reply = arrived.pop(name, None)
        if name is None:
            yield _lost(message, "the SuperLink did not take the message")
        elif reply is None:
            yield _lost(message, f"no answer within federation.timeout-s = {timeout_s:g}")
        elif reply.has_error() and reply.error.code != 0:  # the SuperLink's, which does not say whose
            yield _lost(message, str(reply.error.reason))
        else:
            yield reply


def _lost(message: Message, why: str) -> Message:
    """Answer in the place of a SuperNode, as it names its work itself."""
    config = message.content.config_records["config"]
    work = config.get("devices", config.get("chunks", []))
    what = f"{message.metadata.message_type} of {work!r}"
    return refuse(f"{what}: SuperNode {message.metadata.dst_node_id}: {why}", message)
