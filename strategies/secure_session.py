"""The server's side of one secure aggregation, without messages: what it asks of whom, and the sum it opens.

A session is one attempt at a round, by a name of its own. It knows who finished which stage, who is whose
neighbour, and what devices said; it makes the orders of a stage and, in the end, takes the masks off

    sum_U3 y_k - sum_U3 PRG(b_k) + sum_{j in U2 \\ U3} sum_{k in U3} (what j would have added for k)

with secrets reconstructed from shares, each checked against what its owner said of it in the beginning.
Sources: ``privacy/masking.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.records import MaskedOrder, SecureOrder, TrainOrder, framed_bytes
from fedlam_app.privacy import masking
from fedlam_app.privacy.masking import BUNDLE_BYTES, NOTHING, SEALED_BYTES, SENT, SHARED, Words
from fedlam_app.privacy.neighbours import LEAST, Graph, connected, threshold
from fedlam_app.privacy.shamir import SHARE_BYTES, reconstruct

Said = dict[int, bytes]  # by device


class Unopened(RuntimeError):
    """A sum whose masks cannot be taken off."""


class Session:
    """One attempt at the sum of these devices' vectors."""

    def __init__(self, name: str, devices: Sequence[int], survivors: float) -> None:
        """``survivors`` is the share of its neighbours that opens a device's secret."""
        self.name, self.survivors = name, survivors
        self.reached = dict.fromkeys(devices, 0)  # the last stage that each device finished
        self.joined: Graph = {}
        self.bundles: Said = {}
        self.sealed: dict[tuple[int, int], bytes] = {}  # by (who sealed it, for whom)

    def at_least(self, stage: int) -> list[int]:
        """Return the devices that finished a stage, in their order."""
        return [k for k, reached in self.reached.items() if reached >= stage]

    def length(self, device: int, stage: str) -> int:
        """Return the bytes that a device hands in at a stage without training."""
        peers = len(self.joined.get(device, ()))
        return {
            "keys": BUNDLE_BYTES,
            "shares": SEALED_BYTES * peers,
            "open": SHARE_BYTES * (1 + peers),
        }[stage]

    def note(self, stage: int, found: Collection[int]) -> None:
        """Note who finished a stage; ``Unopened`` where the sum could not be opened any more."""
        self.reached |= dict.fromkeys(found, stage)
        here = set(found)
        if len(here) < LEAST:
            raise Unopened(f"{len(here)} of {len(self.reached)} devices hide nothing in a sum")
        for k in self.joined if stage >= SHARED else ():
            stay, least = len(here.intersection(self.joined[k])), self.least(k)
            needed = k in here or (self.reached[k] >= SHARED and stay > 0)
            if needed and stay + (k in here) < least:
                raise Unopened(
                    f"of {len(self.reached)} devices {len(here)} stayed, {stay} of them neighbours of device"
                    f" {k}, whose masks take {least} ('privacy.survivors' = {self.survivors:g})"
                )
        if stage >= SHARED and not connected(here, self.joined):
            raise Unopened("those who stayed do not hang together: parts of the sum would be seen")

    def least(self, device: int) -> int:
        """Return how many shares open a secret of a device."""
        return threshold(len(self.joined[device]), self.survivors)

    # --- what is asked --------------------------------------------------------------------------------

    def order(self, cell: str, number: int, stage: str, devices: list[int]) -> SecureOrder:
        """Return the order of a stage: each device's peers, their words, and what they sealed for it."""
        parts = []
        for k in devices:
            peers = self.joined.get(k, [])
            part = b"".join(self.bundles[peer] for peer in peers)
            if stage == "open":
                part += b"".join(self.sealed.get((peer, k), bytes(SEALED_BYTES)) for peer in peers)
            parts.append(part)
        peers, counts, standing = self._peers(devices)
        return SecureOrder(
            cell=cell,
            round=number,
            session=self.name,
            stage=stage,
            devices=devices,
            peers=peers,
            counts=counts,
            standing=standing,
            payload=_bytes(parts),
            sizes=[len(part) for part in parts],
        )

    def masking(self, plain: TrainOrder, clip: float) -> MaskedOrder:
        """Return an order to train whose answers are clipped and masked."""
        peers, counts, standing = self._peers(plain.devices)
        return MaskedOrder(
            **{field.name: getattr(plain, field.name) for field in fields(plain)},
            session=self.name,
            peers=peers,
            counts=counts,
            standing=standing,
            keys=_bytes([self.bundles[peer] for peer in peers]),
            clip=clip,
            summands=len(self.reached),
        )

    def _peers(self, devices: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Return devices' peers, one device after the other, how many each has, and how far they are."""
        each = [self.joined.get(k, []) for k in devices]
        peers = [peer for own in each for peer in own]
        return peers, [len(own) for own in each], [self.reached[peer] for peer in peers]

    # --- what comes of it -----------------------------------------------------------------------------

    def take_sealed(self, found: Mapping[int, bytes]) -> None:
        """Keep what devices sealed for their neighbours."""
        for k, joined in found.items():
            parts = zip(self.joined[k], _pieces(joined, SEALED_BYTES), strict=True)
            self.sealed |= {(k, peer): part for peer, part in parts}

    def sum(self, words: Mapping[int, Words], opened: Mapping[int, bytes]) -> Words:
        """Return the sum of masked vectors, without their masks; ``opened`` are the answers of 'open'."""
        shares: dict[int, Said] = {k: {} for k in self.at_least(SHARED)}  # by owner and holder
        for k, joined in opened.items():
            for owner, part in zip([k, *self.joined[k]], _pieces(joined, SHARE_BYTES), strict=True):
                if part != NOTHING and owner in shares:
                    shares[owner][k + 1] = part
        total = np.zeros(len(next(iter(words.values()))), np.uint32)
        for own in words.values():
            total += own
        for k in shares:
            if self.reached[k] == SENT:
                total -= masking.self_mask(self._secret(k, shares[k]), self.name, len(total))
                continue
            if others := [peer for peer in self.joined[k] if self.reached[peer] == SENT]:
                secret = self._secret(k, shares[k])
                for peer in others:
                    other = masking.pair_key(self.bundles[peer])
                    total += masking.pair_mask(secret, k, other, peer, self.name, len(total))
        return total

    def _secret(self, device: int, shares: Said) -> bytes:
        """Return what a device's shares open: its self mask's seed if it sent, its pair key if not."""
        least = self.least(device)
        if len(shares) < least:
            raise Unopened(f"{len(shares)} shares of device {device} came, and its masks take {least}")
        try:
            secret = reconstruct(dict(sorted(shares.items())[:least]))
        except ValueError as error:
            raise Unopened(f"device {device}: {error}") from None
        bundle = self.bundles[device]
        if self.reached[device] == SENT:
            true = masking.own_commitment(bundle) == masking.commitment(secret)
        else:
            true = masking.pair_key(bundle) == masking.public(secret)
        if not true:
            raise Unopened(f"the shares of device {device} do not open its masks: one of them is false")
        return secret


def overhead(devices: int, neighbours: int) -> tuple[int, int]:
    """Return what a session costs each device's link beside its vector, up and down [bytes]."""
    peers = min(neighbours or devices, devices - 1)
    up = [BUNDLE_BYTES, SEALED_BYTES * peers, SHARE_BYTES * (1 + peers)]
    down = [BUNDLE_BYTES * peers, BUNDLE_BYTES * peers, (BUNDLE_BYTES + SEALED_BYTES) * peers]
    # The masked vector has one entry more, and is as many bytes a value.
    return 4 + sum(_framed(n) for n in up), sum(_framed(n) for n in down)


def _framed(size: int) -> int:
    return framed_bytes((size,), "|u1")


def _pieces(joined: bytes, length: int) -> list[bytes]:
    return [joined[start : start + length] for start in range(0, len(joined), length)]


def _bytes(parts: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(parts), np.uint8)
