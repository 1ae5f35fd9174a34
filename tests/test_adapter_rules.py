"""Adapter-space rules: which are exact, what each leaves alone, and that a resumed one goes on the same.

Exact means: after a round, what all devices apply to a weight is s sum_k p_k B_k A_k, to float32.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlam_app.base.layout import Layout, expand, factors_at
from fedlam_app.base.vectors import Vector
from fedlam_app.config import RunConfig, parse
from strategies.algorithm import Algorithm
from strategies.fed_sb import FedSb
from strategies.fedavg_lora import FedAvgLora
from strategies.fedex_lora import FedExLora
from strategies.fedprox import FedProx
from strategies.fedsa_lora import FedSaLora
from strategies.ffa_lora import FfaLora
from strategies.flexlora import FlexLora
from strategies.flora import Flora
from strategies.hetlora import HetLora, update_norm
from strategies.local import Local
from strategies.rolora import RoLora

Rule = type[Algorithm]
ALL: tuple[Rule, ...] = (
    FedAvgLora, FedProx, FfaLora, RoLora, FedSaLora, HetLora, FlexLora, Flora, FedExLora, FedSb, Local,
)  # fmt: skip
EXACT: tuple[Rule, ...] = (FfaLora, RoLora, Flora, FedExLora, FedSb)  # FlexLora only at a rank large enough
GLOBAL = tuple(rule for rule in ALL if rule is not Local)
CONFIG = parse({"model.rank": 4, "seed": 5})


@dataclass
class Case:
    """A cohort: linears of some shapes, one rank for all, examples a device."""

    layout: Layout
    weights: list[int]
    seed: int

    @property
    def devices(self) -> list[int]:
        return list(range(len(self.weights)))


@st.composite
def cases(draw: st.DrawFn, devices: int = 4, rank: int = 3) -> Case:
    sizes = st.integers(1, 9)
    linears = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=2))
    weights = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=devices))
    return Case(layout_of(linears, draw(st.integers(1, rank))), weights, draw(st.integers(0, 2**20)))


def layout_of(linears: Sequence[tuple[int, int]], rank: int, scale: float = 2.0) -> Layout:
    """Lay out linears (in, out) with something that is not LoRA before, between and after them."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("front.weight", (3,))]
    for number, (inputs, outputs) in enumerate(linears):
        shapes += [
            (f"m.{number}.lora_A.default.weight", (rank, inputs)),
            (f"m.{number}.lora_B.default.weight", (outputs, rank)),
            (f"m.{number}.norm", (2,)),
        ]
    return Layout.of(shapes, scale)


def started(rule: Rule, case: Case, ranks: tuple[int, ...] = (), seed: int = 5) -> Algorithm:
    """Return the rule, started as LoRA starts: A random, B zero."""
    train = CONFIG.train.model_copy(update={"ranks": ranks, "proximal_mu": 0.3})
    config: RunConfig = CONFIG.model_copy(update={"train": train, "seed": seed})
    algorithm = rule(config)
    vector = np.random.default_rng(case.seed).standard_normal(case.layout.size).astype(np.float32)
    vector[case.layout.part("b")] = 0.0
    algorithm.init(vector, case.devices, case.layout)
    return algorithm


def received(algorithm: Algorithm, number: int, seed: int, drift: float = 1.0) -> dict[int, Vector]:
    """Return what the devices hand in: where they start, moved at random in what they train and return."""
    layout, plan = algorithm.layout, algorithm.plan(number)
    cohort = algorithm.cohort(number)
    vectors = {}
    for device, row in zip(cohort, algorithm.rows(cohort), strict=True):
        start = algorithm.models()[row]
        noise = np.random.default_rng((seed, number, device)).standard_normal(start.size) * drift
        if start.size == layout.size:  # else compact: all of it trains
            start = start * layout.within(algorithm.rank(device))
            noise = noise * layout.part(plan.returns) * layout.within(algorithm.rank(device))
        vectors[device] = (start + noise).astype(np.float32)
    return vectors


def close_round(
    algorithm: Algorithm, vectors: dict[int, Vector], weights: Sequence[int], order: Sequence[int] = ()
) -> None:
    for device in order or sorted(vectors):
        buffer = vectors[device].copy()
        algorithm.fold(device, buffer, float(weights[device]))
        buffer.fill(np.nan)  # it belongs to a message: a rule must have taken what it needs
    algorithm.step()


