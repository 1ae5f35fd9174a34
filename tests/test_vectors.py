"""Flat vectors, keys and files: the laws that everything above relies on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlam_app.base.keys import rng, seed_of
from fedlam_app.base.registry import pick
from fedlam_app.base.store import atomic_file, atomic_folder
from fedlam_app.base.vectors import WeightedMean, pack, unpack

FLOATS = st.floats(-1e6, 1e6, width=32)
VECTORS = hnp.arrays(np.float32, 7, elements=FLOATS)
WEIGHTS = st.integers(1, 10**6)


@given(VECTORS)
def test_unpack_undoes_pack(vector: np.ndarray) -> None:
    parameters = [torch.zeros(2, 3), torch.zeros(1)]
    unpack(vector, parameters)
    np.testing.assert_array_equal(pack(parameters), vector)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(6,\), got \(5,\)"):
        unpack(np.zeros(5, np.float32), [torch.zeros(2, 3)])


@given(VECTORS, WEIGHTS)
def test_the_mean_of_one_vector_is_that_vector_bit_for_bit(vector: np.ndarray, weight: int) -> None:
    mean = WeightedMean()
    mean.add(vector, float(weight))
    np.testing.assert_array_equal(mean.value(), vector)


@given(st.lists(st.tuples(VECTORS, WEIGHTS), min_size=1, max_size=6))
def test_the_running_mean_is_the_weighted_mean(parts: list[tuple[np.ndarray, int]]) -> None:
    mean = WeightedMean()
    for vector, weight in parts:
        mean.add(vector, float(weight))
    stacked = np.stack([vector for vector, _ in parts]).astype(np.float64)
    weights = np.array([weight for _, weight in parts], np.float64)
    expected = (weights[:, None] * stacked).sum(0) / weights.sum()
    largest = np.abs(stacked).max()
    np.testing.assert_allclose(mean.value(), expected, rtol=1e-6, atol=1e-7 * max(largest, 1e-30))


def test_the_mean_of_nothing_and_a_negative_weight_are_errors() -> None:
    mean = WeightedMean()
    with pytest.raises(ValueError, match="mean of no vectors"):
        mean.value()
    with pytest.raises(ValueError, match="non-negative"):
        mean.add(np.zeros(2, np.float32), -1.0)


KEYS = st.lists(st.one_of(st.integers(0, 2**40), st.text(max_size=5)), min_size=1, max_size=4)


@given(KEYS, KEYS)
def test_keys_name_streams(one: list[int | str], two: list[int | str]) -> None:
    draws = [rng(*key).integers(2**62, size=2).tolist() for key in (one, one, two)]
    assert draws[0] == draws[1]
    assert (draws[0] == draws[2]) == (one == two)
    assert (seed_of(*one) == seed_of(*two)) == (one == two)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_of_two_folders_the_first_stays(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "made") as temporary:
            (temporary / "file").write_text(text)
    assert (tmp_path / "made" / "file").read_text() == "first"


def test_a_registry_says_what_was_meant() -> None:
    assert pick({"minilm": 1}, "minilm", "backbone") == 1
    with pytest.raises(ValueError, match=r"unknown backbone 'minlm'; did you mean 'minilm'\?"):
        pick({"minilm": 1}, "minlm", "backbone")
