"""Laws of the channel sets: scale, noise, the generator's physics, its reproducibility and its cache."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlam_app.data import channels, drops
from fedlam_app.data.channel_set import ChannelSet, concatenate
from fedlam_app.data.channels import Recipe, folder_of, load_or_generate, open_cached
from fedlam_app.data.drops import SCENARIOS, drop_batch
from fedlam_app.data.noise import add_noise

RECIPE = Recipe(users=20, seed=7)


def digest(data: ChannelSet) -> str:
    arrays = (data.history, data.future, data.gain_db, data.speed_kmh, data.scenario)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def random_raw(users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal((users, 2, 20, 3, 2)) @ [1, 1j]
    loudness = 10.0 ** -np.arange(users)[:, None, None, None]
    return draw[:, :, :16] * loudness, draw[:, :, 16:] * loudness


def drop(scenario: str, batches: int, **fields: object) -> ChannelSet:
    recipe = replace(RECIPE, **fields)
    return concatenate([drop_batch(recipe, scenario, number) for number in range(batches)])


def slot_correlation(data: ChannelSet, lags: tuple[int, ...]) -> np.ndarray:
    """Ensemble autocorrelation over time at the given lags, normalised to one at lag 0."""
    h = np.concatenate([data.history, data.future], axis=2)
    power = np.mean(np.abs(h) ** 2)
    return np.array([np.mean(h[:, :, lag:] * h[:, :, :-lag].conj()).real / power for lag in lags])


# --- the channel set ------------------------------------------------------------------------------------


def test_each_user_has_unit_history_power_and_gain_restores_the_raw_channels() -> None:
    history, future = random_raw(5)
    data = ChannelSet.from_raw(history, future, 30.0, "uma-nlos")
    assert data.history.dtype == data.future.dtype == np.complex64
    np.testing.assert_allclose(np.mean(np.abs(data.history) ** 2, axis=(1, 2, 3)), 1, rtol=1e-6)
    amplitude = 10 ** (data.gain_db / 20)[:, None, None, None]
    np.testing.assert_allclose(data.history * amplitude, history, rtol=1e-5)
    np.testing.assert_allclose(data.future * amplitude, future, rtol=1e-5)
    assert data.speed_kmh.tolist() == [30.0] * 5 and set(data.scenario) == {"uma-nlos"}


def test_take_and_concatenate_are_inverse() -> None:
    data = ChannelSet.from_raw(*random_raw(6), np.arange(6.0), np.array(["uma-nlos", "rma-los"] * 3))
    assert digest(concatenate([data.take([0, 1]), data.take(range(2, 6))])) == digest(data)
    chosen = data.take(np.array([4, 1]))
    assert len(chosen) == 2 and chosen.speed_kmh.tolist() == [4.0, 1.0]
    np.testing.assert_array_equal(chosen.future[1], data.future[1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h, f: (np.where(h == h[1, 0, 0, 0], np.nan, h), f), "history holds NaN or infinite"),
        (lambda h, f: (h, f * np.inf), "future holds NaN or infinite"),
        (lambda h, f: (h * np.array([1, 0, 1])[:, None, None, None], f), "the history of user 1 is zero"),
        (lambda h, f: (h, f[:, :1]), "history and future must agree"),
        (lambda h, f: (h, f[..., :2]), "history and future must agree"),
        (lambda h, f: (h[0], f), "history and future must have the shape"),
    ],
)
def test_bad_raw_channels_are_refused(spoil, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message), np.errstate(invalid="ignore"):
        ChannelSet.from_raw(*spoil(*random_raw(3)), 30.0, "uma-nlos")


def test_sets_of_other_shapes_do_not_join() -> None:
    data = ChannelSet.from_raw(*random_raw(2), 30.0, "uma-nlos")
    narrow = replace(data, history=data.history[..., :2], future=data.future[..., :2])
    with pytest.raises(ValueError, match="must agree in antennas"):
        concatenate([data, narrow])
    with pytest.raises(ValueError, match="speed_kmh must hold one float for each of 2 users"):
        replace(data, speed_kmh=data.speed_kmh[:1])


# --- noise ----------------------------------------------------------------------------------------------


def test_noise_is_circular_with_the_stated_power_per_user() -> None:
    clean = np.ones((3, 40, 16, 48), np.complex64)
    noise = add_noise(clean, np.array([0.0, 10.0, 20.0]), np.random.default_rng(1)) - clean
    power = np.mean(np.abs(noise) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(power, [1, 0.1, 0.01], rtol=0.03)
    # Circular: the pseudo-variance E[n^2] vanishes, so re and im have one power and no correlation.
    assert np.all(np.abs(np.mean(noise**2, axis=(1, 2, 3))) < 0.03 * power)
    np.testing.assert_array_equal(add_noise(clean, np.inf, np.random.default_rng(1)), clean)


def test_noise_is_keyed_by_its_generator_and_leaves_the_clean_channels() -> None:
    clean = np.ones((2, 2, 16, 4), np.complex64)
    once, again, other = (add_noise(clean, 5.0, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(once, again)
    assert once.dtype == np.complex64 and not np.any(once == other) and np.all(clean == 1)
    with pytest.raises(ValueError, match="one number for each of 2 users"):
        add_noise(clean, np.zeros(3), np.random.default_rng(0))


# --- the generator --------------------------------------------------------------------------------------


def test_frequency_responses_equal_sionna_and_the_bands_are_adjacent() -> None:
    """TDD's future lies on the history's subcarriers, FDD's on the 48 above, all as Sionna computes them."""
    from sionna.phy.channel import cir_to_ofdm_channel

    tdd, fdd = drop_batch(RECIPE, "uma-nlos", 0), drop_batch(replace(RECIPE, duplex="fdd"), "uma-nlos", 0)
    with torch.random.fork_rng():
        a, tau, speed_kmh = drops.impulse_responses(RECIPE, "uma-nlos", 0)
    oracle = cir_to_ofdm_channel(torch.arange(96) * 180e3, a[:, None, None, None], tau[:, None, None])
    expected = oracle[:, 0, 0, 0].numpy() * 10 ** (-tdd.gain_db / 20)[:, None, None, None]
    np.testing.assert_allclose(tdd.history, expected[:, :, :16, :48], atol=2e-5)
    np.testing.assert_allclose(tdd.future, expected[:, :, 16:, :48], atol=2e-5)
    np.testing.assert_allclose(fdd.future, expected[:, :, 16:, 48:], atol=2e-5)
    assert tdd.history.tobytes() == fdd.history.tobytes() and np.array_equal(tdd.gain_db, fdd.gain_db)
    np.testing.assert_array_equal(tdd.speed_kmh, speed_kmh)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_has_unit_power_and_speeds_in_range(scenario: str) -> None:
    data = drop(scenario, 1, speed_min_kmh=20.0, speed_max_kmh=60.0)
    assert data.history.shape == (16, 32, 16, 48) and data.future.shape == (16, 32, 4, 48)
    np.testing.assert_allclose(np.mean(np.abs(data.history) ** 2, axis=(1, 2, 3)), 1, rtol=1e-5)
    assert 20 <= data.speed_kmh.min() < 35 and 45 < data.speed_kmh.max() <= 60
    assert set(data.scenario) == {scenario}
    assert -140 < data.gain_db.mean() < -70


