"""Closed forms of the scores: what a perfect, an absent and a noisy forecast must get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlam_app.base import metrics
from fedlam_app.base.keys import rng

Complex = NDArray[np.complexfloating]


def channels(*shape: int, name: str = "channels") -> Complex:
    """White complex Gaussian entries of unit power."""
    draw = rng(2025, name)
    return (draw.standard_normal(shape) + 1j * draw.standard_normal(shape)) / np.sqrt(2.0)


def test_a_scaled_forecast_has_a_known_nmse() -> None:
    """Forecasting c h gives |1 - c|^2 for every average there is."""
    target = channels(5, 4, 3, 6)
    speed_kmh = np.array([10.0, 12.0, 40.0, 41.0, 97.0])
    predicted = (0.6 + 0.3j) * target
    ratio = 0.4**2 + 0.3**2
    error, power = metrics.nmse_sums(predicted, target)
    assert error.shape == power.shape == (5,)
    assert metrics.nmse_db(error, power) == pytest.approx(10 * np.log10(ratio))
    assert metrics.nmse_per_user_db(error, power) == pytest.approx(10 * np.log10(ratio))
    assert metrics.nmse_speed_mean_db(error, power, speed_kmh) == pytest.approx(10 * np.log10(ratio))
    assert metrics.nmse_per_horizon(predicted, target) == pytest.approx([ratio] * 3)


def test_perfect_and_absent_forecasts() -> None:
    target = channels(3, 4, 2, 5)
    assert metrics.nmse_db(*metrics.nmse_sums(target, target)) == -np.inf
    assert metrics.nmse_db(*metrics.nmse_sums(np.zeros_like(target), target)) == pytest.approx(0.0)


def test_the_two_averages_weigh_users_differently() -> None:
    """A strong user forecast well and a weak user not at all: 1/100 by power, 1/2 by head count."""
    target = np.ones((2, 1, 1, 1), complex) * np.sqrt([99.0, 1.0])[:, None, None, None]
    predicted = target * np.array([1.0, 0.0])[:, None, None, None]
    error, power = metrics.nmse_sums(predicted, target)
    assert metrics.nmse_db(error, power) == pytest.approx(-20.0)
    assert metrics.nmse_per_user_db(error, power) == pytest.approx(10 * np.log10(0.5))


def test_speed_bins_are_centred_and_averaged_in_linear() -> None:
    error, power = np.array([1.0, 3.0, 8.0, 2.0]), np.array([10.0, 10.0, 10.0, 20.0])
    speed_kmh = np.array([8.0, 14.9, 15.0, 100.0])
    assert metrics.nmse_per_speed(error, power, speed_kmh) == pytest.approx(
        {10.0: 0.2, 20.0: 0.8, 100.0: 0.1}
    )
    assert metrics.nmse_speed_mean_db(error, power, speed_kmh) == pytest.approx(10 * np.log10(1.1 / 3))


def test_the_horizon_names_the_slot_that_failed() -> None:
    target = channels(4, 3, 4, 5)
    predicted = target.copy()
    predicted[:, :, 2] = 0.0
    assert metrics.nmse_per_horizon(predicted, target) == pytest.approx([0.0, 0.0, 1.0, 0.0])


def test_sums_of_groups_add_up_to_the_whole() -> None:
    target, predicted = channels(6, 4, 3, 5), channels(6, 4, 3, 5, name="other")
    whole = metrics.nmse_sums(predicted, target)
    parts = [metrics.nmse_sums(predicted[u], target[u]) for u in (slice(0, 2), slice(2, 6))]
    for i in range(2):
        assert np.array_equal(whole[i], np.concatenate([part[i] for part in parts]))


def test_single_precision_is_summed_in_double() -> None:
    target = channels(1, 32, 64, 512).astype(np.complex64)
    _, power = metrics.nmse_sums(np.zeros_like(target), target)
    assert power[0] == pytest.approx(float(np.sum(np.abs(target.astype(np.complex128)) ** 2)), rel=1e-9)


def test_labels_with_noise_have_a_floor() -> None:
    """A perfect forecast against labels at 18 dB: -18.07 dB, in closed form and by experiment."""
    assert metrics.noisy_floor_db(18.0) == pytest.approx(-18.07, abs=0.005)
    clean = channels(40, 16, 4, 48)
    label = clean + np.sqrt(10 ** (-1.8)) * channels(*clean.shape, name="noise")
    assert metrics.nmse_db(*metrics.nmse_sums(clean, label)) == pytest.approx(-18.07, abs=0.05)


@pytest.mark.parametrize("antennas", [1, 4, 16])
def test_perfect_csi_gives_the_full_rate(antennas: int) -> None:
    target = channels(3, antennas, 2, 5)
    rate = metrics.spectral_efficiency(target, target, snr_db=10.0)
    assert rate == pytest.approx(np.log2(1.0 + 10.0 * antennas), abs=1e-12)


def test_the_reference_rate_is_7_331() -> None:
    target = channels(2, 32, 4, 6)
    assert metrics.spectral_efficiency(target, target, antennas=16) == pytest.approx(7.331, abs=5e-4)


def test_an_orthogonal_forecast_has_no_rate() -> None:
    target = np.ones((1, 2, 1, 1), complex)
    predicted = np.array([1.0, -1.0]).reshape(target.shape) + 0j
    assert metrics.spectral_efficiency(predicted, target) == pytest.approx(0.0, abs=1e-12)
    assert metrics.spectral_efficiency(np.zeros_like(target), target) == 0.0


def test_a_known_angle_gives_a_known_rate() -> None:
    """h = (1, 0) and hhat = (cos, sin): rho^2 = cos^2."""
    angle = 0.7
    target = np.array([1.0, 0.0]).reshape(1, 2, 1, 1) + 0j
    predicted = np.array([np.cos(angle), np.sin(angle)]).reshape(1, 2, 1, 1) + 0j
    expected = np.log2(1.0 + 2.0 * 10.0 * np.cos(angle) ** 2)
    assert metrics.spectral_efficiency(predicted, target) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(phase=st.floats(-np.pi, np.pi), gain=st.floats(1e-3, 1e3))
def test_the_rate_ignores_a_common_phase_and_gain(phase: float, gain: float) -> None:
    """A precoder is a direction: turning or scaling the whole forecast costs nothing."""
    target, predicted = channels(2, 4, 3, 5), channels(2, 4, 3, 5, name="other")
    turned = gain * np.exp(1j * phase) * predicted
    assert metrics.spectral_efficiency(turned, target) == pytest.approx(
        metrics.spectral_efficiency(predicted, target), rel=1e-9
    )


def test_each_polarisation_is_precoded_on_its_own() -> None:
    """A phase between the two halves costs rate to one array of 4, and nothing to two arrays of 2."""
    target = channels(2, 4, 3, 5)
    predicted = target * np.array([1.0, 1.0, -1.0, -1.0])[:, None, None]
    assert metrics.spectral_efficiency(predicted, target, antennas=2) == pytest.approx(np.log2(21.0))
    assert metrics.spectral_efficiency(predicted, target) < np.log2(41.0) - 0.5


def test_what_cannot_be_scored_is_refused() -> None:
    target = channels(2, 6, 3, 5)
    with pytest.raises(ValueError, match=r"\(2, 6, 1, 5\)"):
        metrics.nmse_sums(target[:, :, :1], target)
    with pytest.raises(ValueError, match="antennas is 4; it must be positive and divide the array of 6"):
        metrics.spectral_efficiency(target, target, antennas=4)
