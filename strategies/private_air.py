"""Device-level privacy over the air: the noise of the sum is made by the devices and by the receiver.

    y / c = sum_k (clip_C(d_k) + n_k) + w / c,    n_k ~ N(0, s^2 I),    s^2 = (z^2 C^2 - N0 / c^2) / K

with the received amplitude c of full power at the weakest of the K devices, a device's largest norm C and the
d entries that travel (``privacy/channel.py``). All else is ``device_dp.py``'s: equal weights, the constant
below, coins, ledgers. Amplitudes follow channels and C alone, never what is sent, so there are no means and
deviations on a side channel here, and nobody is drowned for the good of the others: the power rule must be
one that aligns (``wireless.air`` = ``inversion`` or ``truncated``).

Where ``privacy.count-channel-noise`` is false, the devices make all of z C and the receiver's noise comes on
top. Where it is true they make what lacks at the worst case: a receiver without its noise figure and without
interference, and better by the margin. Either way the ledgers are charged for z.

Departures: those who were heard make all of the noise, as if whoever vanished had said so before; real
devices must plan for it. Against m devices that collude, the others' noise is (K - m) / K of it.
"""

from __future__ import annotations

import math

import numpy as np

from fedlam_app.base.keys import rng
from fedlam_app.privacy import channel
from strategies.algorithm import Algorithm
from strategies.device_books import Arrays
from strategies.device_dp import DeviceDp
from strategies.participation import Turn

TOLD = ("z_asked", "z_artificial", "z_effective")


class PrivateAir(DeviceDp):
    """One sum, heard with noise."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        wireless = self.config.wireless
        figure_db = wireless.bs_noise_db + wireless.interference_db
        worst = float(channel.worst(1.0, 1.0, figure_db, self.privacy.channel_margin_db))
        counts = self.privacy.count_channel_noise
        self.counted = channel.REAL_SHARE / worst if counts else 0.0  # N0 that counts
        self.said = np.zeros(4)  # steps, and sums over them of what TOLD names

    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        self.artificial: float | None = None  # noise multiplier of the sum, of the devices' making

    def end(self, number: int) -> None:
        if self.members:
            self._listen(number)
        super().end(number)

    def summary(self) -> dict[str, float]:
        """Return the means over the run of z, asked for and artificial and as the receiver has it."""
        count, *sums = self.said.tolist()
        return {name: total / max(count, 1.0) for name, total in zip(TOLD, sums, strict=True)}

    def state(self) -> Arrays:
        return {**super().state(), "privacy.air": self.said}

    def load(self, state: Arrays) -> None:
        self.said = np.array(state.pop("privacy.air"), np.float64)
        super().load(state)

    # --- helpers ------------------------------------------------------------------------------------

    def _listen(self, number: int) -> None:
        """Add the receiver's noise to the sum, and find what the devices add."""
        at = {k: place for place, k in enumerate(self.turn.ids)}
        snr = np.array([self.turn.snr[at[k]] for k in self.members])
        travels, z = self._travels(number), self._noise(self.turn)
        entries = int(travels.sum())
        sent = channel.together(snr, 1.0, self.counted, 1.0 / entries, z**2)
        self.artificial = math.sqrt(len(snr) * float(sent.artificial))
        heard = math.sqrt(channel.REAL_SHARE / float(sent.amplitude))
        draw = rng(self.config.seed, "receiver", number)
        self.total[travels] += heard * self.clip * draw.standard_normal(entries)
        self.said = self.said + np.array([1.0, z, self.artificial, math.hypot(self.artificial, heard)])

    def _sum_noise(self, z: float) -> float:
        return super()._sum_noise(z) if self.artificial is None else self.artificial