@pytest.mark.parametrize(
    ("scenario", "speed_kmh", "expected"),
    [
        # An independent Sionna run of the same geometry (300 and 200 users over ten speeds).
        ("uma-nlos", 10.0, (0.998, 0.994, 0.975, 0.903)),
        ("uma-nlos", 50.0, (0.962, 0.853, 0.471, -0.445)),
        ("umi-nlos", 10.0, (0.998, 0.993, 0.973, 0.897)),
        ("umi-nlos", 50.0, (0.957, 0.834, 0.400, -0.580)),
    ],
)
def test_slots_decorrelate_as_in_the_reference(scenario: str, speed_kmh: float, expected: tuple) -> None:  # type: ignore[type-arg]
    found = slot_correlation(
        drop(scenario, 5, speed_min_kmh=speed_kmh, speed_max_kmh=speed_kmh), (1, 2, 4, 8)
    )
    tolerance = (0.002, 0.003, 0.006, 0.02) if speed_kmh == 10 else (0.01, 0.03, 0.08, 0.12)
    assert np.all(np.abs(found - expected) < tolerance), found


def test_a_user_that_stands_still_has_a_constant_channel() -> None:
    data = drop("uma-nlos", 1, speed_min_kmh=0.0, speed_max_kmh=0.0)
    np.testing.assert_allclose(
        data.history, np.broadcast_to(data.history[:, :, :1], data.history.shape), atol=1e-5
    )


def test_antennas_are_ordered_polarisation_column_row() -> None:
    """Cells are wide and flat: rows see one elevation, columns many azimuths; V and H fade apart."""
    panel = drop("uma-nlos", 4).history.reshape(64, 2, 4, 4, 16, 48)

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        cross = np.abs(np.mean(x * y.conj(), axis=(1, 2, 3, 4, 5)))
        powers = [np.mean(np.abs(z) ** 2, axis=(1, 2, 3, 4, 5)) for z in (x, y)]
        return float(np.mean(cross / np.sqrt(powers[0] * powers[1])))

    rows = correlation(panel[:, :, :, 1:], panel[:, :, :, :-1])
    columns = correlation(panel[:, :, 1:], panel[:, :, :-1])
    polarisations = correlation(panel[:, :1], panel[:, 1:])
    assert rows > 0.9 > columns > 0.6 > polarisations
    vertical, horizontal = (np.mean(np.abs(panel[:, p]) ** 2) for p in (0, 1))
    assert 3 < 10 * math.log10(vertical / horizontal) < 9  # 5.8 dB in the reference


