"""The edge server's end of the links: what has come from each device, what lacks, and how it is coded.

Embeddings that cannot change are kept for ever and asked for once; those of an embedding that trains, or of
batches that are never seen twice, are kept for one step. Representations go down in the wire's format, as
they are or as their change since the sample's last visit (``wire.delta``), which both ends remember as it was
decoded. Jacobians are checked as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlam_app.base import sparse
from fedlam_app.base.split_payload import (
    Downlink,
    Uplink,
    from_integers,
    jacobian_draw,
    position,
    to_integers,
)
from fedlam_app.base.wire import FORMATS
from fedlam_app.config import RunConfig
from fedlam_app.models.backbones import POSITIONS
from fedlam_app.models.pooled import PooledEmbedding
from fedlam_app.models.split import SplitModel, Tokens
from fedlam_app.tasks.base import Task
from strategies.analog import Wired
from strategies.embeddings import Embeddings

LARGEST_JACOBIAN = 1e12  # far above any true one; what backward makes of it stays finite in float32
Ids = NDArray[np.int64]
Rows = NDArray[Any]  # (R_k, D)
Seen = dict[tuple[int, int], NDArray[Any]]  # by (device, sample)


@dataclass
class Errand:
    """What one device gets in an exchange, and what it is asked for; step 0 is none."""

    shown: int = 0
    graded: int = 0
    wanted: int = 0
    representations: bytes = b""
    rows: int = 0  # of its representations
    gradients: bytes = b""
    tokens: int = 0  # of its gradients
    missing: bytes = b""

    def downlink(self, modules: bytes) -> Downlink:
        """Return what goes down on it, with the averaged modules or without."""
        return Downlink(
            representations=self.representations,
            gradients=self.gradients,
            missing=self.missing,
            modules=modules,
        )


@dataclass
class Answer:
    """What came back of what was shown."""

    jacobians: NDArray[Any]  # (R_k, D)
    weight: float
    loss: float


class Link:
    """All devices' links of one experiment."""

    def __init__(
        self, config: RunConfig, task: Task, model: SplitModel, receiver: Wired | None = None
    ) -> None:
        self.config, self.task, self.receiver = config, task, receiver or Wired()
        self.width = int(model.backbone.width)  # type: ignore[arg-type]
        self._like = next(model.backbone.parameters())
        self._embedding_trains = any(p.requires_grad for p in model.embedding.parameters())
        lift = partial(_look_up, model) if config.wire.embedding == "token-ids" else None
        # A text has as many positions as the backbone keeps for it; channels have fewer than its default.
        longest = POSITIONS if task.selection == "all" else config.text.max_tokens
        if isinstance(model.embedding, PooledEmbedding):
            lift, longest = partial(_lifted, model.embedding), 1
        form, crossing = config.wire.embedding, model.crossing
        self._embeddings = Embeddings(form, crossing, task.selection, longest, lift)
        self._fresh: dict[int, tuple[int, Ids]] = {}  # batches that came for one step only
        self._seen: Seen = {}  # representations as devices last decoded them

    # --- embeddings ---------------------------------------------------------------------------------

    def trains(self, step: int) -> bool:
        """Whether the embedding still trains at a step."""
        after = self.config.split.freeze_embedding_after
        return self._embedding_trains and (after == 0 or step <= after * self.config.train.local_steps)

    def needs_modules(self, errand: Errand) -> bool:
        """Whether a device uses its modules on an errand: its head, or an embedding that trains."""
        return bool(errand.shown or errand.graded) or self.trains(errand.wanted)

    def has_batch(self, device: int, step: int) -> bool:
        """Whether a device has anything to do at a step."""
        ids = self._planned(device, step)
        return ids is None or len(ids) > 0

    def lacks(self, device: int, step: int) -> bytes | None:
        """Return the ids to ask for (empty: the whole batch), or ``None`` where all is here."""
        ids = self._planned(device, step)
        if ids is None or self._for_once(step):
            here = device in self._fresh and self._fresh[device][0] == step
            return None if here else b"" if ids is None else to_integers(ids, "<u4")
        lacking = self._embeddings.lacking(device, ids)
        return to_integers(lacking, "<u4") if len(lacking) else None

    def keep(self, device: int, step: int, up: Uplink) -> tuple[Ids, Ids]:
        """Keep the embeddings that were asked for, and return their ids and lengths in tokens.

        ``ValueError`` where something else came.
        """
        ids = self._planned(device, step)
        if ids is None or self._for_once(step):
            ids = np.arange(self.config.train.batch_rows) if ids is None else ids
            self._embeddings.take(device, ids, up)
            self._fresh[device] = step, ids
        else:
            ids = self._embeddings.lacking(device, ids)
            self._embeddings.take(device, ids, up)
        return ids, from_integers(up.lengths)

    def caches(self, step: int) -> bool:
        """Whether the embeddings of a step are kept for later ones."""
        return not self._for_once(step)

    def ids(self, device: int, step: int) -> Ids:
        """Return under which ids the samples of a batch that is here are kept."""
        ids = self._planned(device, step)
        return self._fresh[device][1] if ids is None or self._for_once(step) else ids

    def tokens(self, samples: list[tuple[int, int]]) -> Tokens:
        """Return samples (device, id) as one batch for the backbone."""
        return self._embeddings.tokens(samples, self._like)

    def forget(self, step: int) -> None:
        """Drop what was kept for steps up to this one."""
        self._fresh = {k: batch for k, batch in self._fresh.items() if batch[0] > step}

    # --- representations and Jacobians ----------------------------------------------------------------

    def coded(self, device: int, rows: NDArray[Any], ids: Ids, counts: Ids) -> tuple[bytes, Seen]:
        """Return representations (R_k, D) as bytes, and what the device will have seen of each sample."""
        form = FORMATS[self.config.wire.representation]
        if not self.config.wire.delta:
            return form.encode(rows), {}
        keys, cuts = [(device, i) for i in ids.tolist()], np.cumsum(counts)[:-1]
        parts = zip(keys, np.split(rows, cuts), strict=True)
        former = np.concatenate([self._seen.get(key, np.zeros_like(part)) for key, part in parts])
        data = form.encode(rows - former)
        decoded = former + form.decode(data, *rows.shape)
        return data, dict(zip(keys, np.split(decoded, cuts), strict=True))

    def saw(self, seen: Seen) -> None:
        """Note what a device that answered has decoded; one that did not has rolled back."""
        self._seen.update(seen)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return what a resumed run needs: devices remember what they have seen, so this end must too."""
        if not self._seen:
            return {}
        places = [(device, i, len(rows)) for (device, i), rows in self._seen.items()]
        return {
            "link.seen": np.array(places, np.int64),
            "link.rows": np.concatenate(list(self._seen.values())),
        }

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""
        if "link.seen" in state:
            places, rows = state.pop("link.seen"), state.pop("link.rows")
            parts = np.split(rows, np.cumsum(places[:, 2].astype(np.int64))[:-1])
            self._seen = {(int(k), int(i)): part for (k, i, _), part in zip(places, parts, strict=True)}

    def gradients(self, rows: NDArray[Any]) -> bytes:
        """Return dL/dE (N_k, D) as bytes."""
        return FORMATS[self.config.wire.representation].encode(rows)

    def answer(self, errand: Errand, device: int, up: Uplink, weight: float, loss: float) -> Answer:
        """Return what a device answered to what it was shown; ``ValueError`` where that cannot be."""
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"its weight must be a positive number, got {weight}")
        if not -float("inf") < loss < float("inf"):
            raise ValueError(f"its loss must be a finite number, got {loss}")
        rows = self.jacobians(device, errand.shown, up, errand.rows)
        return Answer(self.receiver.rows(device, errand.shown, rows), weight, loss)

    def jacobians(self, device: int, step: int, up: Uplink, rows: int) -> NDArray[Any]:
        """Return a device's Jacobians (R_k, D); ``ValueError`` where they are not what was asked for."""
        wire = self.config.wire
        if wire.jacobian == "top-k":
            found: NDArray[Any] = sparse.decode(up.jacobians, rows, self.width, wire.top_k)
        else:
            draw = jacobian_draw(self.config, device, step)
            found = FORMATS[wire.jacobian].decode(up.jacobians, rows, self.width, draw)
        if not np.isfinite(found).all():
            raise ValueError("its Jacobians are not finite")
        if (largest := np.abs(found).max(initial=0.0)) > LARGEST_JACOBIAN:
            raise ValueError(f"its Jacobians must be at most {LARGEST_JACOBIAN:g}, got {largest:g}")
        return found

    # --- helpers ------------------------------------------------------------------------------------

    def _planned(self, device: int, step: int) -> Ids | None:
        return self.task.ids(device, *position(step, self.config.train.local_steps))

    def _for_once(self, step: int) -> bool:
        return self.trains(step) or not self.config.split.cache


def _lifted(embedding: PooledEmbedding, rows: NDArray[Any]) -> NDArray[Any]:
    """Return released vectors (N, d) as tokens (N, D), by the public projection."""
    with torch.no_grad():
        return np.asarray(embedding.lift(torch.from_numpy(rows).to(embedding.directions)).cpu().numpy())


def _look_up(model: SplitModel, rows: NDArray[Any]) -> NDArray[Any]:
    """Return the vectors of token ids (N, 1) as (N, D), by the embedding's own frozen table."""
    table, ids = model.embedding.table, rows[:, 0].astype(np.int64)
    if ids.max(initial=0) >= len(table.weight):  # type: ignore[union-attr,arg-type]
        raise ValueError(f"token {ids.max()} is not in a vocabulary of {len(table.weight)}")  # type: ignore
    return np.asarray(table(torch.from_numpy(ids)).detach().cpu().numpy())  # type: ignore[operator]
