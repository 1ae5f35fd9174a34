"""Where channels come from: the 3GPP generator, or files of the user's own; and who is tested.

Training and test users never overlap. Of a file, a keyed permutation picks them, so that the same
seed picks the same users; the generator draws the two splits from different keys.
"""

from __future__ import annotations

from pathlib import Path

from fedlam_app.base.keys import rng
from fedlam_app.base.store import cache_root
from fedlam_app.config import DataConfig
from fedlam_app.data.channel_set import ChannelSet


def load_splits(data: DataConfig, seed: int, progress: bool = False) -> tuple[ChannelSet, ChannelSet]:
    """Return (training users, test users); generates and caches channels where the source is 'sionna'.

    Raises ``ValueError`` naming ``data.users`` or ``data.test-users`` where a file has too few users.
    """
    if data.source == "sionna":
        train = _generated(data, "train", data.users, seed, progress)
        if not data.test_source:
            return train, _generated(data, "test", data.test_users, seed, progress)
        return train, _from_file(data, data.test_source, {"test-users": data.test_users}, seed)[0]
    if data.test_source and not _one_pool(data):
        (train,) = _from_file(data, data.source, {"users": data.users}, seed)
        (test,) = _from_file(data, data.test_source, {"test-users": data.test_users}, seed)
        return train, test
    train, test = _from_file(data, data.source, {"users": data.users, "test-users": data.test_users}, seed)
    return train, test


def check_files(data: DataConfig, seed: int) -> None:
    """Read every file that ``data`` names and cut its splits; generates nothing.

    Raises ``ValueError``, in one sentence, as ``load_splits`` would.
    """
    if data.source == "sionna":
        _from_file(data, data.test_source, {"test-users": data.test_users}, seed)
    else:
        load_splits(data, seed)


def _one_pool(data: DataConfig) -> bool:
    """Whether both sources are the same users: then one cut must part them, or training meets the test."""
    path = Path(data.source)
    return path == Path(data.test_source) and (path.is_file() or len(_splits_in(path)) < 2)


def _splits_in(path: Path) -> set[str]:
    from fedlam_app.data.readers import splits_in

    return set(splits_in(path))


def _generated(data: DataConfig, split: str, users: int, seed: int, progress: bool) -> ChannelSet:
    from fedlam_app.data.channels import Recipe, load_or_generate

    recipe = Recipe(
        scenario=data.scenario,
        users=users,
        seed=seed,
        split=split,
        duplex=data.duplex,
        speed_min_kmh=data.speed_min_kmh,
        speed_max_kmh=data.speed_max_kmh,
    )
    return load_or_generate(recipe, cache_root(data.cache), progress=progress)


def _from_file(data: DataConfig, source: str, counts: dict[str, int], seed: int) -> list[ChannelSet]:
    """Cut a file's users into disjoint splits of the sizes asked for."""
    from fedlam_app.data.readers import read

    # LLM4CP keeps training and test users under different keys, often in one folder.
    path = Path(source)
    split = "" if path.is_file() or len(_splits_in(path)) < 2 else ("train" if "users" in counts else "test")
    channels = read(path, duplex=data.duplex, split=split)
    wanted = sum(counts.values())
    if wanted > len(channels):
        keys = " + ".join(f"data.{key} = {count}" for key, count in counts.items())
        raise ValueError(f"{keys} asks for {wanted} users, but {source} has {len(channels)}")
    chosen = rng(seed, "users").permutation(len(channels))
    splits, start = [], 0
    for count in counts.values():
        splits.append(channels.take(chosen[start : start + count]))
        start += count
    return splits
