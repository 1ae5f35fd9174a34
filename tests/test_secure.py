"""Secure aggregation: the sum is exact whoever vanishes, and the server sees nothing but the sum."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

import clients.secure
import strategies.secure_round
from clients.adapter import Worker
from fedlam_app import client_app, rules_privacy
from fedlam_app.base.keys import rng
from fedlam_app.base.records import MaskedOrder, SecureOrder, SecureReport, cut, decode, join, kind_of, reply
from fedlam_app.client_app import app
from fedlam_app.config import ConfigError, Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.privacy import masking
from fedlam_app.privacy.masking import BUNDLE_BYTES, NOTHING, SEALED_BYTES, Secrets
from fedlam_app.privacy.neighbours import connected, graph, threshold
from fedlam_app.privacy.noise import Stream
from fedlam_app.privacy.shamir import PRIME, SHARE_BYTES, reconstruct, share
from fedlam_app.tasks import TASKS
from strategies.secure_round import SecureFederation
from strategies.secure_session import Session, Unopened
from tests.fleet_runs import FLEET
from tests.tiny import tiny_mixture_run, tiny_run

Flat = dict[str, Scalar]
Words = NDArray[np.uint32]
STAGES = ("keys", "shares", "masks", "open")


@pytest.fixture(autouse=True)
def workers_of_their_own() -> None:
    """A worker remembers where its devices remember, and that is another folder in every test."""
    client_app._worker.cache_clear()


def drawn(*key: int | str) -> Callable[[int], bytes]:
    return Stream(b"test", *key).bytes


# --- secret sharing -----------------------------------------------------------------------------------------


def test_the_field_is_one() -> None:
    """Miller and Rabin, over the first 40 primes: P is prime, and there is none between 2^256 and P."""
    bases = [n for n in range(2, 174) if all(n % m for m in range(2, n))]

    def prime(n: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1

        def passes(base: int) -> bool:
            x = pow(base, odd, n)
            return x in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))

        return all(passes(base) for base in bases)

    assert prime(PRIME) and not any(prime(n) for n in range(2**256 + 1, PRIME, 2))


@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.integers(0, 4), st.randoms())
@settings(max_examples=40)
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, least: int, more: int, draw: Any) -> None:
    holders = draw.sample(range(1, 10_000), least + more)
    shares = share(secret, least, holders, drawn(secret.hex()))
    for some in itertools.islice(itertools.combinations(holders, least), 5):
        assert reconstruct({k: shares[k] for k in some}) == secret
    assert all(len(part) == SHARE_BYTES for part in shares.values())


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.integers(2, 6))
@settings(max_examples=25)
def test_one_share_fewer_fits_every_secret(secret: bytes, other: bytes, least: int) -> None:
    """For t - 1 true shares and any other secret there is a last share that gives it."""
    shares = share(secret, least, range(1, least + 1), drawn(secret.hex(), "fewer"))
    known = {k: int.from_bytes(shares[k], "big") for k in range(1, least)} | {0: int.from_bytes(other, "big")}
    value = 0  # at x = t, of the polynomial through what is known and the other secret
    for k, own in known.items():
        term = own
        for j in known:
            if j != k:
                term = term * (least - j) * pow(k - j, -1, PRIME) % PRIME
        value = (value + term) % PRIME
    fitting = {k: shares[k] for k in range(1, least)} | {least: value.to_bytes(SHARE_BYTES, "big")}
    assert reconstruct(fitting) == other


def test_a_share_of_a_fixed_secret_is_uniform() -> None:
    found = [share(b"\0" * 32, 3, [1, 2, 3], drawn("uniform", i))[2] for i in range(4000)]
    draws = np.array([int.from_bytes(part, "big") / PRIME for part in found])
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    alone = [share(b"\0" * 32, 1, [1, 2, 3], drawn("uniform", i))[2] for i in range(4)]
    assert set(alone) == {bytes(SHARE_BYTES)}, "the mutant: without a random slope a share is the secret"


def test_shares_that_do_not_belong_together_do_not_give_the_secret() -> None:
    shares = share(b"s" * 32, 3, [1, 2, 3], drawn("false"))
    shares[2] = (int.from_bytes(shares[2], "big") ^ 1).to_bytes(SHARE_BYTES, "big")
    assert reconstruct(shares) != b"s" * 32
    outside = (PRIME - 1).to_bytes(SHARE_BYTES, "big")
    with pytest.raises(ValueError, match="do not belong together"):
        reconstruct({1: outside})
    for least, holders in ((3, [1, 2]), (2, [1, 1]), (2, [0, 1])):
        with pytest.raises(ValueError, match="shares"):
            share(b"s" * 32, least, holders, drawn("false"))


# --- neighbours ---------------------------------------------------------------------------------------------


@given(st.integers(3, 40), st.integers(0, 45), st.integers(0, 2**32))
def test_the_graph_is_regular_symmetric_connected_and_keyed(count: int, degree: int, seed: int) -> None:
    devices = [3 * k + 1 for k in range(count)]
    joined = graph(devices, degree, rng(seed))
    assert joined == graph(devices, degree, rng(seed))
    wanted = count - 1 if not 0 < degree < count - 1 else degree + degree % 2 * (count % 2)
    assert {len(set(peers)) for peers in joined.values()} == {min(wanted, count - 1)}
    assert all(k in joined[peer] and peer != k for k, peers in joined.items() for peer in peers)
    if degree != 1:
        assert connected(devices, joined)


def test_a_graph_in_pieces_is_told_and_the_key_matters() -> None:
    assert not connected([1, 2, 3, 4], {1: [2], 2: [1], 3: [4], 4: [3]})
    assert not connected([1, 3], {1: [2], 2: [1, 3], 3: [2]}), "over who is gone nothing hangs together"
    assert graph(range(20), 4, rng(1)) != graph(range(20), 4, rng(2))


@given(st.integers(2, 2000), st.floats(0.501, 1.0))
def test_nobody_could_collect_both_secrets_of_a_device(peers: int, survivors: float) -> None:
    least = threshold(peers, survivors)
    assert survivors * peers - 1e-6 <= least <= peers
    assert least + (least - 1) > peers, "a share of one kind from each peer, and the device's own"


@pytest.mark.parametrize("count", [3, 4, 6, 9, 12, 30, 33, 99, 150])
def test_a_third_of_a_complete_graph_may_go(count: int) -> None:
    stay = count - count // 3
    assert threshold(count - 1, 0.67) <= stay


# --- fixed point and masks ----------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.floats(1e-3, 1e3),
    st.integers(1, 5000),
)
def test_fixed_point_keeps_the_clip_and_its_error_bound(update: list[float], clip: float, count: int) -> None:
    scale = masking.scale_of(clip, count)
    u = np.array(update)
    norm = float(np.linalg.norm(u))
    found, inside = masking.decode(masking.encode(u, clip, scale), scale)
    whole = u * min(1.0, clip / max(norm, 1e-300))
    assert inside == (norm <= clip)
    assert np.linalg.norm(found) <= min(norm, clip) * (1 + 1e-12), "rounding must not pass the clip"
    assert np.abs(found - whole).max() < 1.0 / scale
    assert count * clip * scale <= masking.MOST < 4 * count * clip * scale


@pytest.mark.parametrize("count", [1, 3, 30, 1000])
def test_the_largest_sum_fits(count: int) -> None:
    clip, scale = 0.7, masking.scale_of(0.7, count)
    for sign in (1.0, -1.0):
        words = masking.encode(np.array([sign * clip, 0.0]), clip, scale)
        total = np.zeros(3, np.uint32)
        for _ in range(count):
            total += words
        found, inside = masking.decode(total, scale)
        assert found[0] == pytest.approx(sign * count * clip, rel=count * 1e-8) and inside == count


def parties(count: int, name: str = "s") -> tuple[dict[int, Secrets], dict[int, bytes]]:
    own = {k: Secrets.drawn(drawn("party", name, k)) for k in range(count)}
    return own, {k: secrets.bundle() for k, secrets in own.items()}


def test_masks_cancel_in_the_sum() -> None:
    own, bundles = parties(5)
    words = {k: Stream(b"x", k).integers(40) for k in own}
    sent = {k: masking.masked(words[k], own[k], k, {j: bundles[j] for j in own if j != k}, "s") for k in own}
    alone = sum(masking.self_mask(own[k].own, "s", 40) for k in own)
    total = sum(sent.values())
    np.testing.assert_array_equal(total - alone, sum(words.values()))
    assert not np.array_equal(total, sum(words.values())), "the self masks are there as well"
    a, b = (
        masking.pair_mask(own[i].pair, i, masking.pair_key(bundles[j]), j, "s", 40)
        for i, j in ((1, 2), (2, 1))
    )
    np.testing.assert_array_equal(a + b, np.zeros(40, np.uint32))
    other = masking.pair_mask(own[1].pair, 1, masking.pair_key(bundles[2]), 2, "another session", 40)
    assert not np.array_equal(a, other)


def test_a_masked_vector_is_uniform_whatever_is_masked() -> None:
    """Over many keys, of one vector that is anything but: zeros, but for the last entry."""
    words = np.append(np.zeros(3, np.uint32), np.uint32(1))
    found = []
    for i in range(700):
        own, bundles = parties(3, f"uniform {i}")
        found.append(masking.masked(words, own[0], 0, {1: bundles[1], 2: bundles[2]}, "s"))
    draws = np.stack(found) / 2.0**32
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((draws[:, -1] * 16).astype(int), minlength=16)).pvalue > 1e-3
    low = np.stack(found)[:, 0] & 15
    assert stats.chisquare(np.bincount(low, minlength=16)).pvalue > 1e-3
    assert abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.15
    assert stats.kstest(np.tile(words / 2.0**32, 700), "uniform").pvalue < 1e-9


def test_updates_of_one_sum_give_one_view() -> None:
    """All that is opened are self masks. Pair masks, uniform and unknown, make up for any change."""
    draw = rng(7, "views")
    first = draw.integers(0, 2**32, (4, 9), np.uint32)
    change = draw.integers(0, 2**32, (4, 9), np.uint32)
    change[-1] = -change[:-1].sum(0, dtype=np.uint32)
    second = first + change
    np.testing.assert_array_equal(first.sum(0, dtype=np.uint32), second.sum(0, dtype=np.uint32))
    pairs = {pair: draw.integers(0, 2**32, 9, np.uint32) for pair in itertools.combinations(range(4), 2)}
    own = draw.integers(0, 2**32, (4, 9), np.uint32)

    def view(words: Words, masks: Mapping[tuple[int, int], Words]) -> Words:
        sent = words + own
        for (i, j), mask in masks.items():
            sent[i] += mask
            sent[j] -= mask
        return sent

    shifted = dict(pairs)  # along the path 0-1-2-3: what k has too much goes to k + 1
    carried = np.zeros(9, np.uint32)
    for k in range(3):
        carried = carried + change[k]
        shifted[k, k + 1] = shifted[k, k + 1] - carried
    np.testing.assert_array_equal(view(first, pairs), view(second, shifted))
    assert not np.array_equal(view(first, pairs), view(second, pairs))


def test_what_is_sealed_opens_for_one_device_and_purpose_alone() -> None:
    own, bundles = parties(3)
    key = masking.agreed(own[0].seal, masking.seal_key(bundles[1]), "seal", "s", 0, 1)
    sealed = masking.seal(key, bytes(12), b"text", "s", 0, 1)
    same = masking.agreed(own[1].seal, masking.seal_key(bundles[0]), "seal", "s", 0, 1)
    assert masking.unseal(same, sealed, "s", 0, 1) == b"text"
    third = masking.agreed(own[2].seal, masking.seal_key(bundles[0]), "seal", "s", 0, 1)
    damaged = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for wrong, part, about in (
        (third, sealed, ("s", 0, 1)),
        (same, damaged, ("s", 0, 1)),
        (same, sealed, ("s", 1, 0)),
    ):
        with pytest.raises(masking.Forged):
            masking.unseal(wrong, part, *about)


# --- runs ---------------------------------------------------------------------------------------------------

Drops = Mapping[str, Iterable[int]]
CLIP = 0.07  # some of the devices' updates are longer


def secure_run(**keys: Scalar) -> Flat:
    flat: Flat = {
        **tiny_mixture_run(),
        "mixture.test": 20,
        "privacy.mechanism": "client",
        "privacy.target-epsilon": float("inf"),
        "privacy.clip": CLIP,
        "privacy.secure": True,
        "train.devices": 6,
        "train.local-steps": 1,
    }
    return flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}


def start(flat: Flat, supernodes: int = 2, client: ClientApp = app) -> tuple[Any, InProcessGrid]:
    flat = flat | {"federation.supernodes": supernodes}
    config = parse(flat)
    task = TASKS[config.task](config)
    return federate(config, "{}", task, task.build_model()), InProcessGrid(client, supernodes, flat)


def stage_of(message: Message) -> str:
    kind = kind_of(message.content)
    return str(
        message.content.config_records["config"].get("stage", "masks" if kind == "MaskedOrder" else "")
    )


def changed(change: Callable[[str, SecureReport], SecureReport]) -> ClientApp:
    """The real client, but its reports of a stage are changed on their way."""
    wrapped = ClientApp()

    @wrapped.train()
    def train(message: Message, context: Context) -> Message:
        report = decode(app(message, context).content, SecureReport)
        return reply(change(stage_of(message), report), message)

    return wrapped


def without(drops: Drops) -> ClientApp:
    """The real client, but some devices' answers are lost: of one stage, and of all that follow."""

    def change(stage: str, report: SecureReport) -> SecureReport:
        gone = {k for name in STAGES[: STAGES.index(stage) + 1] for k in drops.get(name, ())}
        kept = [
            (k, part)
            for k, part in zip(report.devices, cut(report.payload, report.sizes), strict=True)
            if k not in gone
        ]
        payload, sizes = join([part for _, part in kept], np.uint8)
        return replace(report, devices=[k for k, _ in kept], payload=payload, sizes=sizes)

    return changed(change)