def products(vector: Vector, layout: Layout) -> list[np.ndarray]:
    """Return s B A (out, in) of every pair, in float64."""
    return [layout.scale * (b @ a) for a, b in layout.factors(vector.astype(np.float64))]


def full(vector: Vector, algorithm: Algorithm) -> Vector:
    """Return the LoRA vector (p,) of one that may be compact (Fed-SB)."""
    if vector.size == algorithm.layout.size:
        return vector
    return expand(vector, algorithm.entries()[0].vector, algorithm.layout)


def applied(algorithm: Algorithm) -> list[np.ndarray]:
    """Return everything that the first global model adds to each frozen weight (out, in)."""
    total = products(full(algorithm.models()[0], algorithm), algorithm.layout)
    for entry in algorithm.entries():
        if entry.kind == "merge":
            factors = factors_at(algorithm.layout, entry.vector, entry.rank)
            for sum_, (a, b) in zip(total, factors, strict=True):
                sum_ += algorithm.layout.scale * (b.astype(np.float64) @ a)
    return total


def error(algorithm: Algorithm, vectors: dict[int, Vector], weights: Sequence[int]) -> float:
    """Return the largest |applied - s sum_k p_k B_k A_k| over the size of the terms, before and after."""
    before = applied(algorithm)
    started_at = products(full(algorithm.models()[0], algorithm), algorithm.layout)
    sent = {device: products(full(v, algorithm), algorithm.layout) for device, v in vectors.items()}
    close_round(algorithm, vectors, weights)
    total = sum(weights[device] for device in vectors)
    worst = 0.0
    for i, after in enumerate(applied(algorithm)):
        terms = [weights[device] / total * p[i] for device, p in sent.items()]
        expected = before[i] - started_at[i] + sum(terms)  # what was merged before stays
        size = np.abs(expected).max() + sum(np.abs(t).max() for t in terms)
        worst = max(worst, float(np.abs(after - expected).max() / max(size, 1e-30)))
    return worst


def ready(rule: Rule, case: Case) -> tuple[Algorithm, int]:
    """Return the rule two rounds on (so Fed-SB's probe is done and B is not zero), and the next round."""
    algorithm = started(rule, case)
    for number in (1, 2):
        close_round(algorithm, received(algorithm, number, case.seed), case.weights)
    return algorithm, 3


# --- exactness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EXACT)
@settings(max_examples=25)
@given(case=cases())
def test_exact_rules_apply_the_mean_of_the_products(rule: Rule, case: Case) -> None:
    algorithm, number = ready(rule, case)
    for later in (number, number + 1):  # RoLoRA: a round of either factor
        vectors = received(algorithm, later, case.seed)
        assert error(algorithm, vectors, case.weights) < 1e-6


@settings(max_examples=25)
@given(case=cases())
def test_flexlora_is_exact_where_the_rank_holds_all(case: Case) -> None:
    ranks = tuple(1 + device % 2 for device in case.devices)
    shapes = [(pair.inputs, pair.outputs) for pair in case.layout.pairs]
    wide = Case(layout_of(shapes, sum(ranks)), case.weights, case.seed)
    algorithm = started(FlexLora, wide, ranks=(*ranks[:-1], sum(ranks)))
    vectors = received(algorithm, 1, case.seed)
    vectors[case.devices[-1]] *= wide.layout.within(ranks[-1])  # the last has room for all, uses its own
    assert error(algorithm, vectors, case.weights) < 1e-6


