"""Over-the-air aggregation: closed forms, limits on power, and the running sum against real signals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from fedlam_app.base.keys import rng
from fedlam_app.wireless.air import (
    Air,
    airtime_s,
    common_std,
    inversion,
    least_error,
    participation,
    received,
    truncated_inversion,
)

K, D = 8, 5
SEEDS = st.integers(0, 2**31)


def devices(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains, example counts and powers of K devices."""
    draw = rng(seed, "air")
    return draw.exponential(size=K) + 1e-3, draw.integers(1, 100, K).astype(float), draw.uniform(0.1, 1.0, K)


def modes(seed: int) -> list[Air]:
    gain, n, power = devices(seed)
    return [
        truncated_inversion(gain, n, power, 0.1, 0.2),
        inversion(gain, n, power, 0.1),
        least_error(gain, n, power, 0.1),
    ]


def test_the_known_case() -> None:
    air = least_error(np.array([0.2, 0.5, 1.0, 2.0]) ** 2, 1.0, 1.0, 0.1)
    assert air.eta == pytest.approx(0.310408, abs=1e-6)
    assert air.mse == pytest.approx(0.743590, abs=1e-6)


@pytest.mark.parametrize(
    ("threshold", "share", "eta"),
    [(0.05, 0.951, 0.405), (0.1, 0.905, 0.549), (0.5, 0.607, 1.786), (1.0, 0.368, 4.558)],
)
def test_truncated_inversion_has_its_known_power_and_participation(
    threshold: float, share: float, eta: float
) -> None:
    air = truncated_inversion(np.ones(3), 1.0, 1.0, 0.1, threshold)
    assert air.eta == pytest.approx(eta, abs=5e-4)
    assert participation(threshold) == pytest.approx(share, abs=5e-4)


@given(SEEDS)
def test_least_error_is_what_a_search_over_powers_finds(seed: int) -> None:
    gain, n, power = devices(seed)
    air, w, a = least_error(gain, n, power, 0.1), n / n.max(), np.sqrt(power * gain)

    def mse(log_root: float) -> float:
        root = math.exp(log_root)
        return float(((np.minimum(w, a / root) - w) ** 2).sum()) + 0.1 / root**2

    found = minimize_scalar(mse, bounds=(-8.0, 8.0), method="bounded", options={"xatol": 1e-9})
    assert air.mse == pytest.approx(found.fun, rel=1e-9)
    assert air.mse <= inversion(gain, n, power, 0.1).mse * (1 + 1e-12)


@given(SEEDS)
def test_no_device_sends_at_more_than_its_power(seed: int) -> None:
    gain, n, power = devices(seed)
    for air in (inversion(gain, n, power, 0.1), least_error(gain, n, power, 0.1)):
        sent = air.eta * (air.theta * air.weights) ** 2 / gain
        assert (sent <= power * (1 + 1e-12)).all()
        assert sent.max() > 0


def test_truncated_inversion_spends_the_power_of_the_neediest_device_on_average() -> None:
    draw, omega, n = rng(3, "power"), np.array([0.5, 2.0, 1.0]), np.array([1.0, 4.0, 3.0])
    sent = []
    for _ in range(20_000):
        gain = omega * draw.exponential(size=3)
        air = truncated_inversion(gain, n, 0.3, 0.1, 0.1, omega)
        sent.append(air.eta * (air.theta * air.weights) ** 2 / gain)
    mean, error = np.mean(sent, 0), np.std(sent, 0) / math.sqrt(len(sent))
    needed = n**2 / omega / (n**2 / omega).max() * 0.3
    assert (np.abs(mean - needed) <= 3 * error).all()