class Spy:
    """Every device's vector before it was masked, and every sum that the server opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: list[Words] = []
        self.updates: list[NDArray[np.float64]] = []
        self.sums: list[Words] = []
        encode, decode = masking.encode, masking.decode

        def encoded(update: NDArray[np.float64], clip: float, scale: float) -> Words:
            self.updates.append(update)
            self.words.append(encode(update, clip, scale))
            return self.words[-1]

        def decoded(total: Words, scale: float) -> tuple[NDArray[np.float64], int]:
            self.sums.append(total.copy())
            return decode(total, scale)

        monkeypatch.setattr(clients.secure, "encode", encoded)
        monkeypatch.setattr(strategies.secure_round, "decode", decoded)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def plain_sum(words: Iterable[Words]) -> Words:
    return np.sum(list(words), axis=0, dtype=np.uint32)


def test_a_masked_run_is_the_unmasked_one_up_to_fixed_point() -> None:
    """Every round moves a coordinate by less than 1 / scale: the mean of n roundings of at most that."""
    models = []
    for secure in (True, False):
        federation, grid = start(secure_run(privacy__secure=secure))
        assert isinstance(federation, SecureFederation) == secure
        for number in (1, 2, 3):
            cost = federation.train_round(grid, number)
            assert not cost.failures
        models.append(federation.algorithm.models()[0].astype(np.float64))
        assert np.isnan(federation.loss)
    step = 1.0 / masking.scale_of(CLIP, 6)
    assert step < 2e-9
    # Beside the roundings of this round: float32 models, and training on from models that differ by them.
    assert np.abs(models[0] - models[1]).max() < 3 * step + 4e-7
    assert np.abs(models[0]).max() > 0.05


def test_one_round_differs_by_less_than_a_step_of_fixed_point(spy: Spy) -> None:
    federation, grid = start(secure_run())
    federation.train_round(grid, 1)
    exact = np.mean([u * min(1.0, CLIP / np.linalg.norm(u)) for u in spy.updates], axis=0)
    found, inside = masking.decode(spy.sums[0], masking.scale_of(CLIP, 6))
    assert np.abs(found / 6 - exact).max() < 1.0 / masking.scale_of(CLIP, 6)
    assert 0 < inside < 6 and inside == sum(np.linalg.norm(u) <= CLIP for u in spy.updates)


def test_how_devices_are_packed_changes_no_bit() -> None:
    models = []
    for supernodes in (1, 3, 6):
        federation, grid = start(secure_run(), supernodes)
        for number in (1, 2):
            federation.train_round(grid, number)
        models.append(federation.algorithm.models())
    np.testing.assert_array_equal(models[0], models[1])
    np.testing.assert_array_equal(models[0], models[2])


@given(st.data())
@settings(max_examples=25)
def test_the_sum_is_exact_whoever_vanishes_at_whatever_stage(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 7))
    gone = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count // 3))]
    at = {k: data.draw(st.sampled_from(STAGES)) for k in gone}
    drops = {stage: [k for k in gone if at[k] == stage] for stage in STAGES}
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        federation, grid = start(secure_run(train__devices=count), 2, without(drops))
        cost = federation.train_round(grid, 1)
    trained = [k for k in range(count) if at.get(k) not in ("keys", "shares")]
    sent = [k for k in trained if at.get(k) != "masks"]
    words = dict(zip(trained, spy.words, strict=True))
    if len(sent) < 3:  # three devices of whom one vanished
        assert federation.closed and not spy.sums
        return
    assert not federation.closed and not cost.failures
    np.testing.assert_array_equal(spy.sums[0], plain_sum(words[k] for k in sent))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("neighbours", [0, 6])
def test_a_third_may_vanish_at_each_stage(spy: Spy, stage: str, neighbours: int) -> None:
    """Of 12 devices; with 6 neighbours each, the four lie apart on the ring."""
    flat = secure_run(train__devices=12, privacy__neighbours=neighbours, privacy__survivors=0.51)
    joined = graph(range(12), neighbours, rng(7, "neighbours", 1))
    gone = next(
        some
        for some in itertools.combinations(range(12), 4)
        if all(len(set(joined[k]).difference(some)) >= 4 for k in range(12))
    )
    federation, grid = start(flat, 2, without({stage: gone}))
    cost = federation.train_round(grid, 1)
    trained = [k for k in range(12) if k not in gone or stage in ("masks", "open")]
    words = dict(zip(trained, spy.words, strict=True))
    sent = [k for k in trained if k not in gone or stage == "open"]
    assert not cost.failures
    np.testing.assert_array_equal(spy.sums[0], plain_sum(words[k] for k in sent))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_where_too_few_stay_the_model_stays_and_the_run_goes_on(stage: str) -> None:
    drops = {stage: [0, 1, 2]}
    federation, grid = start(secure_run(), 2, without(drops))
    before = federation.algorithm.models().copy()
    cost = federation.train_round(grid, 1)
    assert federation.closed and len(cost.failures) == 1
    assert cost.failures[0].startswith("round 1: ") and "the model stays as it is" in cost.failures[0]
    np.testing.assert_array_equal(federation.algorithm.models(), before)
    assert not federation.heard.any() and not any(
        json.loads(b)["events"] for b in federation.ledgers.values()
    )
    drops.clear()
    assert not federation.train_round(grid, 2).failures
    assert not np.array_equal(federation.algorithm.models(), before)


def test_a_run_that_was_killed_goes_on_to_the_same_model() -> None:
    flat = secure_run(privacy__target_epsilon=50.0, privacy__noise_multiplier=0.5)
    whole, grid = start(flat)
    for number in (1, 2, 3):
        whole.train_round(grid, number)
    killed, grid = start(flat)
    killed.train_round(grid, 1)
    state = {name: np.array(array) for name, array in killed.state().items()}
    killed.train_round(grid, 2)  # lost
    again, _ = start(flat)
    again.load(state)
    for number in (2, 3):
        again.train_round(grid, number)
    np.testing.assert_array_equal(again.algorithm.models(), whole.algorithm.models())
    assert json.loads(again.ledgers[0])["events"] == json.loads(whole.ledgers[0])["events"]


def test_a_round_that_is_begun_again_may_have_other_survivors(spy: Spy) -> None:
    """It is another session: of the masks of the first, the one secret or the other was opened."""
    drops = {"masks": [5]}
    first, grid = start(secure_run(), 2, without(drops))
    first.train_round(grid, 1)
    drops.clear()
    spy.words.clear(), spy.sums.clear()
    again, grid = start(secure_run(), 2, without(drops))
    assert not again.train_round(grid, 1).failures
    np.testing.assert_array_equal(spy.sums[0], plain_sum(spy.words))


def test_with_secret_coins_a_sum_that_stays_closed_is_a_step_of_noise_alone() -> None:
    coins: Flat = {"privacy.cohort": "poisson", "train.cohort": 4, "privacy.noise-multiplier": 1.0}
    drops = {"masks": range(6)}
    federation, grid = start(secure_run() | coins | {"privacy.target-epsilon": 99.0}, 2, without(drops))
    before = federation.algorithm.models()[0].astype(np.float64)
    cost = federation.train_round(grid, 1)
    assert federation.closed and cost.failures
    moved = (federation.algorithm.models()[0] - before) * 4 / CLIP
    assert moved.std() == pytest.approx(1.0, rel=0.1)
    assert all(json.loads(federation.ledgers[k])["events"] == [[4 / 6, 1.0, 1]] for k in range(6))


def test_the_clip_adapts_to_the_same_count_of_bits() -> None:
    clips = []
    for secure in (True, False):
        federation, grid = start(secure_run(privacy__secure=secure, privacy__quantile=0.5))
        for number in (1, 2, 3):
            federation.train_round(grid, number)
        clips.append(federation.hands.reception.clip)
    assert clips[0] == pytest.approx(clips[1], rel=1e-9) and clips[0] != pytest.approx(CLIP, rel=1e-3)


# --- what the server sees -----------------------------------------------------------------------------------


def received(grid: InProcessGrid) -> bytes:
    """Return all that came up, as Flower would put it on a socket."""
    contents = (recorddict_to_proto(answer.content) for answer in grid.delivered[1::2])
    return b"\n".join(content.SerializeToString() for content in contents)


def stretches(spy: Spy) -> list[bytes]:
    """Return stretches of four values of updates and of their fixed point, in every form they might have."""
    found = []
    for update, words in zip(spy.updates, spy.words, strict=True):
        some = [i for i in range(0, len(update) - 4, 50) if np.count_nonzero(words[i : i + 4]) == 4]
        for i in some:
            part, own = update[i : i + 4], words[i : i + 4]
            found += [part.astype(form).tobytes() for form in ("<f2", "<f4", "<f8")]
            found += [own.tobytes(), own.view(np.int32).astype("<i8").tobytes(), own.astype(">u4").tobytes()]
    return found


def test_no_update_is_in_what_the_server_gets(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, grid = start(secure_run(), 2, without({"masks": [5]}))
    federation.train_round(grid, 1)
    wanted = stretches(spy)
    assert len(wanted) > 500 and len(spy.updates) == 6
    sent = received(grid)
    assert not [part for part in wanted if part in sent]
    assert len(sent) > 5 * 4 * len(spy.updates[0])
    # The search finds them where nothing is masked.
    monkeypatch.setattr(clients.secure, "masked", lambda words, *rest: words)
    monkeypatch.setattr(
        strategies.secure_session.Session, "sum", lambda self, words, opened: plain_sum(words.values())
    )
    bare, grid = start(secure_run(seed=8))
    spy.words.clear(), spy.updates.clear()
    bare.train_round(grid, 1)
    sent = received(grid)
    assert any(part in sent for part in stretches(spy))


def test_a_secret_is_never_sent_and_only_one_kind_of_share_is_opened(spy: Spy) -> None:
    federation, grid = start(secure_run(), 2, without({"masks": [5], "open": [4]}))
    federation.train_round(grid, 1)
    (first,) = {order.session for order in orders(grid, SecureOrder)}
    worker = Worker(parse(secure_run()), TASKS["mixture"](parse(secure_run())))
    sent = received(grid)
    for k in range(6):
        secrets = Secrets.drawn(worker.ledgers.stream(k, "secure", 1, first, "secrets").bytes)
        assert secrets.bundle() in sent, "these are the secrets"
        assert not any(secret in sent for secret in (secrets.seal, secrets.pair, secrets.own))


def orders(grid: InProcessGrid, kind: type[Any], stage: str = "") -> list[Any]:
    return [
        decode(message.content, kind)
        for message in grid.delivered[::2]
        if kind_of(message.content) == kind.__name__ and stage in ("", stage_of(message))
    ]


# --- what a device will not do ------------------------------------------------------------------------------


@pytest.fixture
def asked() -> tuple[Worker, dict[str, Any]]:
    """A worker whose devices have been through round 1 up to 'open', and the orders of that round."""
    flat = secure_run()
    federation, grid = start(flat, 1)
    federation.train_round(grid, 1)
    found: dict[str, Any] = {s: orders(grid, SecureOrder, s)[0] for s in ("keys", "shares", "open")}
    found["masks"] = orders(grid, MaskedOrder)[0]
    config = parse(flat | {"federation.supernodes": 1})
    return Worker(config, TASKS["mixture"](config)), found


def test_asked_again_a_device_answers_again_bit_for_bit(asked: tuple[Worker, dict[str, Any]]) -> None:
    worker, found = asked
    for stage in STAGES:
        one, two = (clients.secure.serve(worker, found[stage]) for _ in range(2))
        assert one.devices == list(range(6)) and not one.complaints
        np.testing.assert_array_equal(one.payload, two.payload)


def test_a_device_never_opens_both_secrets_of_a_peer(asked: tuple[Worker, dict[str, Any]]) -> None:
    worker, found = asked
    order = found["open"]
    told = [2 if peer == 3 else standing for peer, standing in zip(order.peers, order.standing, strict=True)]
    report = clients.secure.serve(worker, replace(order, standing=told))
    assert report.devices == [3], "device 3 is not told of itself"
    assert len(report.complaints) == 5
    assert report.complaints[0] == "device 0: it has answered otherwise in this session already (opened)"


def test_a_device_masks_one_update_in_a_session(asked: tuple[Worker, dict[str, Any]]) -> None:
    worker, found = asked
    order = found["masks"]
    report = clients.secure.serve(worker, replace(order, vectors=order.vectors + np.float32(0.01)))
    assert not report.devices and "(masked)" in report.complaints[0]
    fewer = [1 if peer == 3 else standing for peer, standing in zip(order.peers, order.standing, strict=True)]
    report = clients.secure.serve(worker, replace(order, standing=fewer))
    assert report.devices == [3] and "(shared)" in report.complaints[0]


def test_a_device_opens_nothing_in_a_session_in_which_it_masked_nothing(
    asked: tuple[Worker, dict[str, Any]],
) -> None:
    worker, found = asked
    report = clients.secure.serve(worker, replace(found["open"], session="another"))
    assert not report.devices and "it has done nothing of the kind" in report.complaints[0]


def test_peers_that_cannot_be_are_refused(asked: tuple[Worker, dict[str, Any]]) -> None:
    worker, found = asked
    order = replace(found["shares"], session="new")
    twice = [order.peers[1], *order.peers[1:]]
    itself = [0, *order.peers[1:]]
    for peers in (twice, itself):
        report = clients.secure.serve(worker, replace(order, peers=peers))
        assert 0 not in report.devices and "not different devices" in report.complaints[0]
    payload = order.payload.copy()
    payload[:BUNDLE_BYTES] = payload[BUNDLE_BYTES : 2 * BUNDLE_BYTES]
    report = clients.secure.serve(worker, replace(order, payload=payload))
    assert report.devices == [1, 2, 3, 4, 5] and "keys of their own" in report.complaints[0]
    zero = order.payload.copy()
    zero[:BUNDLE_BYTES] = 0
    report = clients.secure.serve(worker, replace(order, payload=zero))
    assert report.complaints == ["device 0: the public key of device 1 is none"]
    one = replace(order, devices=[0], peers=[1], counts=[1], standing=[1])
    report = clients.secure.serve(
        worker, replace(one, payload=order.payload[:BUNDLE_BYTES], sizes=[BUNDLE_BYTES])
    )
    assert report.complaints == ["device 0: 1 peers hide nothing; there must be 2 at least"]


def test_a_forged_share_is_named_and_left_out(asked: tuple[Worker, dict[str, Any]]) -> None:
    worker, found = asked
    order = found["open"]
    keys = BUNDLE_BYTES * 5
    payload = order.payload.copy()
    payload[keys + 2 * SEALED_BYTES + 20] ^= 1  # what device 3 sealed for device 0
    report = clients.secure.serve(worker, replace(order, payload=payload))
    assert report.complaints == [
        "device 0: what device 3 sealed for it cannot be opened: it is damaged or forged"
    ]
    parts = report.payload[: report.sizes[0]].reshape(6, SHARE_BYTES)
    assert [part.tobytes() == NOTHING for part in parts] == [False, False, False, True, False, False]


def test_damage_on_the_way_is_named_and_the_sum_is_exact_all_the_same(spy: Spy) -> None:
    def change(stage: str, report: SecureReport) -> SecureReport:
        if stage != "shares" or 2 not in report.devices:
            return report
        payload = report.payload.copy()
        cut(payload, report.sizes)[report.devices.index(2)][30] ^= 255
        return replace(report, payload=payload)

    federation, grid = start(secure_run(), 2, changed(change))
    cost = federation.train_round(grid, 1)
    assert cost.failures == [
        "round 1: device 0: what device 2 sealed for it cannot be opened: it is damaged or forged"
    ]
    np.testing.assert_array_equal(spy.sums[0], plain_sum(spy.words))


def test_a_false_share_closes_the_sum_by_name() -> None:
    """A device that lies about its shares cannot make the server take off what is no mask."""

    def change(stage: str, report: SecureReport) -> SecureReport:
        if stage != "open" or 0 not in report.devices:
            return report
        payload = report.payload.copy()
        payload[2 * SHARE_BYTES - 1] ^= 1  # device 0's share of its first peer
        return replace(report, payload=payload)

    federation, grid = start(secure_run(), 2, changed(change))
    before = federation.algorithm.models().copy()
    (why,) = federation.train_round(grid, 1).failures
    assert "the shares of device 1 do not open its masks: one of them is false" in why
    np.testing.assert_array_equal(federation.algorithm.models(), before)


def test_an_answer_of_another_length_did_not_come() -> None:
    def change(stage: str, report: SecureReport) -> SecureReport:
        if stage != "masks" or 5 not in report.devices:
            return report
        sizes = [*report.sizes[:-1], report.sizes[-1] - 4]
        return replace(report, payload=report.payload[:-4], sizes=sizes)

    federation, grid = start(secure_run(), 2, changed(change))
    (why,) = federation.train_round(grid, 1).failures
    assert why.startswith("round 1: device 5 sent ") and not federation.closed


def test_an_update_that_is_not_finite_stays_at_home(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    obey = Worker.obey

    def poisoned(self: Worker, order: Any, place: int) -> Any:
        answer = obey(self, order, place)
        return replace(answer, vector=answer.vector * np.nan) if answer.device == 1 else answer

    monkeypatch.setattr(Worker, "obey", poisoned)
    federation, grid = start(secure_run())
    cost = federation.train_round(grid, 1)
    assert cost.failures == ["round 1: device 1: its update is not finite"]
    np.testing.assert_array_equal(spy.sums[0], plain_sum(spy.words))
    assert len(spy.words) == 5 and np.isfinite(federation.algorithm.models()).all()


def test_a_session_without_enough_shares_says_whose_are_missing() -> None:
    session = Session("s", [0, 1, 2], 0.67)
    session.note(1, [0, 1, 2])
    session.joined = graph([0, 1, 2], 0, rng(1))
    session.note(2, [0, 1, 2])
    session.note(3, [0, 1, 2])
    words = {k: np.zeros(3, np.uint32) for k in range(3)}
    with pytest.raises(Unopened, match="0 shares of device 0 came, and its masks take 2"):
        session.sum(words, {})


# --- with the rest ------------------------------------------------------------------------------------------


def test_bytes_are_those_of_every_stage() -> None:
    federation, grid = start(secure_run(), 6)
    cost = federation.train_round(grid, 1)
    size = len(federation.algorithm.models()[0])
    payload = 6 * (BUNDLE_BYTES + 5 * SEALED_BYTES + 6 * SHARE_BYTES + 4 * (size + 1))
    assert payload < cost.bytes_up < payload + 6 * 4 * 200
    up, down = federation.payloads.of(1)
    assert up.sum() == pytest.approx(cost.bytes_up, abs=6 * 4) and down.sum() == pytest.approx(
        cost.bytes_down, abs=6
    )


def test_whose_packet_is_lost_is_in_no_sum(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, grid = start(secure_run())
    turn = federation.hands.turn
    monkeypatch.setattr(federation.hands, "turn", lambda *asked: replace(turn(*asked), lost=[2]))
    federation.train_round(grid, 1)
    assert len(spy.words) == 6
    np.testing.assert_array_equal(spy.sums[0], plain_sum([*spy.words[:2], *spy.words[3:]]))


def test_in_a_fleet_the_sum_is_of_those_who_are_there(spy: Spy) -> None:
    fleet: Flat = {**FLEET, "train.devices": 12, "train.cohort": 9, "wireless.radius-m": 500.0}
    federation, grid = start(secure_run() | fleet, 1)
    opened = 0
    for number in range(1, 7):
        spy.words.clear(), spy.sums.clear()
        federation.train_round(grid, number)
        if federation.closed:
            assert not spy.sums
            continue
        opened += 1
        assert len(spy.words) == len(federation.turn.ids)
        np.testing.assert_array_equal(spy.sums[0], plain_sum(spy.words))
    assert opened >= 2


@pytest.mark.slow
def test_a_rule_that_returns_one_factor_alone(tmp_path: Path) -> None:
    """RoLoRA: of a LoRA pair one factor travels, in turns."""
    models = []
    for secure in (True, False):
        flat = tiny_run(tmp_path) | {
            key: value
            for key, value in secure_run(privacy__secure=secure, strategy="rolora").items()
            if key.startswith(("privacy", "strategy"))
        }
        federation, grid = start(flat)
        for number in (1, 2):
            federation.train_round(grid, number)
        models.append(federation.algorithm.models()[0])
    np.testing.assert_allclose(models[0], models[1], atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"train.devices": 2},
        {"train.cohort": 2},
        {"privacy.mechanism": "none"},
        {"privacy.mechanism": "dp-sgd"},
        {"fleet.profiles": "phones", "wireless.transport": "analog"},
        {"fleet.profiles": "phones", "selection.mode": "asynchronous"},
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(keys: Flat) -> None:
    with pytest.raises(ConfigError, match=r"^'privacy\.secure' = true is not allowed with "):
        parse(secure_run() | keys)


def test_gradients_that_the_server_makes_cannot_be_masked() -> None:
    config = parse(secure_run(strategy="fedsgd-lora", task="text-classification"))
    assert not list(rules_privacy.with_strategy(config, "adapter", True))
    (sentence,) = rules_privacy.with_strategy(config, "gradient", True)
    assert "'privacy.secure' = true is not allowed with 'strategy' = 'fedsgd-lora'" in sentence