@settings(max_examples=25)
@given(case=cases(), ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_flora_is_exact_for_unlike_ranks(case: Case, ranks: list[int]) -> None:
    mine = tuple(min(rank, case.layout.rank) for rank in ranks)
    algorithm = started(Flora, case, ranks=mine)
    vectors = received(algorithm, 1, case.seed)
    assert error(algorithm, vectors, case.weights) < 1e-6
    full_rank = max(min(pair.inputs, pair.outputs) for pair in case.layout.pairs)
    stack = sum(algorithm.rank(device) for device in case.devices)
    assert algorithm.entries()[0].rank == min(stack, full_rank)


CASE = Case(layout_of([(12, 8), (6, 10)], 4), [30, 10, 20], 11)


def test_fedit_is_wrong_by_more_the_more_devices_drift_and_hetlora_is_wrong_too() -> None:
    errors: dict[Rule, list[float]] = {FedAvgLora: [], HetLora: []}
    for rule, found in errors.items():
        for drift in (0.1, 0.5, 1.0):
            algorithm, number = ready(rule, CASE)
            vectors = received(algorithm, number, CASE.seed, drift)
            found.append(error(algorithm, vectors, CASE.weights))
    assert 1e-4 < errors[FedAvgLora][0] < errors[FedAvgLora][1] < errors[FedAvgLora][2]
    assert min(errors[HetLora]) > 1e-4


# --- what each rule is ----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(case=cases())
def test_flexlora_gives_every_rank_the_best_of_its_rank(case: Case) -> None:
    ranks = tuple(range(case.layout.rank, 0, -1))
    algorithm = started(FlexLora, case, ranks=ranks)
    vectors = received(algorithm, 1, case.seed)
    total = sum(case.weights)
    close_round(algorithm, vectors, case.weights)
    for device in case.devices:
        rank = algorithm.rank(device)
        model = algorithm.models()[0] * case.layout.within(rank)  # what the round sends to this device
        for i, got in enumerate(products(model, case.layout)):
            sent = (case.weights[d] / total * products(v, case.layout)[i] for d, v in vectors.items())
            wanted = sum(sent)
            values = np.linalg.svd(wanted, compute_uv=False)
            best = np.linalg.norm(values[rank:])  # Eckart and Young
            assert abs(np.linalg.norm(got - wanted) - best) < 1e-5 * np.linalg.norm(values)


@pytest.mark.parametrize("rule", [FlexLora, HetLora])
def test_a_cohort_of_small_ranks_leaves_the_other_components_able_to_learn(rule: Rule) -> None:
    algorithm = started(rule, CASE, ranks=(4, 1))
    start = algorithm.models()[0].copy()
    vectors = received(algorithm, 1, CASE.seed)
    close_round(algorithm, {1: vectors[1]}, CASE.weights)  # the one of rank 1 alone
    for (a, _), (former, _) in zip(
        CASE.layout.factors(algorithm.models()[0]), CASE.layout.factors(start), strict=True
    ):
        np.testing.assert_array_equal(a[1:], former[1:])
    for got, sent in zip(applied(algorithm), products(vectors[1], CASE.layout), strict=True):
        np.testing.assert_allclose(got, sent, atol=1e-5)


@settings(max_examples=25)
@given(case=cases())
def test_hetlora_weighs_by_the_norm_of_the_products(case: Case) -> None:
    algorithm = started(HetLora, case)
    vectors = received(algorithm, 1, case.seed)
    norms = {}
    for device, vector in vectors.items():
        norms[device] = sum(np.linalg.norm(p) for p in products(vector, case.layout)) / case.layout.scale
        assert update_norm(vector, case.layout) == pytest.approx(norms[device], rel=1e-6)
    close_round(algorithm, vectors, case.weights)
    other = case.layout.part("other")
    for mask, weights in ((~other, norms), (other, dict(enumerate(case.weights)))):
        wanted = sum(weights[d] * v[mask].astype(float) for d, v in vectors.items()) / sum(weights.values())
        np.testing.assert_allclose(algorithm.models()[0][mask], wanted, rtol=1e-5, atol=1e-6)


def test_hetlora_takes_examples_where_every_product_is_zero() -> None:
    algorithms = [started(rule, CASE) for rule in (HetLora, FedAvgLora)]
    for algorithm in algorithms:
        vectors = received(algorithm, 1, CASE.seed)
        for vector in vectors.values():
            vector[CASE.layout.part("b")] = 0.0
        close_round(algorithm, vectors, CASE.weights)
    np.testing.assert_array_equal(algorithms[0].models(), algorithms[1].models())


@settings(max_examples=25)
@given(case=cases())
def test_fed_sb_probes_for_the_top_singular_vectors_then_starts_at_the_pretrained_model(case: Case) -> None:
    algorithm = started(FedSb, case)
    first = algorithm.models()[0].copy()
    assert algorithm.plan(1).probe and algorithm.plan(1).returns == "a+b" and not algorithm.entries()
    vectors = received(algorithm, 1, case.seed)
    close_round(algorithm, vectors, case.weights)
    (basis,) = algorithm.entries()
    assert (basis.kind, basis.rank, algorithm.plan(2).probe) == ("basis", case.layout.rank, False)
    others = case.layout.part("other")
    compact = algorithm.models()[0]
    assert compact.size == len(case.layout.pairs) * case.layout.rank**2 + others.sum()
    expanded = full(compact, algorithm)
    assert not any(product.any() for product in products(expanded, case.layout))
    np.testing.assert_array_equal(expanded[others], first[others])
    for i, (a, b) in enumerate(factors_at(case.layout, basis.vector, basis.rank)):
        w = sum(weight * products(vectors[d], case.layout)[i] for d, weight in enumerate(case.weights))
        values = np.linalg.svd(w, compute_uv=False)[: case.layout.rank]
        np.testing.assert_allclose((a @ a.T)[: len(values), : len(values)], np.eye(len(values)), atol=1e-5)
        core = np.diag(b.T.astype(float) @ w @ a.T)[: len(values)]
        np.testing.assert_allclose(core, values, atol=1e-5 * values[0])


def test_expand_lays_the_squares_out_by_pair_and_row() -> None:
    algorithm, _ = ready(FedSb, CASE)
    compact, basis = algorithm.models()[0], algorithm.entries()[0]
    expanded, r = expand(compact, basis.vector, CASE.layout), CASE.layout.rank
    for i, (a, b) in enumerate(factors_at(CASE.layout, basis.vector, basis.rank)):
        square = compact[i * r * r : (i + 1) * r * r].reshape(r, r).astype(np.float64)
        wanted = CASE.layout.scale * b.astype(float) @ square @ a
        np.testing.assert_allclose(products(expanded, CASE.layout)[i], wanted, atol=1e-5)


def test_plans() -> None:
    plans = {rule: [started(rule, CASE).plan(number) for number in (1, 2, 3)] for rule in ALL}
    assert [plan.returns for plan in plans[RoLora]] == ["b+other", "a+other", "b+other"]
    assert [plan.trains for plan in plans[RoLora]] == ["b+other", "a+other", "b+other"]
    assert {(plan.trains, plan.returns) for plan in plans[FfaLora]} == {("b+other", "b+other")}
    assert {(p.trains, p.returns, p.keeps) for p in plans[FedSaLora]} == {("a+b+other", "a+other", "b")}
    assert {plan.proximal for plan in plans[FedProx]} == {0.3}
    assert all(plan.proximal == 0.0 for rule in ALL if rule is not FedProx for plan in plans[rule])


@pytest.mark.parametrize(("rule", "part"), [(FfaLora, "a"), (FedSaLora, "b")])
@given(case=cases())
def test_a_factor_that_never_travels_never_changes(rule: Rule, part: str, case: Case) -> None:
    algorithm = started(rule, case)
    algorithm.vector[case.layout.part("b")] = 0.1  # no float32 is exactly that
    before = algorithm.models()[0].copy()
    for number in (1, 2):
        close_round(algorithm, received(algorithm, number, case.seed), case.weights)
    changed = before != algorithm.models()[0]
    assert not changed[case.layout.part(part)].any()
    assert changed[case.layout.part("b" if part == "a" else "a")].any()


def test_flora_starts_afresh_as_peft_does_and_by_a_key() -> None:
    one, two = started(Flora, CASE), started(Flora, CASE)
    seen = []
    for number in (1, 2):
        for algorithm in (one, two):
            close_round(algorithm, received(algorithm, number, CASE.seed), CASE.weights)
        np.testing.assert_array_equal(one.models(), two.models())
        for a, b in CASE.layout.factors(one.models()[0]):
            bound = a.shape[1] ** -0.5
            assert not b.any() and 0.8 * bound < np.abs(a).max() <= bound
        seen.append(one.models().copy())
    drawn = CASE.layout.part("a")
    assert (seen[0][:, drawn] != seen[1][:, drawn]).all()
    other = started(Flora, CASE, seed=6)
    close_round(other, received(other, 1, CASE.seed), CASE.weights)
    assert (other.models()[:, drawn] != seen[0][:, drawn]).all()


def test_fedex_broadcasts_a_residual_of_rank_k_minus_one_times_r_at_most_the_linears() -> None:
    for linears, wanted in (([(12, 10)], 8), ([(5, 7), (6, 9)], 6)):
        case = Case(layout_of(linears, 4), [3, 1, 2], 0)
        algorithm, _ = ready(FedExLora, case)
        assert [entry.rank for entry in algorithm.entries()] == [wanted, wanted]
        size = sum(wanted * (inputs + outputs) for inputs, outputs in linears)
        assert all(entry.vector.size == size for entry in algorithm.entries())


# --- laws of all rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", GLOBAL)
@settings(max_examples=20)
@given(case=cases(devices=1))
def test_one_device_is_the_identity(rule: Rule, case: Case) -> None:
    algorithm, number = ready(rule, case)
    vectors = received(algorithm, number, case.seed)
    start = products(full(algorithm.models()[0], algorithm), case.layout)
    moved = products(full(vectors[0], algorithm), case.layout)
    wanted = [w - p + q for w, p, q in zip(applied(algorithm), start, moved, strict=True)]
    close_round(algorithm, vectors, case.weights)
    for got, product in zip(applied(algorithm), wanted, strict=True):
        np.testing.assert_allclose(got, product, atol=1e-5 * max(1.0, np.abs(product).max()))
    if rule not in (Flora, FlexLora):  # those hand out other factors of the same product
        np.testing.assert_array_equal(algorithm.models()[0], vectors[0])


@pytest.mark.parametrize("rule", GLOBAL)
@settings(max_examples=20)
@given(case=cases(), data=st.data())
def test_the_order_of_the_devices_does_not_matter(rule: Rule, case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(case.devices))
    results = []
    for devices in (case.devices, order):
        algorithm, number = ready(rule, case)
        close_round(algorithm, received(algorithm, number, case.seed), case.weights, devices)
        results.append((applied(algorithm), full(algorithm.models()[0], algorithm)))
    other = case.layout.part("other")
    np.testing.assert_allclose(results[0][1][other], results[1][1][other], rtol=1e-5, atol=1e-6)
    for one, two in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1.0, np.abs(one).max()))


