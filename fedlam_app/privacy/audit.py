"""Audit of one mechanism: many repetitions with and without a canary, and the epsilon that they prove.

A mechanism that is mu-GDP (J. Dong, A. Roth, W. Su, JRSS B 2022, arXiv:1905.02383) is one whose two worlds,
with the canary and without, are no easier to tell apart than N(1, z^2) and N(0, z^2), mu = 1 / z. It holds
(epsilon, delta) with (B. Balle, Y.-X. Wang, ICML 2018, arXiv:1805.06530)

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu).

Whoever guesses "with" where a statistic passes a threshold errs in two ways, FPR and FNR. At any threshold,

    mu-GDP                 mu >= Phi^-1(1 - FPR) - Phi^-1(FNR)                  (``mu_bound``)
    (epsilon, delta)-DP    epsilon >= log((1 - delta - FNR) / FPR), or the two exchanged  (``epsilon_bound``)

so bounds of the rates from above (C. Clopper, E. Pearson, Biometrika 1934) give bounds from below. The second
needs no assumption; the first, tighter, refutes the claim "a Gaussian mechanism of this noise" (M. Nasr et
al., USENIX Security 2023, arXiv:2302.07956). Thresholds are chosen on other repetitions than are counted.
Beside the bounds stand two tests of the noise itself: its standard deviation (chi-square), and whether two
releases share it (correlation). A bound from below refutes a claim, or fails to: it never proves one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import Key, rng
from fedlam_app.base.plain import plain_fields

ERROR = 0.01  # chance that a bound lies above the truth
ALARM = 1e-4  # chance that a test of the noise fails a mechanism that is right
PILOT = 0.2  # share of the repetitions that thresholds are chosen on
MIDDLE = np.linspace(0.3, 0.7, 21)  # where mu is told best: between the two worlds
TAILS = np.concatenate(
    [np.geomspace(1e-4, 0.5, 64), 1.0 - np.geomspace(1e-4, 0.5, 64)]
)  # and epsilon: far out
WORLDS = 20_000  # in one call of a mechanism

Floats = NDArray[np.float64]
Mechanism = Callable[[NDArray[np.bool_]], Floats]
"""Worlds (n,), each with the canary or without, to what an adversary reads in each (n,): 0 or 1 plus noise.

A gap of 1 is the largest that one sample may make; the noise has the standard deviation z. Calls differ in
nothing but who is there, so that noise which does not depend on the content is caught.
"""


class Seen(NamedTuple):
    """What the repetitions showed: blocks of worlds."""

    present: NDArray[np.bool_]  # (blocks, n)
    statistics: Floats  # (blocks, n)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an audit of one mechanism found."""

    trials: int
    mu: float  # claimed; the noise's standard deviation is 1 / mu
    delta: float
    epsilon: float  # claimed, exactly that of mu at delta
    mu_bound: float
    epsilon_gdp: float  # of mu_bound at delta
    epsilon_free: float  # without any assumption
    std: float  # of the noise, over what is claimed
    std_most: float  # ... at most
    correlation: float  # the largest between two releases
    correlation_most: float  # that chance explains

    @property
    def bound(self) -> float:
        """The largest epsilon that is proved."""
        return float(np.nanmax([self.epsilon_gdp, self.epsilon_free]))

    @property
    def reasons(self) -> list[str]:
        """What contradicts the claim; empty where nothing does."""
        found = []
        if self.bound > self.epsilon:
            found.append(f"epsilon is at least {self.bound:.3g}")
        if self.std_most < 1.0:
            found.append(f"the noise has {self.std:.3g} of its standard deviation")
        if self.correlation > self.correlation_most:
            found.append(f"noise is used again (correlation {self.correlation:.2g})")
        return found

    def record(self) -> dict[str, object]:
        """Return the finding as JSON; what does not apply is null."""
        return plain_fields(asdict(self)) | {"reasons": self.reasons}


def audit(
    mechanism: Mechanism, mu: float, delta: float, trials: int, *key: Key, worlds: int = WORLDS
) -> Finding:
    """Repeat a mechanism that claims to be mu-GDP ``trials`` times, and say what that proves."""
    seen = observe(mechanism, trials, *key, worlds=worlds)
    pilot, rest = parted(seen)
    bound = _best(mu_bound, pilot, rest, MIDDLE)
    std, most = _noise(seen, mu)
    correlation, chance = _correlation(seen)
    return Finding(
        trials=seen.statistics.size,
        mu=mu,
        delta=delta,
        epsilon=gaussian_epsilon(mu, delta),
        mu_bound=bound,
        epsilon_gdp=gaussian_epsilon(bound, delta),
        epsilon_free=_best(lambda fpr, fnr: epsilon_bound(fpr, fnr, delta), pilot, rest, TAILS),
        std=std,
        std_most=most,
        correlation=correlation,
        correlation_most=chance,
    )


def audit_pure(mechanism: Mechanism, epsilon: float, trials: int, *key: Key, worlds: int = WORLDS) -> Finding:
    """Repeat a mechanism of two answers, 0 and 1, that claims a pure epsilon."""
    seen = observe(mechanism, trials, *key, worlds=worlds)
    rates = _rates(_sorted(seen.present.ravel(), seen.statistics.ravel()), np.array([0.5]))
    return Finding(
        trials=seen.statistics.size,
        mu=math.nan,
        delta=0.0,
        epsilon=epsilon,
        mu_bound=math.nan,
        epsilon_gdp=math.nan,
        epsilon_free=float(epsilon_bound(*rates, 0.0)[0]),
        std=math.nan,
        std_most=math.nan,
        correlation=math.nan,
        correlation_most=math.nan,
    )


