"""The wire's formats: sizes are exact, errors are bounded, and what is not finite is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlam_app.base import sparse
from fedlam_app.base.keys import rng
from fedlam_app.base.wire import BLOCK, FORMATS, Format, from_bf16, row_scales

SHAPES = st.tuples(st.integers(0, 5), st.integers(0, 9))
FINITE = hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**100), 2.0**100, width=32))
ANY = hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32))
SEEDS = st.integers(0, 2**32)
SHARES = st.sampled_from([0.01, 0.1, 0.5, 1.0])
LEVELS = {"int8": 127, "int4": 7}
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
integers = pytest.mark.parametrize("form", [FORMATS[name] for name in LEVELS], ids=LEVELS)


def draws(seed: int, n: int, d: int) -> np.ndarray:
    """Rows of very unlike sizes, from 1e-9 to 1e3."""
    draw = rng(seed, "test")
    return (draw.standard_normal((n, d)) * 10.0 ** draw.uniform(-9, 3, (n, 1))).astype(np.float32)


def trip(form: Format, x: np.ndarray, draw: np.random.Generator | None = None) -> np.ndarray:
    """Encode and decode; whoever decodes does not know the draw."""
    return form.decode(form.encode(x, draw), *x.shape)


def steps(form: Format, x: np.ndarray, draw: np.random.Generator | None = None) -> np.ndarray:
    """Return the step that each value of ``x`` (n, d) was coded with, read from the payload."""
    n, d = x.shape
    share = BLOCK if form.name == "int4" else max(d, 1)  # values of a row that share a scale
    blocks = n * -(-d // BLOCK) if form.name == "int4" else n
    scales = from_bf16(np.frombuffer(form.encode(x, draw), "<u2", count=blocks)).astype(np.float64)
    return np.repeat(scales.reshape(n, -1), share, axis=1)[:, :d] if x.size else np.zeros((n, d))


@given(hnp.arrays(np.float64, SHAPES, elements=st.floats()), ANY)
def test_fp64_and_fp32_keep_every_bit(wide: np.ndarray, narrow: np.ndarray) -> None:
    for name, x in (("fp64", wide), ("fp32", narrow)):
        back = trip(FORMATS[name], x)
        assert back.dtype == x.dtype and back.tobytes() == x.tobytes()


@formats
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_types_and_sizes_are_as_promised(form: Format, dtype: type) -> None:
    for n, d in ((0, 4), (3, 0), (1, 1), (4, 6), (4, 7)):
        x = draws(1, n, d).astype(dtype)[::-1]  # a view, as callers hand in
        data, back = form.encode(x), trip(form, x)
        assert len(data) == form.size(n, d)
        assert back.shape == (n, d) and back.dtype == (np.float64 if form.name == "fp64" else np.float32)
        assert back.flags.writeable


def test_a_row_costs_what_is_written() -> None:
    rows = {name: form.size(1, 385) for name, form in FORMATS.items()}
    assert rows == {"fp64": 3080, "fp32": 1540, "fp16": 770, "bf16": 770, "int8": 387, "int4": 219}
    assert sparse.size(2, 384, 0.1) == 2 * (2 + 39 * 4)


@formats
@given(x=ANY, seed=st.none() | SEEDS)
def test_only_what_is_finite_stays_finite(form: Format, x: np.ndarray, seed: int | None) -> None:
    draw = None if seed is None else rng(seed, "draw")
    back, finite = trip(form, x, draw), np.isfinite(x)
    if form.name in LEVELS:  # whole rows; within 1 % of float32's largest number the scale would not hold
        small = (np.abs(x) < 3.3e38).all(axis=1)  # False for NaN
        assert np.isfinite(back[small]).all()
        assert np.isnan(back[~finite.all(axis=1)]).all()
        assert not np.isinf(back).any()
    else:
        np.testing.assert_array_equal(np.isfinite(back), finite)
        np.testing.assert_array_equal(np.isnan(back), np.isnan(x))


def test_a_row_with_a_nan_leaves_its_neighbours_alone() -> None:
    x = draws(2, 5, 9)
    clean = {form.name: trip(form, x) for form in FORMATS.values()} | {"top-k": top_k(x, 0.5)}
    x[1, 3], x[3, 8], x[4, 0] = np.nan, np.inf, -np.inf
    for name, expected in clean.items():
        back = top_k(x, 0.5) if name == "top-k" else trip(FORMATS[name], x)
        np.testing.assert_array_equal(back[[0, 2]], expected[[0, 2]])
        assert not np.isfinite(back[[1, 3, 4]]).all(axis=1).any()


def test_large_values_are_cut_off_at_the_largest() -> None:
    x = np.array([[7e4, -1e38, 65504.0, np.inf]], np.float32)
    np.testing.assert_array_equal(trip(FORMATS["fp16"], x), [[65504, -65504, 65504, np.inf]])
    x = np.array([[np.finfo(np.float32).max, -np.finfo(np.float32).max, -np.inf]], np.float32)
    largest = 255 * 2.0**120
    np.testing.assert_array_equal(trip(FORMATS["bf16"], x), [[largest, -largest, -np.inf]])
    x = np.array([[np.finfo(np.float32).max, 1.0]], np.float32)
    for name in LEVELS:  # rounded up, no scale could hold such a row: found, not hidden
        assert np.isnan(trip(FORMATS[name], x, rng(2, "draw"))).all()
    assert np.isinf(trip(FORMATS["fp32"], np.array([[1e300]]))).all()


@formats
def test_every_kind_of_nan_stays_one(form: Format) -> None:
    kinds = np.array([[0x7FFFFFFF], [0xFFFFFFFF], [0x7FC00000], [0xFFC00000]], np.uint32)
    assert np.isnan(trip(form, kinds.view(np.float32))).all()


@given(FINITE)
@example(np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8]], np.float32))  # ties
def test_bf16_rounds_to_nearest_even(x: np.ndarray) -> None:
    x = np.where(np.abs(x) < 1e-37, 0, x).astype(np.float32)  # the formula below is for normal numbers
    mantissa, exponent = np.frexp(x.astype(np.float64))
    np.testing.assert_array_equal(trip(FORMATS["bf16"], x), np.ldexp(np.rint(mantissa * 256), exponent - 8))


@integers
@given(x=FINITE, seed=SEEDS)
def test_integers_err_by_half_a_step_or_less_than_one(form: Format, x: np.ndarray, seed: int) -> None:
    if not x.size:
        return
    wide, tiny = x.astype(np.float64), 1 + 2.0**-16  # x / s is a float32
    assert (np.abs(trip(form, x) - wide) <= steps(form, x) / 2 * tiny).all()
    drawn = trip(form, x, rng(seed, "draw"))
    assert (np.abs(drawn - wide) <= steps(form, x, rng(seed, "draw")) * tiny).all()
    width = BLOCK if form.name == "int4" else max(x.shape[1], 1)
    blocks = np.pad(np.abs(wide), ((0, 0), (0, -x.shape[1] % width))).reshape(len(x), -1, width)
    largest = np.repeat(blocks.max(axis=2, initial=0.0), width, axis=1)[:, : x.shape[1]]
    least = np.maximum(largest / LEVELS[form.name], 2.0**-126)
    assert (steps(form, x) <= least * (1 + 2.0**-7)).all()  # the step is no coarser than it must be


@integers
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 9)), seed=SEEDS)
def test_drawn_integers_have_no_bias(form: Format, shape: tuple[int, int], seed: int) -> None:
    times = 2000
    x = draws(seed, *shape)
    back = trip(form, np.tile(x, (times, 1)), rng(seed, "draw")).reshape(times, *shape).astype(np.float64)
    step = steps(form, x, rng(seed, "draw"))
    up = x / step - np.floor(x / step)  # chance of the upper neighbour
    # Six standard deviations of the mean, and what Bernstein's inequality adds for rare events.
    bound = 6 * np.sqrt(up * (1 - up) / times) + 12 / times
    assert (np.abs(back.mean(axis=0) - x) <= step * bound + 1e-6 * np.abs(x)).all()


@integers
@given(x=FINITE, seed=SEEDS)
def test_whoever_knows_the_draw_errs_by_half_a_step(form: Format, x: np.ndarray, seed: int) -> None:
    data = form.encode(x, rng(seed, "draw"))
    error = np.abs(form.decode(data, *x.shape, rng(seed, "draw")) - x.astype(np.float64))
    # x / s, and q + u - 1/2 of up to 2^7, are float32; the smallest step is not dithered.
    rounding = 2.0**-16 * steps(form, x, rng(seed, "draw")) + 2.0**-23 * np.abs(x)
    assert (error <= steps(form, x, rng(seed, "draw")) / 2 + rounding + 2.0**-126).all()


@integers
def test_the_known_draw_leaves_no_bias_and_half_the_variance(form: Format) -> None:
    x = rng(3, "rows").standard_normal((4096, 384)).astype(np.float32)
    data, step = form.encode(x, rng(3, "draw")), steps(form, x, rng(3, "draw"))
    guessed = (form.decode(data, *x.shape) - x.astype(np.float64)) / step
    known = (form.decode(data, *x.shape, rng(3, "draw")) - x.astype(np.float64)) / step
    deviations = 5 / np.sqrt(x.size)
    assert abs(known.mean()) < deviations * math.sqrt(1 / 12)
    assert known.var() == pytest.approx(1 / 12, rel=2 * deviations)  # uniform, and whatever x is
    assert 1.9 < guessed.var() / known.var() <= 2.01  # the largest of a row is on the grid, and not guessed
    assert abs(np.corrcoef(known.ravel(), x.ravel())[0, 1]) < deviations


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_no_code_exceeds_the_levels_whatever_the_largest_value(levels: int) -> None:
    for start in range(0, 2**23, 2**20):  # every float32 mantissa; exponents only shift
        bits = np.arange(start, start + 2**20, dtype=np.uint32) | np.uint32(127 << 23)
        x = bits.view(np.float32)[:, None]
        up, nearest = (from_bf16(row_scales(x, levels, up)) for up in (True, False))
        assert (np.float64(levels) * up >= x[:, 0]).all()
        assert (np.rint(x[:, 0] / nearest) == levels).all()


def test_drawing_leaves_the_ends_of_the_scale_where_they_are() -> None:
    x = np.full((8, 2**19), 127.0, np.float32)  # 4 million draws: one wrap to -128 would show
    x[1::2] *= -(2.0**-20)
    np.testing.assert_array_equal(trip(FORMATS["int8"], x, rng(3, "draw")), x)


@formats
@given(x=FINITE)
def test_encoding_what_was_decoded_changes_nothing(form: Format, x: np.ndarray) -> None:
    once = trip(form, x)
    assert form.encode(trip(form, once)) == form.encode(once)
    np.testing.assert_array_equal(trip(form, once), once)


@integers
def test_small_jacobians_survive_and_zeros_stay_zero(form: Format) -> None:
    x = draws(4, 6, 384) / 1e3
    x[2] = 0
    drawn = form.encode(x, rng(4, "draw"))
    for back in (trip(form, x), form.decode(drawn, *x.shape), form.decode(drawn, *x.shape, rng(4, "draw"))):
        assert not back[2].any()
        rows = np.delete(np.arange(6), 2)
        cosine = (
            (back * x).sum(1)[rows] / np.linalg.norm(back, axis=1)[rows] / np.linalg.norm(x, axis=1)[rows]
        )
        assert (cosine > {"int8": 0.9995, "int4": 0.96}[form.name]).all()


@formats
def test_another_length_is_refused(form: Format) -> None:
    data = form.encode(draws(5, 3, 5))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(
            ValueError, match=f"3 x 5 values in {form.name} has {len(data)} bytes, got {len(wrong)}"
        ):
            form.decode(wrong, 3, 5)


def test_one_seed_gives_one_payload() -> None:
    x = draws(6, 8, 33)
    one, same, other = (FORMATS["int8"].encode(x, rng(seed, "draw")) for seed in (1, 1, 2))
    assert one == same != other


def top_k(x: np.ndarray, share: float) -> np.ndarray:
    return sparse.decode(sparse.encode(x, share), *x.shape, share)


@given(FINITE, SHARES)
def test_top_k_sends_the_largest_and_nothing_else(x: np.ndarray, share: float) -> None:
    (n, d), back = x.shape, top_k(x, share)
    k = min(d, max(1, int(np.ceil(share * d))))
    assert len(sparse.encode(x, share)) == sparse.size(n, d, share) == n * (2 + 4 * k)
    assert (np.count_nonzero(back, axis=1) <= k).all() and back.dtype == np.float32
    largest = np.abs(x).max(axis=1, initial=0.0, keepdims=True)
    least = -np.sort(-np.abs(x), axis=1)[:, k - 1 : k]  # (n, 1): the smallest that travels
    error = np.abs(back.astype(np.float64) - x)
    floor = 2.0**-24 * np.maximum(largest, 2.0**-126)
    sent = error <= 2.0**-11 * np.abs(x) + floor
    assert (sent | ((back == 0) & (np.abs(x) <= least))).all()
    assert sent[np.abs(x) > least].all()


def test_top_k_counts_exactly() -> None:
    assert sparse.size(1, 100, 0.07) == 2 + 4 * 7  # 0.07 * 100 is 7.000000000000001
    x = np.arange(100, dtype=np.float32)[None] * 1e-9
    np.testing.assert_array_equal(np.flatnonzero(top_k(x, 0.07)), np.arange(93, 100))
    np.testing.assert_allclose(top_k(x, 0.07)[0, 93:], x[0, 93:], rtol=2.0**-10)


@given(st.tuples(st.integers(1, 4), st.integers(1, 9)), st.integers(1, 12), SHARES, SEEDS)
def test_error_feedback_loses_nothing(shape: tuple[int, int], count: int, share: float, seed: int) -> None:
    inputs = rng(seed, "inputs").standard_normal((count, *shape)).astype(np.float32) * 1e-7
    memory, decoded = np.zeros(shape, np.float32), np.zeros(shape)
    for x in inputs:
        before = memory.copy()
        payload, after = sparse.with_feedback(x, memory, share)
        np.testing.assert_array_equal(memory, before)
        decoded, memory = decoded + sparse.decode(payload, *shape, share), after
    total = inputs.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(decoded + memory, total, rtol=0, atol=1e-6 * np.abs(inputs).sum())


def test_error_feedback_sends_every_element_in_its_turn() -> None:
    x, memory = np.array([[1.0, 0.9, 0.8, 0.7]], np.float32), np.zeros((1, 4), np.float32)
    seen = set()
    for _ in range(6):
        payload, memory = sparse.with_feedback(x, memory, 0.25)
        seen |= set(np.flatnonzero(sparse.decode(payload, 1, 4, 0.25)))
    assert seen == {0, 1, 2, 3}


def test_a_nan_is_reported_once_and_then_forgotten() -> None:
    x, memory = draws(7, 3, 8), np.zeros((3, 8), np.float32)
    broken = x.copy()
    broken[1, 2] = np.nan
    payload, memory = sparse.with_feedback(broken, memory, 0.25)
    assert np.isnan(sparse.decode(payload, 3, 8, 0.25)).all(axis=1).tolist() == [False, True, False]
    payload, memory = sparse.with_feedback(x, memory, 0.25)
    assert np.isfinite(sparse.decode(payload, 3, 8, 0.25)).all() and np.isfinite(memory).all()


def test_an_impossible_top_k_payload_is_refused() -> None:
    data = sparse.encode(draws(8, 3, 5), 0.4)
    with pytest.raises(ValueError, match="3 x 5 values in top-k has 30 bytes, got 29"):
        sparse.decode(data[:-1], 3, 5, 0.4)
    with pytest.raises(ValueError, match="rows of 5 values names column 5"):
        sparse.decode(data[:6] + b"\x05\x00" + data[8:], 3, 5, 0.4)
    with pytest.raises(ValueError, match="may have 65536 values, got 65537"):
        sparse.encode(np.zeros((1, 65537), np.float32), 0.1)