@pytest.mark.parametrize("rule", [rule for rule in GLOBAL if rule.unlike_ranks])
@settings(max_examples=20)
@given(case=cases(rank=2))
def test_padding_is_neutral_and_zero_components_stay_zero(rule: Rule, case: Case) -> None:
    rank = case.layout.rank
    shapes = [(pair.inputs, pair.outputs) for pair in case.layout.pairs]
    padded = Case(layout_of(shapes, rank + 2), case.weights, case.seed)
    narrow = started(rule, case)
    wide = started(rule, padded, ranks=(rank,))
    inside, outside = padded.layout.within(rank), ~padded.layout.within(rank)
    wide.vector = np.zeros(padded.layout.size, np.float32)
    wide.vector[inside] = narrow.vector
    sent = received(narrow, 1, case.seed)
    widened = {device: np.zeros(padded.layout.size, np.float32) for device in sent}
    for device, vector in sent.items():
        widened[device][inside] = vector
    close_round(narrow, sent, case.weights)
    close_round(wide, widened, case.weights)
    for one, two in zip(applied(narrow), applied(wide), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6 * max(1.0, np.abs(one).max()))
    if rule is Flora:  # its fresh A is cut by who sends it; B is zero everywhere
        outside = outside & padded.layout.part("b")
    assert not wide.models()[0][outside].any()


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("until", [0, 1, 2])
def test_a_resumed_rule_goes_on_identically(rule: Rule, until: int) -> None:
    ranks = (4, 2, 1) if rule.unlike_ranks else ()
    first = started(rule, CASE, ranks)
    for number in range(1, until + 1):
        close_round(first, received(first, number, CASE.seed), CASE.weights)
    file = io.BytesIO()
    np.savez(file, **first.state())  # type: ignore[arg-type]
    file.seek(0)
    second = started(rule, CASE, ranks)
    second.vector = np.zeros_like(second.vector)
    with np.load(file, allow_pickle=False) as arrays:
        second.load(dict(arrays))
    for number in range(until + 1, until + 4):
        assert first.plan(number) == second.plan(number)
        sent = received(second, number, CASE.seed)
        for device, vector in received(first, number, CASE.seed).items():
            np.testing.assert_array_equal(vector, sent[device])
        for algorithm in (first, second):
            close_round(algorithm, sent, CASE.weights)
    assert first.models().dtype == second.models().dtype == np.float32
    np.testing.assert_array_equal(first.models(), second.models())
    assert len(first.entries()) == len(second.entries())
    for one, two in zip(first.entries(), second.entries(), strict=True):
        assert (one.kind, one.rank) == (two.kind, two.rank)
        np.testing.assert_array_equal(one.vector, two.vector)


def test_local_devices_keep_their_own() -> None:
    algorithm = started(Local, CASE, ranks=(4, 2, 1))
    vectors = received(algorithm, 1, CASE.seed)
    close_round(algorithm, {2: vectors[2]}, CASE.weights)
    models, (row,) = algorithm.models(), algorithm.rows([2])
    np.testing.assert_array_equal(models[row], vectors[2])
    np.testing.assert_array_equal(models[algorithm.rows([0, 1])], np.stack([algorithm.vector] * 2))
