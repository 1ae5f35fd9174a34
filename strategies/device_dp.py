"""Device-level differential privacy: clipped updates of equal weight, one sum, one noise, one constant below.

    d_k = v_k - w                      a device's update; in gradient space its gradient
    S   = sum_k clip_C(d_k)            every device counts 1: ||S|| changes by at most C with any one of them
    w  <- rule(w + (S + N(0, z_sum^2 C^2 I)) / m)             m = devices that are expected, a constant

H. B. McMahan, D. Ramage, K. Talwar, L. Zhang, "Learning Differentially Private Recurrent Language Models",
ICLR 2018, arXiv:1710.06963 (recalled). The server is trusted with the updates; whoever gets the models is
not. How many samples a device has is its own affair, and weights by them would break the bound (in Flower
1.41, one device of 1,000 samples beside nine of 10 has 0.11 of the noise that is claimed): nothing that a
device or a policy says about weight counts here. The divisor is no count either: arrivals would move it.

    visible    who takes part is known, and claims nothing: a device is charged (1, z) where its update counts
    poisson    secret coins of chance q = m / N: all are charged (q, z) in every step, and a step to which
               nobody came is a step of noise alone

z is ``privacy.noise-multiplier``, or the least that keeps the largest budget for all of a run's steps that a
device can expect to be in. Whoever cannot pay is not asked, and the run goes on. Parts that do not travel
get no noise. The noise is keyed by all that it is added to: the same sum of the same step gets the same noise
again, so that a killed run repeats its release and pays nothing for it.

The bound holds for late updates as well (``versions.py``): they are clipped when they come in. Policies learn
that a device came, and not the norm of its update, which would tell of its data by way of who is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.vectors import Vector
from fedlam_app.config import RunConfig, experiment
from fedlam_app.privacy.accounting import Release
from fedlam_app.privacy.adaptive_clip import BIT_SHARE, bit_std, clipped, moved, sum_noise, whole_share
from fedlam_app.privacy.noise import Stream, digest
from fedlam_app.rules_wireless import has_fleet
from strategies.algorithm import Algorithm
from strategies.device_books import Arrays, Books, server_secret
from strategies.participation import Turn
from strategies.reception import Doubles, Straight


def expected_devices(config: RunConfig) -> int:
    """Return m: how many updates a step is made of where all goes as planned."""
    wanted = config.train.wanted
    asynchronous = has_fleet(config) and config.selection.mode == "asynchronous"
    return min(config.fedbuff.buffer, wanted) if asynchronous else wanted


def participations(config: RunConfig, space: str) -> tuple[float, int]:
    """Return (q, events): what a device of the plan is charged for in a run."""
    wanted, devices, steps = expected_devices(config), config.train.devices, config.train.steps(space)
    if config.privacy.cohort == "poisson":
        return wanted / devices, steps
    return 1.0, -(-steps * wanted // devices)  # rounded up


def planned_noise(config: RunConfig, space: str, books: Books) -> float:
    """Return z; 0 clips alone."""
    if config.privacy.noise_multiplier or config.privacy.noiseless:
        return config.privacy.noise_multiplier
    return books.least_noise(*participations(config, space))


def check(config: RunConfig, space: str) -> None:
    """Raise ``ValueError`` where nobody could take part, or the adaptive clip would tell too much."""
    privacy = config.privacy
    books = Books(privacy, range(config.train.devices), privacy.cohort == "poisson")
    z, (q, _) = planned_noise(config, space, books), participations(config, space)
    if len(books.cannot_pay(books.devices, Release(group="any", z=z, q=q))) == len(books.devices):
        raise ValueError(
            f"no device's privacy budget has room for one step at a noise multiplier of {z:.4g}; raise"
            " 'privacy.noise-multiplier' or 'privacy.target-epsilon'"
        )
    wanted = expected_devices(config)
    if privacy.quantile and z >= 2.0 * bit_std(wanted):
        raise ValueError(
            f"'privacy.quantile' = {privacy.quantile:g} is not allowed with {wanted} devices a step and a"
            f" noise multiplier of {z:.4g}: counting norms would tell more by itself; it must be 0, or the"
            f" devices more than {z / (2.0 * BIT_SHARE):.4g}"
        )


class DeviceDp(Straight):
    """The rule gets one result: where the noised mean update leads."""

    apart: ClassVar[bool] = True  # each update is clipped by itself
    private: ClassVar[bool] = True

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        config, privacy = algorithm.config, algorithm.config.privacy
        self.config, self.privacy = config, privacy
        self.poisson = privacy.cohort == "poisson"
        self.expected = expected_devices(config)
        self.chance, _ = participations(config, algorithm.space)
        self.last = config.train.steps(algorithm.space)
        self.books = Books(privacy, algorithm.devices, self.poisson)
        self.z = planned_noise(config, algorithm.space, self.books)
        self.clip = privacy.clip
        self.gone = self.books.cannot_pay(algorithm.devices, self._release(0, self.z))
        self.told: dict[int, str] = {}
        self.failed: Callable[[str], None] = lambda reason: None
        if self.poisson:
            algorithm.coins = self.coins

    @property
    def alone(self) -> bool:
        return self.poisson and len(self.gone) < len(self.algorithm.devices)

    def tells(self, books: dict[int, str], failed: Callable[[str], None]) -> None:
        self.told, self.failed = books, failed
        self.told |= self.books.texts()
        if self.gone:
            failed(
                f"{len(self.gone)} of {len(self.algorithm.devices)} devices take no part: their privacy"
                f" budgets have no room for one step at a noise multiplier of {self.z:.4g}"
            )

    def coins(self, number: int) -> NDArray[np.bool_]:
        """Return whose secret coin lets it take part in a step, (N,)."""
        devices = len(self.algorithm.devices)
        return Stream(self._secret, "coins", self._run, number).uniform(devices) < self.chance

    def admitted(self, turn: Turn, number: int) -> Turn:
        z = self._noise(turn)
        broke = self.books.cannot_pay(turn.ids, self._release(number, z))
        if not broke:
            return turn
        self._let_go(broke, number, z)
        return turn.only([place for place, k in enumerate(turn.ids) if k not in broke])

    def begin(self, turn: Turn) -> None:
        self.turn, self.members, self.count = turn, set[int](), 0.0
        self.asked = set(turn.ids)
        self.bits = 0.0  # sum_k (b_k - 1/2)
        self.total: Doubles = np.zeros(self.algorithm.models().shape[1])
        adapter = self.algorithm.space == "adapter"
        self.start = self.algorithm.models()[0].astype(np.float64) if adapter else np.zeros_like(self.total)
        if self.privacy.quantile:
            self._sum_noise(self._noise(turn))  # refuses before anybody works

    def fold(self, device: int, vector: Vector, weight: float) -> None:
        """Take in one update; ``weight`` is what the device says of itself, and counts for nothing."""
        if device not in self.asked or device in self.members:
            raise ValueError(f"device {device} is not of this step, or has been heard in it already")
        update, norm = clipped(vector.astype(np.float64) - self.start, self.clip)
        if not math.isfinite(norm):
            self.failed(f"device {device} was left out: its update is not finite")
            return
        self.members.add(device)
        self.count += 1.0
        self.total += update
        self.bits += (norm <= self.clip) - 0.5

    def fold_sum(self, total: Doubles, weight: float, inside: float = 0.0) -> None:
        """Take in sum_k (w + clip_C(d_k)) of ``weight`` devices of the turn, each clipped where it is.

        ``inside`` of them were left whole. Nobody here knows whose they are, so all of the turn are charged.
        """
        if not self.count + weight <= len(self.asked):
            raise ValueError(
                f"a sum of {weight:g} updates more, of {len(self.asked)} devices that were asked"
            )
        self.members, self.count = set(self.asked), self.count + weight
        self.total += total - weight * self.start
        self.bits += inside - weight / 2.0

    def end(self, number: int) -> None:
        if not (self.count or self.alone):
            return
        z, travels = self._noise(self.turn), self._travels(number)
        total = self.total[travels]
        payers = sorted(self.members)
        if self.poisson:
            release = self._release(number, z)
            there = [k for k in self.algorithm.devices if k not in self.gone]
            broke = self.books.cannot_pay(there, release)
            payers = [k for k in there if k not in broke]
        name = digest(self._run, number, self.clip, z, self.expected, total, self.bits)
        # Whoever reads a ledger could try totals against their digest: only what the secret makes of it.
        said = Stream(self._secret, "said", name).bytes(16).hex()
        self.told |= self.books.charge(payers, self._release(number, z, said))  # before anything is released
        noise = Stream(self._secret, "devices", number, name)
        bits = self._bits(noise, z)
        total = total + noise.normal(len(total), self._sum_noise(z) * self.clip)
        update = np.zeros_like(self.start)
        update[travels] = total / self.expected
        received = (self.start + update).astype(self.algorithm.models().dtype)
        self.algorithm.fold(self.algorithm.devices[0], received, 1.0)
        if self.privacy.quantile:
            share = whole_share(self.bits, bits, self.expected)
            self.clip = moved(self.clip, share, self.privacy.quantile, self.privacy.quantile_lr)
        if number < self.last:
            self._let_go(self.books.cannot_pay(payers, self._release(number + 1, z)), number, z)

    def state(self) -> Arrays:
        return {
            **self.books.state(),
            "privacy.noise": np.array([self.z, self.clip]),
            "privacy.gone": np.array(sorted(self.gone), np.int64),
        }

    def load(self, state: Arrays) -> None:
        self.books.load(state)
        self.z, self.clip = state.pop("privacy.noise").tolist()
        self.gone = set(state.pop("privacy.gone").tolist())
        self.told |= self.books.texts()

    # --- helpers ------------------------------------------------------------------------------------

    @cached_property
    def _secret(self) -> bytes:
        return server_secret(self.config)

    @cached_property
    def _run(self) -> str:
        return experiment(self.config)

    def _release(self, number: int, z: float, name: str = "") -> Release:
        return Release(group=f"{self._run} {number}", digest=name, z=z, q=self.chance)

    def _noise(self, turn: Turn) -> float:
        """Return a step's noise multiplier: it is one for all, so the largest that the schedule asks for."""
        return self.z * max(turn.noise, default=1.0)

    def _sum_noise(self, z: float) -> float:
        """Return the noise multiplier of the sum; the bits' noise follows the schedule as the sum's does."""
        if not self.privacy.quantile or z == 0.0:
            return z
        return sum_noise(z, bit_std(self.expected) * z / self.z)

    def _bits(self, noise: Stream, z: float) -> float:
        """Return the noise on the sum of bits."""
        if not self.privacy.quantile or z == 0.0:
            return 0.0
        return float(noise.normal(1, bit_std(self.expected) * z / self.z)[0])

    def _travels(self, number: int) -> NDArray[np.bool_]:
        """Return the mask (p,) of what devices hand in."""
        algorithm = self.algorithm
        if algorithm.space == "gradient":
            return np.ones(algorithm.layout.size, bool)
        return algorithm.layout.part(algorithm.plan(number).returns)

    def _let_go(self, broke: Collection[int], number: int, z: float) -> None:
        """Part for good with those who could not pay for more noise either, which costs less."""
        final = self.books.cannot_pay(broke, self._release(number + 1, max(z, self.z)))
        for k in sorted(final - self.gone):
            self.failed(f"step {number}: device {k} takes no part any more: its privacy budget is spent")
        self.gone |= final
