"""Laws of the closed-form predictors: exact where the model holds, and blind to scale, phase and order."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlam_app.base.keys import rng
from fedlam_app.base.metrics import nmse_db, nmse_sums
from fedlam_app.models import classical, ridge
from fedlam_app.models.classical import CLASSICAL, fb_ar, pad, repeat_last, wiener_ar

Complex = NDArray[np.complexfloating]
every_predictor = pytest.mark.parametrize("name", CLASSICAL)


def gaussian(*shape: int, name: str = "gaussian") -> Complex:
    draw = rng(2025, name)
    return (draw.standard_normal(shape) + 1j * draw.standard_normal(shape)) / np.sqrt(2.0)


def paths(
    users: int = 3, count: int = 3, antennas: int = 16, subcarriers: int = 48
) -> tuple[Complex, Complex]:
    """A few plane waves off every grid, unit power: history (U, A, 16, K) and future (U, A, 4, K)."""
    draw = rng(2025, "paths")
    doppler, delay, angle = (draw.uniform(-0.45, 0.45, (users, count, 1)) for _ in range(3))
    gains = gaussian(users, count, name="gains") * 2.0 ** -np.arange(count)
    space = np.exp(2j * np.pi * angle * np.arange(antennas))
    time = np.exp(0.5j * np.pi * doppler * np.arange(20))
    frequency = np.exp(0.5j * np.pi * delay * np.arange(subcarriers))
    channel = np.einsum("up,upa,upt,upk->uatk", gains, space, time, frequency)
    channel /= np.sqrt(np.mean(np.abs(channel[:, :, :16]) ** 2, axis=(1, 2, 3), keepdims=True))
    return channel[:, :, :16], channel[:, :, 16:]


def with_noise(history: Complex, snr_db: float) -> Complex:
    return history + 10.0 ** (-snr_db / 20.0) * gaussian(*history.shape, name="noise")


def score_db(predicted: Complex, target: Complex) -> float:
    return nmse_db(*nmse_sums(predicted, target))


@every_predictor
@pytest.mark.parametrize("shape", [(2, 16, 16, 48), (1, 32, 16, 7), (3, 1, 12, 1), (2, 6, 20, 5)])
def test_any_array_any_band(name: str, shape: tuple[int, int, int, int]) -> None:
    history = gaussian(*shape).astype(np.complex64)
    forecast = CLASSICAL[name](history, 3)
    assert forecast.shape == (shape[0], shape[1], 3, shape[3])
    assert forecast.dtype == np.complex64
    assert np.isfinite(forecast).all()


@every_predictor
def test_scale_and_phase_pass_through(name: str) -> None:
    """f(c h) = c f(h): a forecast has no unit and no phase reference of its own."""
    history = with_noise(paths()[0], 15.0)
    factor = 1e-3 * np.exp(1.1j)
    assert score_db(CLASSICAL[name](factor * history, 4) / factor, CLASSICAL[name](history, 4)) < -180.0


@every_predictor
def test_users_do_not_meet(name: str) -> None:
    """A user's forecast is the same alone and in a crowd larger than one block."""
    history = with_noise(paths(users=35, antennas=4, subcarriers=6)[0], 15.0)
    crowd = CLASSICAL[name](history, 4)
    for user in (0, 31, 32, 34):
        assert score_db(CLASSICAL[name](history[user : user + 1], 4), crowd[user : user + 1]) < -180.0


@every_predictor
def test_silence_is_forecast_as_silence(name: str) -> None:
    assert not CLASSICAL[name](np.zeros((2, 16, 16, 8), np.complex64), 4).any()


@pytest.mark.parametrize("name", ["ar", "wiener-ar"])
def test_the_order_of_antennas_is_immaterial(name: str) -> None:
    history = with_noise(paths()[0], 15.0)
    shuffled = rng(2025, "antennas").permutation(history.shape[1])
    assert (
        score_db(CLASSICAL[name](history[:, shuffled], 4), CLASSICAL[name](history, 4)[:, shuffled]) < -150.0
    )


def test_repeat_last_repeats_the_last() -> None:
    history = gaussian(2, 3, 5, 4)
    assert np.array_equal(repeat_last(history, 2), history[:, :, [4, 4]])


def test_a_few_exponentials_are_continued_exactly() -> None:
    history, future = paths()
    assert score_db(fb_ar(history, ridge=1e-10), future) < -60.0
    assert score_db(wiener_ar(history, ridge=1e-10), future) < -60.0
    assert score_db(repeat_last(history), future) > -10.0  # the task is not trivial