def observe(mechanism: Mechanism, trials: int, *key: Key, worlds: int = WORLDS) -> Seen:
    """Return what a mechanism shows in ``trials`` worlds, rounded up to two or more calls of ``worlds``."""
    blocks = max(2, -(-trials // worlds))
    present = rng(*key, "audit").random((blocks, worlds)) < 0.5  # fair coins
    return Seen(present, np.stack([np.asarray(mechanism(coins), np.float64) for coins in present]))


# --- the exact epsilon of Gaussian noise ---------------------------------------------------------------


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the least delta at which mu-GDP holds ``epsilon``."""
    from scipy.special import log_ndtr, ndtr

    if mu == 0.0:
        return 0.0
    far = epsilon + log_ndtr(-mu / 2.0 - epsilon / mu)  # in logs: e^epsilon alone overflows
    return float(ndtr(mu / 2.0 - epsilon / mu) - math.exp(min(far, 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon that mu-GDP holds at ``delta``; inf for an endless mu."""
    from scipy.optimize import brentq

    if math.isinf(mu):
        return math.inf
    if mu <= 0.0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    most = mu * mu / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta)) + 1.0
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, most, xtol=1e-10))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the mu whose epsilon at ``delta`` is this one; 1 / mu is the noise multiplier."""
    from scipy.optimize import brentq

    low, high = 1e-6, math.sqrt(2.0 * epsilon) + 10.0
    return float(brentq(lambda mu: gaussian_epsilon(mu, delta) - epsilon, low, high, xtol=1e-12))


# --- bounds from counts --------------------------------------------------------------------------------


def at_most(count: NDArray[np.int64] | int, trials: int, error: float) -> Floats:
    """Return Clopper and Pearson's bound of a rate from above, wrong with a chance of at most ``error``."""
    from scipy.stats import beta

    count = np.asarray(count)
    return np.where(count < trials, beta.ppf(1.0 - error, count + 1, np.maximum(trials - count, 1)), 1.0)


def mu_bound(fpr: Floats, fnr: Floats) -> Floats:
    """Return the mu that error rates (bounded from above) prove; 0 where they prove nothing."""
    from scipy.special import ndtri

    return np.asarray(np.maximum(-ndtri(fpr) - ndtri(fnr), 0.0))


def epsilon_bound(fpr: Floats, fnr: Floats, delta: float) -> Floats:
    """Return the epsilon at ``delta`` that error rates (bounded from above) prove, of any mechanism."""
    with np.errstate(divide="ignore"):
        high = np.log(np.maximum(1.0 - delta - fnr, 0.0)) - np.log(fpr)
        low = np.log(np.maximum(1.0 - delta - fpr, 0.0)) - np.log(fnr)
    return np.asarray(np.maximum(np.maximum(high, low), 0.0))


def parted(seen: Seen) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Return the sorted statistics (without, with) of the pilot, and those of the rest."""
    present, found = seen.present.ravel(), seen.statistics.ravel()
    cut = int(PILOT * len(found))
    return _sorted(present[:cut], found[:cut]), _sorted(present[cut:], found[cut:])


def _sorted(present: NDArray[np.bool_], found: Floats) -> tuple[Floats, Floats]:
    return np.sort(found[~present]), np.sort(found[present])


def _best(
    bound: Callable[[Floats, Floats], Floats],
    pilot: tuple[Floats, Floats],
    rest: tuple[Floats, Floats],
    shares: Floats,
) -> float:
    """Return the bound of the rest at that quantile of all of the pilot at which the pilot's is best."""
    thresholds = np.unique(np.quantile(np.concatenate(pilot), shares))
    best = thresholds[int(np.argmax(bound(*_rates(pilot, thresholds))))]
    return float(bound(*_rates(rest, np.array([best])))[0])


def _rates(worlds: tuple[Floats, Floats], thresholds: Floats) -> tuple[Floats, Floats]:
    """Return what FPR and FNR are at most, each (thresholds,), together wrong by at most ``ERROR``."""
    off, on = worlds
    false = len(off) - np.searchsorted(off, thresholds, "left")
    missed = np.searchsorted(on, thresholds, "left")
    return at_most(false, len(off), ERROR / 2), at_most(missed, len(on), ERROR / 2)


# --- tests of the noise itself -------------------------------------------------------------------------


def residuals(seen: Seen) -> Floats:
    """Return the noise (blocks, n): statistics less the mean of their kind."""
    on = seen.statistics[seen.present].mean()
    off = seen.statistics[~seen.present].mean()
    return seen.statistics - np.where(seen.present, on, off)


def _noise(seen: Seen, mu: float) -> tuple[float, float]:
    """Return the noise's standard deviation over 1 / mu, and what it is at most (chi-square)."""
    from scipy.stats import chi2

    noise, free = residuals(seen), seen.statistics.size - 2
    total = float((noise**2).sum()) * mu**2
    return math.sqrt(total / free), math.sqrt(total / chi2.ppf(ALARM, free))


def _correlation(seen: Seen) -> tuple[float, float]:
    """Return the largest correlation, of a release with the next or within one, and what chance explains."""
    from scipy.stats import norm

    noise = residuals(seen)
    half = noise.shape[1] // 2
    first, second = noise[:, :half], noise[:, half : 2 * half]
    pairs = [*itertools.pairwise(first), *zip(first, second, strict=True)]
    chance = float(norm.isf(ALARM / (2 * len(pairs)))) / math.sqrt(half)
    return max(abs(_cosine(*pair)) for pair in pairs), chance


def _cosine(one: Floats, other: Floats) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else 1.0
