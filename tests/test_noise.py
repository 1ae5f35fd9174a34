"""Keyed noise: Gaussian, of the right size, unlike under unlike keys, the same under the same."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from clients.ledgers import Ledgers
from fedlam_app.config import Scalar, parse
from fedlam_app.privacy.noise import Stream, digest, secret
from tests.tiny import tiny_mixture_run

N = 100_000


def test_draws_are_gaussian() -> None:
    draws = Stream(b"secret", "test").normal(N, 2.5)
    assert draws.std() == pytest.approx(2.5, rel=0.01)
    assert abs(draws.mean()) < 4 * 2.5 / N**0.5
    assert kstest(draws / 2.5, "norm").pvalue > 0.01
    assert abs(draws).max() > 4 * 2.5  # tails are there


def test_uniform_draws_stay_within_the_open_interval() -> None:
    draws = Stream(b"secret", "u").uniform(N)
    assert draws.min() > 0.0 and draws.max() < 1.0
    assert kstest(draws, "uniform").pvalue > 0.01


def test_rounds_and_devices_share_nothing() -> None:
    keys = itertools.product(range(3), range(3))
    streams = [Stream(b"secret", device, "round", number).normal(N) for device, number in keys]
    correlation = np.corrcoef(np.stack(streams)) - np.eye(9)
    assert np.abs(correlation).max() < 4 / N**0.5


def test_the_halves_of_one_draw_are_independent() -> None:
    """Box and Muller's cosines and sines share a radius: their squares must not give it away."""
    draws = Stream(b"secret", "halves").normal(2 * N)
    left, right = draws[:N], draws[N:]
    for power in (1, 2):
        assert abs(np.corrcoef(left**power, right**power)[0, 1]) < 4 / N**0.5


@given(st.lists(st.integers(0, 99) | st.text(max_size=4), max_size=3), st.binary(max_size=8))
def test_a_key_is_a_key(key: list[int | str], own: bytes) -> None:
    one = Stream(own, *key).normal(8)
    np.testing.assert_array_equal(one, Stream(own, *key).normal(8))
    assert not np.array_equal(one, Stream(own, *key, 0).normal(8))
    assert not np.array_equal(one, Stream(own + b"x", *key).normal(8))


def test_keys_do_not_run_into_each_other() -> None:
    assert not np.array_equal(Stream(b"s", "ab", "c").normal(4), Stream(b"s", "a", "bc").normal(4))


def test_a_digest_tells_content_shape_and_type() -> None:
    array = np.arange(6, dtype=np.float32)
    names = {
        digest(array),
        digest(array.reshape(2, 3)),
        digest(array.astype(np.float64)),
        digest(array + 1),
        digest(array, 1),
    }
    assert len(names) == 5 and digest(array) == digest(array.copy())


def test_a_devices_secret_is_drawn_once_and_its_own(tmp_path: Path) -> None:
    first = secret("device", 1, tmp_path / "a")
    assert first == secret("device", 2, tmp_path / "a") and len(first) == 32
    assert first != secret("device", 1, tmp_path / "b")
    assert (tmp_path / "a" / "secret").stat().st_mode & 0o077 == 0
    assert secret("seed", 1, tmp_path) == secret("seed", 1, tmp_path / "b") != secret("seed", 2, tmp_path)
    (tmp_path / "b" / "secret").write_bytes(b"short")
    with pytest.raises(ValueError, match="holds 5 bytes"):
        secret("device", 1, tmp_path / "b")


def test_ledgers_outlive_a_run_where_they_are_told_to(tmp_path: Path) -> None:
    from fedlam_app.privacy.accounting import BudgetSpent, Release

    flat: dict[str, Scalar] = {**tiny_mixture_run(), "privacy.mechanism": "dp-sgd"}
    flat["privacy.target-epsilon"] = 2.0
    release = Release(group="g", digest="1", z=3.0)
    shared = parse({**flat, "privacy.ledgers": str(tmp_path / "books")})
    Ledgers(shared, tmp_path / "run 1" / "x").charge(0, release)
    again = Ledgers(shared, tmp_path / "run 2" / "x")
    assert again.of(0).epsilon > 1.0
    with pytest.raises(BudgetSpent, match="device 0"):
        again.charge(0, Release(group="h", digest="2", z=2.0))
    assert Ledgers(parse(flat), tmp_path / "run 3" / "x").of(0).epsilon == 0.0
    other = Ledgers(
        parse({**flat, "privacy.ledgers": str(tmp_path / "books"), "privacy.delta": 1e-6}), tmp_path
    )
    with pytest.raises(ValueError, match="must be the same"):
        other.of(0)


def test_charges_at_once_are_all_written_down(tmp_path: Path) -> None:
    """Experiments side by side may have one book, in threads and processes of their own."""
    from fedlam_app.privacy.accounting import Release

    flat: dict[str, Scalar] = {**tiny_mixture_run(), "privacy.mechanism": "dp-sgd"}
    config = parse({**flat, "privacy.ledgers": str(tmp_path)})

    def charge(number: int) -> None:
        Ledgers(config, tmp_path / "own").charge(3, Release(group=str(number), z=50.0))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(charge, range(40)))
    assert Ledgers(config, tmp_path / "own").of(3).events == [(1.0, 50.0, 40)]


def test_of_two_copies_the_dearer_is_true(tmp_path: Path) -> None:
    from fedlam_app.privacy.accounting import Release

    config = parse({**tiny_mixture_run(), "privacy.mechanism": "dp-sgd"})
    here, there = Ledgers(config, tmp_path / "a" / "x"), Ledgers(config, tmp_path / "b" / "x")
    here.charge(1, Release(group="1", z=5.0))
    kept = here.snapshot([1, 2])
    assert list(kept) == ["1"]
    there.restore(kept)
    assert there.of(1).epsilon == here.of(1).epsilon
    there.charge(1, Release(group="2", z=5.0))
    there.restore(kept)  # the older copy changes nothing
    assert there.of(1).epsilon > here.of(1).epsilon