def test_fb_ar_is_plain_least_squares() -> None:
    """The Gram-matrix shortcut equals the textbook: stack every window, both directions, and solve."""
    order, load, future = 5, 3e-3, 4
    history = gaussian(3, 2, 12, 3)
    users, antennas, slots, subcarriers = history.shape
    expected = np.empty((users, antennas, future, subcarriers), complex)
    for user in range(users):
        rows, wanted = [], []
        for antenna in range(antennas):
            for subcarrier in range(subcarriers):
                forward = history[user, antenna, :, subcarrier]
                for series in (forward, forward[::-1].conj()):
                    for t in range(order, slots):
                        rows.append(series[t - order : t])
                        wanted.append(series[t])
        matrix = np.array(rows)
        loading = load * np.sum(np.abs(matrix) ** 2) / order
        stacked = np.vstack([matrix, np.sqrt(loading) * np.eye(order)])
        a = np.linalg.lstsq(stacked, np.concatenate([wanted, np.zeros(order)]), rcond=None)[0]
        for antenna in range(antennas):
            for subcarrier in range(subcarriers):
                grown = list(history[user, antenna, :, subcarrier])
                for _ in range(future):
                    grown.append(np.dot(a, grown[-order:]))
                expected[user, antenna, :, subcarrier] = grown[slots:]
    assert np.abs(fb_ar(history, future, order, load) - expected).max() <= 1e-9 * np.abs(expected).max()


def test_both_directions_of_time_give_one_predictor() -> None:
    """Reversing time and conjugating leaves the moments, hence the predictor, unchanged."""
    series = gaussian(2, 5, 16)
    backward = series[..., ::-1].conj()
    assert np.allclose(classical.moments(series, 6), classical.moments(backward, 6), rtol=0.0, atol=1e-12)


def test_extrapolation_is_repeated_prediction() -> None:
    a = gaussian(3)
    window = list(gaussian(3, name="window"))
    steps = classical.extrapolate(a, 4)
    direct = np.array(window) @ steps
    for _ in range(4):
        window.append(np.dot(a, window[-3:]))
    assert np.allclose(direct, window[3:])


def test_the_order_must_leave_a_slot_to_predict() -> None:
    with pytest.raises(ValueError, match="order is 16; it must be from 1 to 15"):
        fb_ar(gaussian(1, 2, 16, 2), order=16)
    with pytest.raises(ValueError, match="must be complex"):
        fb_ar(np.zeros((1, 2, 16, 2)))  # type: ignore[arg-type]


# ---- denoising


@pytest.mark.parametrize("snr_db", [5.0, 18.0])
def test_the_noise_floor_is_found(snr_db: float) -> None:
    noise = classical.eigenmodes(with_noise(paths(users=4)[0], snr_db))[3]
    assert noise == pytest.approx(10.0 ** (-snr_db / 10.0), rel=0.05)


def test_the_modes_turn_back_into_the_history() -> None:
    history = with_noise(paths()[0], 10.0)
    modes, space, delay, _ = classical.eigenmodes(history)
    assert np.allclose(np.einsum("uai,uitj,ukj->uatk", space, modes, delay), history)


def test_gains_are_wiener_in_a_pure_setting() -> None:
    """One mode of power P over noise s in every slot: gain (P - s) / P there, and zero elsewhere."""
    modes = np.zeros((1, 4, 16, 6), complex)
    modes[0, 3, :, 5] = 8.0 * np.exp(1j * np.arange(16))  # power 64, marginals 64/6 and 64/4
    gain = classical.denoising_gain(modes, np.array([0.01]), trust=1.0)
    assert gain[0, 3, 0, 5] == pytest.approx((64.0 - 0.01) / 64.0, rel=1e-6)
    assert np.count_nonzero(gain) == 1


def test_denoising_is_what_wiener_ar_gains() -> None:
    """On few noisy paths the denoised forecast is at least 8 dB nearer the clean future than FB-AR."""
    history, future = paths(users=6)
    noisy = with_noise(history, 10.0)
    assert score_db(wiener_ar(noisy), future) < score_db(fb_ar(noisy), future) - 8.0
    assert score_db(wiener_ar(noisy, snr_db=10.0), future) < score_db(fb_ar(noisy), future) - 8.0


# ---- the angle-delay domain


