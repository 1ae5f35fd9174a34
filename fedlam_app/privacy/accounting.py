"""The ledger: every release of one device, and the epsilon that they add up to. No torch, and no trust.

Rényi differential privacy (I. Mironov, CSF 2017, arXiv:1702.07476) at orders a:

    Gaussian, noise z = sigma / C    R(a) = a / (2 z^2)
    Poisson-sampled at rate q        R(a) = log E[((1 - q) + q e^((2 x - 1) / (2 z^2)))^a] / (a - 1)
      with x ~ N(0, z^2)                  = log(sum_k C(a, k) (1 - q)^(a - k) q^k e^((k^2 - k) / (2 z^2)))
                                            / (a - 1)        where a is an integer
    a composition                    R(a) adds up
    epsilon(delta)                   min_a R(a) + log((a - 1) / a) - (log delta + log a) / (a - 1)

The middle is I. Mironov, K. Talwar, L. Zhang, "Rényi Differential Privacy of the Sampled Gaussian
Mechanism", 2019, arXiv:1908.10530; the last line is B. Balle et al., AISTATS 2020, arXiv:1905.09982. Orders
are Opacus' own and larger integers, without which no epsilon below 0.1 could be told. At every order the
number is that of Opacus (tests: 1e-12 of it at integers, 1e-9 elsewhere); it is computed here because every
device's ledger calibrates for a rate of its own, and without importing torch.

Rules of the book. Messages from one sampled batch are one event, of :func:`joint` noise. A spend is written
down before anything is released. A release that would pass the budget is refused (a Rényi filter: V.
Feldman, T. Zrnic, NeurIPS 2021, arXiv:2008.11193), so noise may follow public data and past releases, and
nothing else. The same bytes sent twice are one release: a release has a ``digest`` of all that determines
it, its noise included.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.quiet import root_log_kept

FRACTIONS = np.array([1.0 + x / 10.0 for x in range(1, 100) if x % 10])
INTEGERS = np.array([*range(2, 257), 320, 384, 448, 512, 640, 768, 896, 1024], float)
ORDERS = np.concatenate([FRACTIONS, INTEGERS])
EXACT = 1e-12  # what rounding may add to a sum of spends
_LEAST, _MOST = 0.05, 1e5  # noise multipliers among which calibration looks

Rdp = NDArray[np.float64]  # (orders,)


class BudgetSpent(ValueError):
    """A release that would pass the budget; nothing was spent and nothing may be sent."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is about to leave a device: ``steps`` joint events of noise ``z`` at sampling rate ``q``.

    ``group`` names a set of releases in which no sample comes twice (an epoch, a round): it is charged once,
    at its least noise. ``part`` is a release in it, ``digest`` all that determines its bytes: a part that
    comes again with another digest is charged again. ``pure`` is an epsilon without delta (randomised
    response).
    """

    group: str
    part: str = ""
    digest: str = ""
    z: float = math.inf
    q: float = 1.0
    steps: int = 1
    pure: float = 0.0

    def __post_init__(self) -> None:
        if not (self.z >= 0.0 and 0.0 <= self.q <= 1.0 and self.steps >= 1 and self.pure >= 0.0):
            raise ValueError(f"no release has z = {self.z}, q = {self.q}, steps = {self.steps}, {self.pure}")


@dataclass
class Ledger:
    """One device's book."""

    budget: float  # epsilon; inf: everything is recorded and nothing refused
    delta: float
    events: list[tuple[float, float, int]] = field(default_factory=list)  # (q, z, steps), each (q, z) once
    pure: float = 0.0
    group: str = ""  # the last one charged
    least_z: float = math.inf  # its noise
    parts: dict[str, str] = field(default_factory=dict)  # digests of its parts

    def __post_init__(self) -> None:
        self._at = {(q, z): place for place, (q, z, _) in enumerate(self.events)}
        self._add_up()

    def _add_up(self) -> None:
        """Sum in the order of the events, so that a book that was loaded says the same to the last bit."""
        self._rdp = sum((rdp(q, z) * steps for q, z, steps in self.events), np.zeros(len(ORDERS)))

    @property
    def epsilon(self) -> float:
        """What has been spent."""
        return _total(self._rdp, self.pure, self.delta)

    def cost(self, release: Release) -> tuple[float, float, int] | None:
        """Return what a release adds to the book, as (q, z, steps); ``None`` where it adds nothing."""
        if release.group != self.group:
            return release.q, release.z, release.steps
        known = self.parts.get(release.part)
        if known is not None and known != release.digest:
            return release.q, release.z, release.steps
        if release.z < self.least_z:
            if release.q < 1.0:  # no difference of two sampled events is an event: the whole is charged
                return release.q, release.z, release.steps
            more = release.z**-2 - (0.0 if math.isinf(self.least_z) else self.least_z**-2)
            return 1.0, more**-0.5, release.steps
        return None

    def after(self, release: Release) -> float:
        """Return the epsilon that there would be after a release."""
        added = self.cost(release)
        if added is None:
            return self.epsilon
        q, z, steps = added
        return _total(self._rdp + rdp(q, z) * steps, self.pure + release.pure, self.delta)

    def charge(self, release: Release) -> None:
        """Write a release down, before it leaves; ``BudgetSpent`` where it would pass the budget."""
        added, then = self.cost(release), self.after(release)
        if then > self.budget + EXACT:
            raise BudgetSpent(
                f"epsilon {self.epsilon:.4g} of {self.budget:g} is spent and this release would make it"
                f" {then:.4g} (delta {self.delta:g})"
            )
        if added is not None:
            q, z, steps = added
            self.pure += release.pure
            if math.isfinite(z):
                place = self._at.setdefault((q, z), len(self.events))
                before = self.events[place][2] if place < len(self.events) else 0
                self.events[place : place + 1] = [(q, z, before + steps)]
                self._add_up()
        if release.group != self.group:
            self.group, self.parts, self.least_z = release.group, {}, math.inf
        self.least_z = min(self.least_z, release.z)
        self.parts[release.part] = release.digest

    def calibrate(self, q: float, steps: int, pure: float = 0.0) -> float:
        """Return the least noise z at which ``steps`` events at rate ``q`` fit into the rest of the budget.

        0 for a budget without end. ``BudgetSpent`` where no noise would do. Exact to 1e-6 of z, never below.
        """
        if math.isinf(self.budget):
            return 0.0
        from scipy.optimize import brentq

        def over(log_z: float) -> float:
            then = _total(self._rdp + rdp(q, math.exp(log_z)) * steps, self.pure + pure, self.delta)
            return min(then, 1e6) - self.budget

        low, high = math.log(_LEAST), math.log(_MOST)
        if over(low) <= 0.0:
            return _LEAST
        if over(high) > 0.0:
            raise BudgetSpent(
                f"epsilon {self.epsilon:.4g} of {self.budget:g} is spent: {steps} steps fit at no noise"
                f" (delta {self.delta:g})"
            )
        found = brentq(over, low, high, xtol=1e-7)
        while over(found) > 0.0:
            found += 2e-7
        return math.exp(found)

    def prv(self, error: float = 0.01) -> float:
        """Return the tighter epsilon of Opacus' PRV accountant, within ``error`` above the truth; slow.

        S. Gopi, Y. T. Lee, L. Wutschitz, NeurIPS 2021, arXiv:2106.02848.
        """
        with root_log_kept():
            from opacus.accountants import PRVAccountant
        if not self.events:
            return self.pure
        accountant = PRVAccountant()
        accountant.history = [(z, q, steps) for q, z, steps in self.events]
        return float(accountant.get_epsilon(self.delta, eps_error=error)) + self.pure

    def to_json(self) -> str:
        """Return the book as JSON; numbers come back bit for bit."""
        return json.dumps(
            {
                "budget": self.budget,
                "delta": self.delta,
                "events": self.events,
                "pure": self.pure,
                "group": self.group,
                "least_z": self.least_z,
                "parts": self.parts,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Return the book that :meth:`to_json` wrote; ``ValueError`` where it is none."""
        try:
            saved = json.loads(text)
            events = [(float(q), float(z), int(steps)) for q, z, steps in saved.pop("events")]
            return cls(events=events, **saved)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this is no privacy ledger ({error}): {text[:80]!r}") from None


def kept(path: Path, device: int, budget: float, delta: float) -> Ledger | None:
    """Return the book that a device has in a file, at a budget of now; ``None`` where there is none.

    ``ValueError`` where it was kept at another delta: its epsilons would mean something else.
    """
    if not path.is_file():
        return None
    ledger = Ledger.from_json(path.read_text(encoding="utf-8"))
    if ledger.delta != delta:
        raise ValueError(
            f"device {device} keeps its ledger at delta = {ledger.delta:g} ({path}), and 'privacy.delta' ="
            f" {delta:g}; they must be the same"
        )
    ledger.budget = budget
    return ledger


def joint(*noises: float) -> float:
    """Return the noise of several messages about one sample, z^-2 = sum_j z_j^-2; inf tells nothing."""
    told = sum(z**-2 for z in noises) if all(noises) else math.inf
    return told**-0.5 if told else math.inf


@functools.lru_cache(maxsize=4096)
def rdp(q: float, z: float) -> Rdp:
    """Return the RDP (orders,) of one Gaussian event of noise ``z``, Poisson-sampled at rate ``q``."""
    if q == 0.0 or math.isinf(z):
        return np.zeros(len(ORDERS))
    if z == 0.0 or (q < 1.0 and z < _LEAST / 2.0):  # so little is no noise; its sums would fill the memory
        return np.full(len(ORDERS), np.inf)
    if q == 1.0:
        return ORDERS / (2.0 * z**2)
    return np.concatenate([_fractional(q, z), _integer(q, z)])


def _integer(q: float, z: float) -> Rdp:
    """The sum over k at the integer orders."""
    logs = _binomials() + _powers(q)  # (orders, k), -inf past the order
    k = np.arange(logs.shape[1], dtype=float)
    return _log_sum(logs + (k * k - k) / (2.0 * z**2)) / (INTEGERS - 1)


def _fractional(q: float, z: float) -> Rdp:
    """The expectation at the other orders, by the trapezoidal rule.

    The integrand is analytic within pi z^2 of the real line, so the rule's error is below e^-37 at this step.
    """
    step = min(z / 4.0, z * z / 2.0)
    x = np.arange(-13.0 * z, FRACTIONS.max() + 13.0 * z, step)
    gauss = -(x**2) / (2.0 * z**2) + np.log(step / (z * math.sqrt(2.0 * math.pi)))
    ratio = np.logaddexp(np.log1p(-q), np.log(q) + (2.0 * x - 1.0) / (2.0 * z**2))
    return _log_sum(gauss + FRACTIONS[:, None] * ratio) / (FRACTIONS - 1.0)


def _log_sum(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    most = logs.max(axis=1, keepdims=True)
    return np.asarray(most[:, 0] + np.log(np.exp(logs - most).sum(axis=1)))


def epsilon_of(total: Rdp, delta: float) -> float:
    """Return the epsilon at ``delta`` of an RDP (orders,); 0 where nothing was spent."""
    return max(0.0, float(epsilons_of(total, delta).min())) if total.any() else 0.0


def epsilons_of(total: Rdp, delta: float) -> Rdp:
    """Return the epsilon at ``delta`` that each order of an RDP gives (orders,)."""
    with np.errstate(invalid="ignore"):
        return np.asarray(total + np.log1p(-1.0 / ORDERS) - (np.log(delta) + np.log(ORDERS)) / (ORDERS - 1))


def _total(total: Rdp, pure: float, delta: float) -> float:
    return epsilon_of(total, delta) + pure


@functools.cache
def _binomials() -> NDArray[np.float64]:
    """Return log C(a, k), (orders, k); -inf for k > a."""
    from scipy.special import gammaln

    a, k = INTEGERS[:, None], np.arange(INTEGERS.max() + 1)
    with np.errstate(invalid="ignore"):
        logs = gammaln(a + 1) - gammaln(k + 1) - gammaln(np.maximum(a - k, 0.0) + 1)
    return np.where(k <= a, logs, -np.inf)


@functools.lru_cache(maxsize=256)
def _powers(q: float) -> NDArray[np.float64]:
    """Return (a - k) log(1 - q) + k log q, (orders, k); anything for k > a."""
    a, k = INTEGERS[:, None], np.arange(INTEGERS.max() + 1)
    return np.asarray(np.maximum(a - k, 0.0) * np.log1p(-q) + k * np.log(q))