def test_participation_and_noise_are_as_the_closed_forms_say() -> None:
    draw, threshold, trials = rng(5, "trials"), 0.5, 10_000
    heard, ratio = 0, []
    for _ in range(trials):
        air = truncated_inversion(draw.exponential(size=K), 1.0, 1.0, 0.1, threshold)
        heard += int(air.heard.sum())
        if air.total_weight:
            noise = received(np.zeros(D), air, 0.0, 1.0, draw)
            ratio.append(float((noise**2).mean()) / (0.1 / (air.eta * air.heard.sum() ** 2)))
    share = participation(threshold)
    assert heard / (trials * K) == pytest.approx(share, rel=5e-3)
    assert abs(heard - trials * K * share) <= 3 * math.sqrt(trials * K * share * (1 - share))
    assert np.mean(ratio) == pytest.approx(1.0, rel=0.02)
    assert abs(np.mean(ratio) - 1.0) <= 3 * np.std(ratio) / math.sqrt(len(ratio))


@given(SEEDS)
def test_the_running_sum_gives_what_the_signals_would_have_given(seed: int) -> None:
    """All devices' signals through the channel, with the same noise, against ``received``."""
    gain, _, _ = devices(seed)
    vectors = rng(seed, "vectors").standard_normal((K, D)) * 3 + 1
    means, std = vectors.mean(1), common_std(vectors.std(1), rng(seed, "n").uniform(1, 2, K))
    for air in modes(seed):
        if not air.total_weight:
            continue
        w = air.weights * air.heard
        root = math.sqrt(air.eta)
        power = air.theta * root / np.sqrt(gain)  # p_k
        z = math.sqrt(0.1) * rng(seed, "noise").standard_normal(D)
        y = (np.sqrt(gain) * power * w) @ ((vectors - means[:, None]) / std) + z
        wanted = (std * y / root + w @ means) / w.sum()
        total = (air.theta * air.weights) @ vectors
        np.testing.assert_allclose(
            received(total, air, means, std, rng(seed, "noise")), wanted, rtol=1e-9, atol=1e-12
        )


@given(SEEDS, st.floats(0.1, 10.0))
def test_only_the_ratios_of_weights_matter(seed: int, c: float) -> None:
    gain, n, power = devices(seed)
    one, other = least_error(gain, n, power, 0.1), least_error(gain, c * n, power, 0.1)
    assert other.mse == pytest.approx(one.mse, rel=1e-12)
    assert other.noise_variance == pytest.approx(one.noise_variance, rel=1e-12)


@given(SEEDS)
def test_the_air_never_beats_the_exact_sum_and_little_noise_comes_near_it(seed: int) -> None:
    gain, n, power = devices(seed)
    assert all(air.mse > 0 for air in modes(seed))
    air = least_error(gain, n, power, 1e-14)
    vectors = rng(seed, "vectors").standard_normal((K, D))
    found = received((air.theta * air.weights) @ vectors, air, vectors.mean(1), 1.0, rng(seed, "noise"))
    np.testing.assert_allclose(found, np.average(vectors, axis=0, weights=n), atol=1e-3)


def test_one_std_for_all_is_the_weighted_root_mean_square() -> None:
    assert common_std([3.0, 4.0], [1.0, 1.0]) == pytest.approx(math.sqrt(12.5))
    assert common_std([3.0, 4.0], [9.0, 0.0]) == pytest.approx(3.0)


def test_airtime_does_not_know_how_many_send() -> None:
    assert airtime_s(400_000, 20e6) == pytest.approx(0.02)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="threshold = 0 must be above 0"):
        truncated_inversion([1.0], 1.0, 1.0, 0.1, 0.0)
    with pytest.raises(ValueError, match="gain = 0 must be above 0"):
        inversion([1.0, 0.0], 1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="gain is 0 for all devices"):
        least_error([0.0, 0.0], 1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="noise_w = -1 must be above 0"):
        least_error([1.0], 1.0, 1.0, -1.0)
    silent = truncated_inversion([0.01, 0.02], 1.0, 1.0, 0.1, 0.5)
    assert silent.noise_variance == math.inf
    with pytest.raises(ValueError, match="all devices are silent"):
        received(np.zeros(3), silent, 0.0, 1.0, rng(0, "noise"))
