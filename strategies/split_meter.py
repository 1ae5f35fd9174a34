"""What a step of the split costs each device's link: planned for all of them, exact for those who took part.

Planned are mean samples (``loads.py``), of which a device that has done w steps is expected to lack
embeddings for a share (1 - 1/S)^w, with S steps an epoch: its batches are reshuffled every epoch. Exact are
the bytes of ``base/split_bytes.py`` for the rows and tokens that really went. A resumed run asks for
embeddings again; what had gone up before is remembered here, so that the virtual clock does not pay twice and
goes on as it would have.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.split_bytes import downlink_bytes, uplink_bytes
from fedlam_app.config import RunConfig
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks.base import Cost, Selection
from fedlam_app.wireless.fleet import Load
from strategies.loads import FLOAT_BYTES, Doubles, samples_a_step, split_load

Ids = NDArray[np.int64]


class Unmetered:
    """Nobody asks."""

    up: ClassVar[dict[int, int]] = {}
    down: ClassVar[dict[int, int]] = {}

    def begin(self) -> None:
        """Open a step."""

    def load(self, cached: bool) -> Load:
        """Return what a step asks of each device; ``cached``: embeddings are kept."""
        raise RuntimeError("there is no radio to plan for")

    def went_down(self, device: int, rows: int, graded: int, modules: int) -> None:
        """Count what was shown: representations of ``rows``, gradients of tokens, bytes of modules."""

    def came_up(self, device: int, rows: int, ids: Ids, lengths: Ids, keep: bool) -> None:
        """Count an uplink: Jacobians of ``rows``, and the samples ``ids``, ``lengths`` tokens each.

        ``keep``: they need not come again. Those that had come before are not counted, nor that they were
        asked.
        """

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return what a resumed run needs; every name begins with ``meter.``."""
        return {}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""


class SplitMeter(Unmetered):
    """The links of all devices (N,), which are numbered from 0."""

    def __init__(
        self, config: RunConfig, cost: Cost, selection: Selection, model: SplitModel, examples: Doubles
    ) -> None:
        """``cost`` and ``selection`` are the task's, ``examples`` (N,) the devices' own."""
        self.config, self.width = config, int(model.backbone.width)  # type: ignore[arg-type]
        self.cost, self.tails, self.crossing = cost, selection == "tail", model.crossing
        own = sum(p.numel() for p in model.device_side().values())
        modules = FLOAT_BYTES * own if config.split.heads == "averaged" else 0
        self.modules = modules / (config.split.average_every * config.train.local_steps)
        self.examples = examples
        self.worked = np.zeros(len(examples), np.int64)  # steps of each device
        self.sent: dict[int, set[int]] = {}  # samples whose embeddings have gone up, by device
        self.begin()

    def begin(self) -> None:
        self.up, self.down = {}, {}  # type: ignore[misc]

    def load(self, cached: bool) -> Load:
        batches = np.maximum(self.examples / samples_a_step(self.config, self.examples), 1.0)
        fresh = (1.0 - 1.0 / batches) ** self.worked if cached else np.ones(len(self.worked))
        args = self.config, self.cost, self.width, self.examples
        return split_load(*args, fresh, self.config.train.wanted, round(self.modules), self.crossing)

    def went_down(self, device: int, rows: int, graded: int, modules: int) -> None:
        self._down(device, rows=rows, graded=graded, modules=modules)

    def came_up(self, device: int, rows: int, ids: Ids, lengths: Ids, keep: bool) -> None:
        before = self.sent.setdefault(device, set())
        new = np.array([i not in before for i in ids.tolist()], bool)
        if keep:
            before.update(ids.tolist())
        if new.any():
            self._down(device, missing=int(new.sum()))
        if rows:
            self.worked[device] += 1
        if new.any() or rows:
            self.up[device] = self.up.get(device, 0) + uplink_bytes(
                self.config.wire,
                self.width,
                rows=rows,
                tokens=int(lengths[new].sum()),
                samples=int(new.sum()),
                tails=self.tails,
                crossing=self.crossing,
                messages=0,
            )

    def _down(self, device: int, **sent: int) -> None:
        total = downlink_bytes(self.config.wire, self.width, messages=0, **sent)
        self.down[device] = self.down.get(device, 0) + total

    def state(self) -> dict[str, NDArray[np.generic]]:
        pairs = [(k, i) for k, own in self.sent.items() for i in sorted(own)]
        return {"meter.worked": self.worked, "meter.sent": np.array(pairs, np.int64).reshape(-1, 2)}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        self.worked, self.sent = np.array(state.pop("meter.worked")), {}
        for k, i in state.pop("meter.sent").tolist():
            self.sent.setdefault(k, set()).add(i)
