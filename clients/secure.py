"""A device's side of secure aggregation: four stages, each answered from the order and the device's secret.

    keys    -> its bundle of public words
    shares  <- the bundles of its peers             -> for each peer, a sealed share of key and self mask
    masks   <- the same, and who has shared         -> its clipped update in fixed point, masked
    open    <- the same, who has sent, the shares   -> for each peer that has shared one share:
               that the peers sealed for it            of its self mask if it has sent, of its key if not

The protocol and its sources are in ``privacy/masking.py``. The secrets of a session come from the device's
keyed stream, so a worker that takes over continues a session; nothing of them is kept. Kept is what a device
has done (``secure_done.py``): whom it took for its peers, what it masked and for whom, what it opened. It
does each once in a session, and never opens both secrets of a peer, whatever it is told later.

Assumed: a server that follows the protocol and is curious (against one that makes up public keys, or devices,
these would have to be signed), and fewer devices in league with it than open a secret.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clients.adapter import Worker
from clients.faults import vanishes
from clients.secure_done import Done, Refused
from fedlam_app.base.records import MaskedOrder, SecureOrder, SecureReport, cut, join
from fedlam_app.privacy.masking import (
    BUNDLE_BYTES,
    NONCE_BYTES,
    NOTHING,
    SEALED_BYTES,
    SENT,
    SHARED,
    Forged,
    Secrets,
    agreed,
    encode,
    masked,
    scale_of,
    seal,
    seal_key,
    unseal,
)
from fedlam_app.privacy.neighbours import LEAST, threshold
from fedlam_app.privacy.noise import Stream, digest
from fedlam_app.privacy.shamir import SHARE_BYTES, share

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Roster:
    """A device's peers in a session, as the server says, with their public words."""

    peers: list[int]
    standing: list[int]  # stages that each has finished
    bundles: dict[int, bytes]

    @classmethod
    def of(cls, device: int, peers: list[int], standing: list[int], keys: Bytes) -> Roster:
        """``Refused`` where they cannot be peers."""
        bundles = [part.tobytes() for part in keys.reshape(len(peers), BUNDLE_BYTES)]
        if len({device, *peers}) != len(peers) + 1 or len(set(bundles)) < len(peers):
            raise Refused(f"its peers {peers} are not different devices with keys of their own")
        if len(peers) < LEAST - 1:
            raise Refused(f"{len(peers)} peers hide nothing; there must be {LEAST - 1} at least")
        return cls(peers, standing, dict(zip(peers, bundles, strict=True)))

    @property
    def name(self) -> str:
        """What names these peers with these public words."""
        return digest(self.peers, *self.bundles.values())

    def at_least(self, stage: int) -> list[int]:
        """Return the peers that have finished a stage."""
        return [k for k, reached in zip(self.peers, self.standing, strict=True) if reached >= stage]


def serve(worker: Worker, order: SecureOrder | MaskedOrder) -> SecureReport:
    """Return the report of a stage; time and memory are left at zero."""
    devices, answers, complaints = list[int](), list[bytes](), list[str]()
    if isinstance(order, MaskedOrder):
        payloads = cut(order.keys, [BUNDLE_BYTES * count for count in order.counts])
    else:
        payloads = cut(order.payload, order.sizes)
    peers = cut(np.array(order.peers, np.int64), order.counts)
    standing = cut(np.array(order.standing, np.int64), order.counts)
    for place, device in enumerate(order.devices):
        if isinstance(order, MaskedOrder) and vanishes(worker.config, device, order.round):
            continue
        part = Part(worker, order, place, complaints)
        try:
            answers.append(part.answer(peers[place].tolist(), standing[place].tolist(), payloads[place]))
            devices.append(device)
        except Refused as error:
            part.complain(str(error))
    payload, sizes = join([np.frombuffer(answer, np.uint8) for answer in answers], np.uint8)
    return SecureReport(
        devices=devices, complaints=complaints, cpu_s=0.0, peak_rss_bytes=0, payload=payload, sizes=sizes
    )


