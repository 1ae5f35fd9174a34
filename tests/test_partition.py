"""Laws of the partitions: disjoint, nested, of equal size, and as alike or unlike as their rule says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlam_app.data.channel_set import ChannelSet
from fedlam_app.data.partition import by_scenario, by_speed, iid, partition

NAMES = np.array(["uma-nlos", "umi-nlos", "rma-los"])


def users_of(count: int, seed: int = 0) -> ChannelSet:
    generator = np.random.default_rng(seed)
    history = np.ones((count, 1, 16, 1), np.complex64)
    return ChannelSet.from_raw(
        history,
        history[:, :, :4],
        generator.uniform(10, 100, count),
        NAMES[generator.integers(3, size=count)],
    )


@given(
    kind=st.sampled_from(["iid", "speed", "scenario"]),
    users=st.integers(20, 200),
    share=st.sampled_from([0.05, 0.07, 0.1, 0.15, 0.2]),
    seed=st.integers(0, 2**32),
)
def test_shards_are_disjoint_nested_sorted_and_of_the_share(
    kind: str, users: int, share: float, seed: int
) -> None:
    data = users_of(users, seed)
    most = 1
    try:
        while most < 20:
            partition(kind, data, most + 1, share, seed)
            most += 1
    except ValueError as error:
        assert f"must be 1 to {most}" in str(error)
    shards = partition(kind, data, most, share, seed)
    held = np.concatenate(shards)
    assert len(np.unique(held)) == len(held) and held.min() >= 0 and held.max() < users
    assert {len(shard) for shard in shards} == {int(share * users + 0.5)}
    assert all(np.all(np.diff(shard) > 0) for shard in shards)
    for servers in range(1, most):
        fewer = partition(kind, data, servers, share, seed)
        assert all(np.array_equal(a, b) for a, b in zip(fewer, shards, strict=False))


@given(users=st.integers(1, 300), pieces=st.integers(1, 40))
def test_iid_makes_as_many_shards_as_fit(users: int, pieces: int) -> None:
    assume(users >= pieces)
    size = int(users / pieces + 0.5)
    fit = min(pieces, users // size)
    assert len(iid(users, fit, 1 / pieces, 1)) == fit
    with pytest.raises(ValueError, match=f"must be 1 to {fit}, or data.share smaller"):
        iid(users, fit + 1, 1 / pieces, 1)


def test_the_case_study_has_ten_servers_of_fifteen_users() -> None:
    shards = iid(300, 10, 0.05, 2025)
    assert [len(shard) for shard in shards] == [15] * 10
    assert len(iid(300, 20, 0.05, 2025)) == 20  # 1 / 0.05 shards, not one fewer by rounding


def test_iid_is_a_uniform_draw() -> None:
    """Over many seeds each user is in shard 0 about equally often (binomial, five deviations)."""
    counts = np.zeros(40)
    for seed in range(500):
        counts[iid(40, 1, 0.25, seed)[0]] += 1
    assert np.all(np.abs(counts - 125) < 5 * np.sqrt(500 * 0.25 * 0.75))


def test_the_seed_decides_the_shards() -> None:
    data = users_of(100)
    for kind in ("iid", "speed", "scenario"):
        once, again, other = (partition(kind, data, 2, 0.1, seed) for seed in (1, 1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def test_speed_shards_are_bands_that_do_not_overlap() -> None:
    speed_kmh = np.random.default_rng(0).permutation(np.linspace(10, 100, 103))
    shards = by_speed(speed_kmh, 10, 0.1, 3)
    bands = sorted((speed_kmh[shard].min(), speed_kmh[shard].max()) for shard in shards)
    assert all(low[1] < high[0] for low, high in pairwise(bands))
    assert bands[0][0] < 14 and bands[-1][1] > 96  # all bands together still span every speed
    firsts = {round(float(speed_kmh[by_speed(speed_kmh, 1, 0.1, seed)[0]].mean()), -1) for seed in range(20)}
    assert len(firsts) > 3  # the first server is not always the slowest


def test_scenario_shards_are_pure_and_take_turns() -> None:
    scenario = NAMES[np.repeat([0, 1, 2], [60, 30, 10])]
    shards = by_scenario(scenario, 10, 0.1, 3)
    assert all(len(set(scenario[shard])) == 1 for shard in shards)
    first_three = [scenario[shard][0] for shard in shards[:3]]
    assert sorted(first_three) == sorted(NAMES)
    assert [str(scenario[shard][0]) for shard in shards[7:]] == ["uma-nlos"] * 3


@pytest.mark.parametrize(
    ("kind", "servers", "share", "message"),
    [
        ("idd", 2, 0.1, "unknown data.partition 'idd'; did you mean 'iid'"),
        ("iid", 11, 0.1, "train.devices = 11 does not fit data.share = 0.1, which makes 10 disjoint shards"),
        ("iid", 0, 0.1, "train.devices must be 1 to 10"),
        ("speed", 11, 0.1, "train.devices must be 1 to 10"),
        ("iid", 1, 0.001, "data.share = 0.001 of 100 users is less than one user; .* at least 0.01"),
        ("iid", 1, 0.0, "data.share must be above 0 and at most 1, got 0.0"),
        ("iid", 1, 1.5, "data.share must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_partitions_name_their_keys(kind: str, servers: int, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(kind, users_of(100), servers, share, 1)


def test_one_scenario_cannot_be_parted_by_scenario() -> None:
    with pytest.raises(
        ValueError, match=r"needs users of at least two scenarios in data.scenario, got uma-nlos"
    ):
        by_scenario(np.repeat(NAMES[:1], 10), 1, 0.5, 1)
