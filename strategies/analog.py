"""Uncoded links: each device sends its numbers as they are on a band of its own, and hears no retransmission.

    airtime    entries / b,  b = B / K       one real entry a symbol, however good the channel
    SNR        a |h|^2 / b                   of a symbol; one draw of |h|^2 a turn (``airtime.py``)
    received   x + w,  w ~ N(0, N0 / (|h|^2 a^2))                                 (``privacy/channel.py``)

:func:`receiver` says where w is added: in gradient space to Jacobians, row by row, as they are decoded, so
that it goes through the backward pass like everything a device sends; in adapter space to what a vector has
moved from where it began. The amplitude a is that of full power for

    a message that has its noise already, or needs none:   its own root mean square, told over a side channel
    Jacobians that are clipped to C:                       C, never what is sent, which would tell of it

The second is :class:`Amplitudes`, which also says what the channel adds at worst, so that a device may add
less (``privacy.count-channel-noise``). The server plans with the noise that a device of full participation
and a fresh ledger calibrates; where a device finds another, its privacy is its own noise's all the same, and
its power is a little off P.

Departures: embeddings and lengths come as on coded links of the same airtime. The channel's noise is the
simulator's, drawn from the run's seed whatever ``privacy.randomness`` is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.vectors import Vector
from fedlam_app.config import RunConfig
from fedlam_app.privacy import channel
from strategies.algorithm import Algorithm
from strategies.participation import Turn
from strategies.versions import Newest

Doubles = NDArray[np.float64]


class Wired:
    """Everything arrives as it was sent."""

    apart: ClassVar[bool] = False  # needs each result, and not only their sum

    def begin(self, turn: Turn) -> None:
        """Open a turn."""
        self.turn = turn

    def rows(self, device: int, step: int, rows: NDArray[Any]) -> NDArray[Any]:
        """Return Jacobians (R_k, D) as they are heard."""
        return rows

    def vector(self, device: int, vector: Vector) -> Vector:
        """Return a vector (p,) as it is heard."""
        return vector


class NoisyRows(Wired):
    """Gradient space: noise on Jacobians."""

    def __init__(self, config: RunConfig) -> None:
        self.clip, self.seed = config.privacy.clip, config.seed

    def rows(self, device: int, step: int, rows: NDArray[Any]) -> NDArray[Any]:
        place = self.turn.ids.index(device)
        if self.turn.receiver:  # of the sum of samples; what is sent is the mean of the batch's losses
            std = self.clip * self.turn.receiver[place] / len(rows)
        else:
            std = _rms(rows) * _ratio(self.turn.snr[place])
        noise = rng(self.seed, "receiver", device, step).standard_normal(rows.shape)
        return (rows + std * noise).astype(rows.dtype)


class NoisyUpdates(Wired):
    """Adapter space: noise on what devices have changed, of the parts that travel."""

    apart: ClassVar[bool] = True

    def __init__(self, algorithm: Algorithm, versions: Newest) -> None:
        self.algorithm, self.versions = algorithm, versions

    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        rows, models = self.versions.rows(turn), self.versions.models()
        self.start = {k: models[row] for k, row in zip(turn.ids, rows, strict=True)}

    def vector(self, device: int, vector: Vector) -> Vector:
        algorithm, number = self.algorithm, self.turn.number
        start, layout = self.start[device], algorithm.layout
        travels = np.ones(len(vector), bool)
        if len(vector) == layout.size:
            travels = layout.within(algorithm.rank(device)) & layout.part(algorithm.plan(number).returns)
        update = vector[travels].astype(np.float64)
        update -= start[travels] if len(start) == len(vector) else 0.0
        std = _rms(update) * _ratio(self.turn.snr[self.turn.ids.index(device)])
        draw = rng(algorithm.config.seed, "receiver", device, number)
        heard = vector.copy()
        heard[travels] += (std * draw.standard_normal(len(update))).astype(vector.dtype)
        return heard


class Amplitudes:
    """At which amplitude clipped Jacobians are sent, and what that adds to them, in units of C."""

    def __init__(self, config: RunConfig, entries: int) -> None:
        """``entries`` are a sample's."""
        self.privacy, wireless = config.privacy, config.wireless
        self.figure_db = wireless.bs_noise_db + wireless.interference_db
        self.signal = 1.0 / entries  # C^2 / d, over C^2

    def of(self, snr: Doubles, mean_snr: Doubles, z: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """Return, for multipliers ``z`` (K,): what counts as free, the artificial, the received noise."""
        privacy, wanted = self.privacy, z**2
        gain = channel.worst(snr, mean_snr, self.figure_db, privacy.channel_margin_db)
        noise = channel.REAL_SHARE if privacy.count_channel_noise else 0.0
        sent = channel.orthogonal(gain, 1.0, noise, self.signal, wanted)
        free = np.sqrt(channel.received(gain, noise, sent.amplitude, 0.0))
        heard = channel.received(snr, channel.REAL_SHARE, sent.amplitude, 0.0)
        return free, np.sqrt(sent.artificial), np.sqrt(heard)


def receiver(config: RunConfig, algorithm: Algorithm, versions: Newest) -> Wired:
    """Return the receiver of a fleet's transport."""
    if config.wireless.transport != "analog":
        return Wired()
    return NoisyRows(config) if algorithm.space == "gradient" else NoisyUpdates(algorithm, versions)


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def _ratio(snr: float) -> float:
    """Return the std of the noise over the root mean square of what is sent at full power."""
    return float(np.sqrt(channel.REAL_SHARE / snr))