class Part:
    """What one device does in one stage."""

    def __init__(
        self, worker: Worker, order: SecureOrder | MaskedOrder, place: int, complaints: list[str]
    ) -> None:
        self.worker, self.order, self.place, self.complaints = worker, order, place, complaints
        self.device, self.session = order.devices[place], order.session
        self.secrets = Secrets.drawn(self._stream("secrets").bytes)
        self.done = Done(worker.memory.folder / "secure" / f"{self.device}.json", self.session)

    def complain(self, why: str) -> None:
        """Have the server told."""
        self.complaints.append(f"device {self.device}: {why}")

    def answer(self, peers: list[int], standing: list[int], payload: Bytes) -> bytes:
        """Return what the device hands in."""
        order = self.order
        if isinstance(order, SecureOrder) and order.stage == "keys":
            return self.secrets.bundle()
        keys, sealed = np.split(payload, [BUNDLE_BYTES * len(peers)])
        roster = Roster.of(self.device, peers, standing, keys)
        least = threshold(len(peers), self.worker.config.privacy.survivors)
        if isinstance(order, MaskedOrder):
            return self._masked(order, roster, least)
        self.done.once(peers=roster.name)
        # Another roster, another polynomial: shares of two of them do not add up to a secret.
        draw = self._stream("polynomials", roster.name).bytes
        holders = [k + 1 for k in peers]
        of_pair = share(self.secrets.pair, least, holders, draw)
        of_own = share(self.secrets.own, least, [*holders, self.device + 1], draw)
        if order.stage == "shares":
            nonces = self._stream("nonces", roster.name)
            each = ((k, of_pair[k + 1] + of_own[k + 1]) for k in peers)
            return b"".join(self._sealed(k, roster, nonces, both) for k, both in each)
        if order.stage == "open":
            self.done.must(shared=digest(roster.at_least(SHARED)))
            self.done.once(opened=digest(roster.at_least(SENT)))
            parts = [sealed[i : i + SEALED_BYTES].tobytes() for i in range(0, len(sealed), SEALED_BYTES)]
            rows = zip(peers, standing, parts, strict=True)
            return of_own[self.device + 1] + b"".join(self._opened(roster, *row) for row in rows)
        raise ValueError(f"'stage' = '{order.stage}' is none of a secure aggregation: keys, shares, open")

    def _masked(self, order: MaskedOrder, roster: Roster, least: int) -> bytes:
        """Train; return the update in fixed point under its masks."""
        shared = roster.at_least(SHARED)
        self.done.once(peers=roster.name, shared=digest(shared))
        if len(shared) + 1 < least:
            raise Refused(f"{len(shared)} of its peers have shared, and its masks take {least} to open")
        update = self.worker.obey(order, self.place).vector.astype(np.float64) - self._start(order)
        if not np.isfinite(update).all():
            raise Refused("its update is not finite")
        words = encode(update, order.clip, scale_of(order.clip, order.summands))
        self.done.once(masked=digest(words))
        peers = {k: roster.bundles[k] for k in shared}
        return masked(words, self.secrets, self.device, peers, self.session).astype("<u4").tobytes()

    def _start(self, order: MaskedOrder) -> NDArray[np.float32]:
        """Return where what the device hands in began: a part of what it was sent."""
        layout = self.worker.layout
        has, keeps = layout.within(order.ranks[self.place]), layout.part(order.keeps)
        start = np.zeros(layout.size, np.float32)
        start[has & ~keeps] = cut(order.vectors, order.sizes)[order.rows[self.place]]
        return start[has & layout.part(order.returns)]

    def _sealed(self, peer: int, roster: Roster, nonces: Stream, text: bytes) -> bytes:
        """Return a text that this peer alone can read."""
        key = self._agreed(peer, roster, self.device, peer)
        return seal(key, nonces.bytes(NONCE_BYTES), text, self.session, self.device, peer)

    def _opened(self, roster: Roster, peer: int, standing: int, sealed: bytes) -> bytes:
        """Return one share of a peer: of its self mask where it has sent, of its key where it vanished."""
        if standing < SHARED:
            return NOTHING
        try:
            key = self._agreed(peer, roster, peer, self.device)
            both = unseal(key, sealed, self.session, peer, self.device)
        except Forged as error:
            self.complain(f"what device {peer} sealed for it cannot be opened: {error}")
            return NOTHING
        return both[SHARE_BYTES:] if standing == SENT else both[:SHARE_BYTES]

    def _agreed(self, peer: int, roster: Roster, sender: int, receiver: int) -> bytes:
        """Return the key of what one of the two seals for the other."""
        try:
            other = seal_key(roster.bundles[peer])
            return agreed(self.secrets.seal, other, "seal", self.session, sender, receiver)
        except ValueError:
            raise Refused(f"the public key of device {peer} is none") from None

    def _stream(self, *purpose: str) -> Stream:
        return self.worker.ledgers.stream(self.device, "secure", self.order.round, self.session, *purpose)