# --- reproducibility and the cache ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def mixture(cache: Path) -> ChannelSet:
    return load_or_generate(Recipe(scenario="uma-nlos, umi-los", users=50, seed=7), cache, 1, progress=False)


def test_two_processes_make_the_same_bytes_as_one(mixture: ChannelSet, tmp_path: Path) -> None:
    recipe = Recipe(scenario="uma-nlos, umi-los", users=50, seed=7)
    assert digest(load_or_generate(recipe, tmp_path, workers=2, progress=False)) == digest(mixture)


def test_a_smaller_set_is_a_prefix_and_a_mixture_interleaves_its_scenarios(
    mixture: ChannelSet, cache: Path
) -> None:
    smaller = load_or_generate(Recipe(scenario="uma-nlos, umi-los", users=9, seed=7), cache, progress=False)
    assert digest(smaller) == digest(mixture.take(np.arange(9)))
    alone = load_or_generate(Recipe(scenario="umi-los", users=18, seed=7), cache, progress=False)
    assert digest(alone) == digest(mixture.take(np.arange(1, 36, 2)))


def test_seed_split_and_batch_give_other_users() -> None:
    sets = [
        drop_batch(RECIPE, "rma-nlos", 0),
        drop_batch(RECIPE, "rma-nlos", 1),
        drop_batch(replace(RECIPE, seed=8), "rma-nlos", 0),
        drop_batch(replace(RECIPE, split="test"), "rma-nlos", 0),
    ]
    flat = np.stack([data.history.ravel() for data in sets]) / math.sqrt(sets[0].history.size)
    # Independent sets are nearly orthogonal; a repeated one would show as 1 off the diagonal.
    assert np.abs(flat @ flat.conj().T - np.eye(4)).max() < 0.35
    assert len({speed for data in sets for speed in data.speed_kmh}) == 64


def test_a_batch_depends_on_nothing_generated_before_it() -> None:
    first = digest(drop_batch(RECIPE, "umi-nlos", 3))
    drop_batch(RECIPE, "umi-los", 0)
    assert digest(drop_batch(RECIPE, "umi-nlos", 3)) == first


def test_generating_leaves_torch_as_it_was() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    drop_batch(RECIPE, "rma-los", 0)
    assert torch.equal(torch.rand(4), expected) and torch.get_num_threads() == threads


def test_the_cache_is_read_not_made_again(
    mixture: ChannelSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> ChannelSet:
        raise AssertionError("generated although cached")

    monkeypatch.setattr(channels, "drop_batch", fail)
    recipe = Recipe(scenario="uma-nlos, umi-los", users=50, seed=7)
    again = load_or_generate(recipe, cache, progress=False, check_hashes=True)
    assert digest(again) == digest(mixture)
    assert isinstance(again.history, np.memmap) and not again.history.flags.writeable
    assert [path.name for path in (cache / "channels").glob(".*")] == []
    with pytest.raises(AssertionError):
        load_or_generate(replace(recipe, seed=8), cache, progress=False)
    assert not folder_of(replace(recipe, seed=8), cache).exists()


def test_a_damaged_cache_is_told(tmp_path: Path) -> None:
    recipe = Recipe(scenario="rma-los", users=2, seed=7, subcarriers=3)
    load_or_generate(recipe, tmp_path, progress=False)
    file = folder_of(recipe, tmp_path) / "future.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(open_cached(file.parent)) == 2
    with pytest.raises(ValueError, match=r"damaged .future.npy has another SHA-256"):
        open_cached(file.parent, check_hashes=True)
    file.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=r"damaged .future.npy has \d+ bytes instead of \d+.; delete the folder"
    ):
        load_or_generate(recipe, tmp_path, progress=False)
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged .future.npy has 0 bytes"):
        load_or_generate(recipe, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scenario": "uma-nlso"}, "unknown data.scenario 'uma-nlso'; did you mean 'uma-nlos'"),
        ({"scenario": "uma-nlos,"}, "unknown data.scenario ''; allowed are"),
        ({"scenario": "uma-los,uma-los"}, "data.scenario must name each scenario once"),
        ({"duplex": "half"}, "data.duplex must be 'tdd' or 'fdd', got 'half'"),
        ({"users": 0}, "data.users must be at least 1, got 0"),
        ({"speed_min_kmh": 50.0, "speed_max_kmh": 40.0}, "0 <= min <= max, got 50.0 and 40.0"),
        ({"speed_max_kmh": math.inf}, "0 <= min <= max"),
        ({"batch": 0}, "batch of at least 1"),
    ],
)
def test_impossible_recipes_name_their_key(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **fields)


def test_workers_are_started_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_cores", lambda: 4)
    per_worker = channels.BATCHES_PER_WORKER
    counts = [channels._worker_count(batches, None) for batches in (1, 2 * per_worker, 100 * per_worker)]
    assert counts == [1, 2, 4]
    assert channels._worker_count(3, 8) == 3
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        channels._worker_count(3, 0)