def test_pad_is_exact_on_the_grid() -> None:
    """Three paths on bins of the 4 x 4 array's and the band's DFT: each coefficient is one exponential."""
    columns, rows, slots, subcarriers = 4, 4, 20, 12
    channel = np.zeros((1, 2 * columns * rows, slots, subcarriers), complex)
    for gain, polarisation, column, row, delay, doppler in (
        (1.0, 0, 1, 2, 3, 0.31),
        (0.7j, 1, 3, 0, 7, -0.22),
        (0.5, 0, 0, 1, 3, 0.05),
    ):
        space = np.exp(
            2j * np.pi * (column * np.arange(columns)[:, None] + row * np.arange(rows)) / 4.0
        ).ravel()
        time = np.exp(2j * np.pi * doppler * np.arange(slots))
        frequency = np.exp(-2j * np.pi * delay * np.arange(subcarriers) / subcarriers)
        array = slice(16 * polarisation, 16 * polarisation + 16)
        channel[0, array] += gain * np.einsum("a,t,k->atk", space, time, frequency)
    history, future = channel[:, :, :16], channel[:, :, 16:]
    assert score_db(pad(history, ridge=1e-9, energy=1.0 - 1e-9), future) < -100.0


def test_pad_keeps_the_energy_asked_for() -> None:
    """Two paths of power 0.9 and 0.1 on the grid: half the energy is held by the first alone."""
    time = np.exp(0.2j * np.arange(20))
    frequency = np.exp(2j * np.pi * np.outer([2, 5], np.arange(8)) / 8.0)
    channel = np.einsum("p,t,pk->tk", np.sqrt([0.9, 0.1]), time, frequency)[None, None]
    history, future = channel[:, :, :16], channel[:, :, 16:]
    assert score_db(pad(history, ridge=1e-9, energy=0.5), future) == pytest.approx(-10.0, abs=0.01)
    assert score_db(pad(history, ridge=1e-9, energy=0.95), future) < -100.0


def test_pad_names_an_array_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="array is 4 x 3; it must divide the 16 antennas"):
        pad(gaussian(1, 16, 16, 4), array=(4, 3))


# ---- the learned linear map


def test_ridge_recovers_a_planted_map() -> None:
    history = gaussian(6, 4, 6, 12)
    planted = gaussian((6 + 2) * 3, 2, name="planted")
    future = ridge.ridge_predict(planted, history, repeat_last, reach=1)
    gram, cross = ridge.ridge_moments(history, future, repeat_last, reach=1)
    learned = ridge.ridge_solve(gram, cross, ridge=1e-10)
    fresh = gaussian(3, 4, 6, 12, name="fresh")
    wanted = ridge.ridge_predict(planted, fresh, repeat_last, reach=1)
    assert score_db(ridge.ridge_predict(learned, fresh, repeat_last, reach=1), wanted) < -100.0


def test_moments_of_devices_add_up_to_the_pooled_moments() -> None:
    history, future = gaussian(40, 2, 14, 6), gaussian(40, 2, 4, 6, name="future")
    pooled = ridge.ridge_moments(history, future)
    devices = [ridge.ridge_moments(history[d], future[d]) for d in (slice(0, 7), slice(7, 40))]
    for i in range(2):
        assert np.allclose(pooled[i], devices[0][i] + devices[1][i], rtol=1e-10, atol=1e-9)


# ---- measured channels


def test_the_bar_on_quadriga() -> None:
    """QuaDRiGa UMa NLOS at 18 dB, every sixth user: the figures that learned predictors are held against."""
    folder = os.environ.get("FEDLAM_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    file = Path(folder) / "quadriga_uma_nlos_train.npz"
    if not file.exists():
        pytest.skip(f"no QuaDRiGa channels at {file}; set FEDLAM_SHARED_DATA to their folder")
    stored = np.load(file)["H"][::6].astype(np.float32)
    channel = (stored[..., 0] + 1j * stored[..., 1]).transpose(0, 3, 1, 2)
    noisy = with_noise(channel[:, :, :16], 18.0).astype(np.complex64)
    future = channel[:, :, 16:]
    scores = {name: score_db(predict(noisy, 4), future) for name, predict in CLASSICAL.items()}
    assert scores["ar"] == pytest.approx(-15.0, abs=1.5)
    assert scores["pad"] < -14.0
    assert scores["wiener-ar"] < scores["ar"] - 4.0
    assert scores["repeat-last"] > -4.0
