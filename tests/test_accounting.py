"""The ledger against Opacus, dp-accounting and a table; kills, mutants, budgets that must not be passed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlam_app.privacy import accounting
from fedlam_app.privacy.accounting import (
    FRACTIONS,
    INTEGERS,
    ORDERS,
    BudgetSpent,
    Ledger,
    Release,
    epsilon_of,
    joint,
    rdp,
)

# q, sigma, steps, delta; epsilon at integer orders 2 to 256, and by PLD (dp-accounting)
TABLE = [
    (0.01, 1.0, 10000, 1e-5, 6.719402, 6.1877),
    (0.01, 1.1, 1000, 1e-5, 1.725291, 1.5154),
    (0.004, 1.1, 15000, 1e-5, 2.506367, 2.2955),
    (0.01, 4.0, 10000, 1e-5, 1.035490, 0.9470),
    (0.05, 1.0, 500, 1e-5, 8.432313, 7.5237),
    (0.1, 2.0, 300, 1e-4, 3.998173, 3.5965),
    (1.0, 1.0, 1, 1e-5, 4.752728, 4.3772),
    (0.001, 0.6, 3000, 1e-6, 3.904912, 2.5163),
    (0.2, 1.0, 50, 1e-3, 8.845072, 7.0658),
]
WHOLE = (ORDERS.round() == ORDERS) & (ORDERS <= 256)
rates = st.floats(1e-3, 0.9)
noises = st.floats(0.4, 20.0)


def step(number: int, **keys: float) -> Release:
    return Release(group=f"step {number}", digest=str(number), **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(("q", "z", "steps", "delta", "expected", "pld"), TABLE)
def test_the_table_is_reproduced(
    q: float, z: float, steps: int, delta: float, expected: float, pld: float
) -> None:
    at_integers = np.where(WHOLE, rdp(q, z) * steps, np.inf)
    assert epsilon_of(at_integers, delta) == pytest.approx(expected, abs=1e-6)
    assert pld <= epsilon_of(rdp(q, z) * steps, delta) <= expected + 1e-6


@pytest.mark.parametrize(("q", "z", "steps", "delta", "expected", "pld"), TABLE)
def test_dp_accounting_says_the_same(
    q: float, z: float, steps: int, delta: float, expected: float, pld: float
) -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    theirs = RdpAccountant().compose(event, steps).get_epsilon(delta)
    assert epsilon_of(rdp(q, z) * steps, delta) == pytest.approx(theirs, rel=0.015)


@settings(max_examples=15)
@given(rates, noises)
def test_every_order_is_that_of_opacus(q: float, z: float) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    ours = rdp(q, z)
    some = [*FRACTIONS[::7], *(int(a) for a in INTEGERS[::9])]
    places = [int(np.flatnonzero(a == ORDERS)[0]) for a in some]
    theirs = compute_rdp(q=q, noise_multiplier=z, steps=1, orders=some)
    np.testing.assert_allclose(ours[places], theirs, rtol=1e-9, atol=1e-11)


def test_prv_is_tighter_and_never_below_the_truth() -> None:
    for q, z, steps, delta, _, pld in (TABLE[1], TABLE[5]):
        ledger = Ledger(math.inf, delta)
        ledger.charge(step(1, q=q, z=z, steps=steps))
        assert pld - 1e-3 <= ledger.prv() <= pld + 0.012
        assert ledger.prv() <= ledger.epsilon


def test_a_prv_look_leaves_the_log_as_it_was() -> None:
    """Opacus hangs a handler on the root logger where it is imported first."""
    code = (
        "import logging; from fedlam_app.privacy.accounting import Ledger;"
        "Ledger(9.0, 1e-5, [(0.1, 2.0, 9)]).prv(); print(logging.getLogger().handlers)"
    )
    assert alone(code) == "[]"


def test_fifty_rounds_of_ten_steps_survive_a_kill(tmp_path: Path) -> None:
    """A process is killed in the middle of its spends; another goes on, and repeats the last round's name."""
    code = """
import os, sys
from pathlib import Path
from typing import Any
from clients.ledgers import Ledgers
from fedlam_app.config import parse
from fedlam_app.privacy.accounting import Release
books = Ledgers(parse({
    "job": "train", "task": "mixture", "privacy.mechanism": "dp-sgd", "privacy.target-epsilon": 9.0
}), Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 51):
    books.charge(3, Release(group=f"round {number}", digest=str(number), q=0.05, z=1.0, steps=10))
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
print(repr(books.of(3).epsilon))
"""
    root = Path(__file__).resolve().parents[1]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path), *words]
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=False, env={**os.environ}
        )

    assert run("1", "23").returncode == -9
    again = run("23", "0")  # round 23 was charged, and its bytes are sent again: nothing more is spent
    assert again.returncode == 0, again.stderr
    whole = Ledger(9.0, 1e-5)
    for number in range(1, 51):
        whole.charge(step(number, q=0.05, z=1.0, steps=10))
    assert float(again.stdout) == whole.epsilon == pytest.approx(8.297, abs=0.01)


def test_a_fresh_engine_a_round_would_say_less() -> None:
    """The mutant of Flower's own example: it reports what one round has cost."""
    fresh = Ledger(9.0, 1e-5)
    fresh.charge(step(1, q=0.05, z=1.0, steps=10))
    assert fresh.epsilon < 2.2  # and the truth is 8.297


def test_messages_of_one_batch_are_one_event() -> None:
    right, wrong = Ledger(math.inf, 1e-5), Ledger(math.inf, 1e-5)
    right.charge(step(1, q=0.1, z=joint(2.0, 1.0), steps=100))
    for number, z in enumerate((2.0, 1.0)):  # the mutant: two independent samples
        wrong.charge(step(number, q=0.1, z=z, steps=100))
    assert right.epsilon == pytest.approx(9.855, abs=0.04)  # dp-accounting, which bounds from above
    assert wrong.epsilon == pytest.approx(8.373, abs=0.01)


@given(st.lists(noises, min_size=1, max_size=5))
def test_a_joint_event_of_gaussians_is_their_composition(zs: list[float]) -> None:
    np.testing.assert_allclose(rdp(1.0, joint(*zs)), sum(rdp(1.0, z) for z in zs), rtol=1e-12)
    assert joint(*zs, math.inf) == pytest.approx(joint(*zs))


@settings(max_examples=25)
@given(st.floats(0.3, 10.0), rates, st.integers(1, 500), st.floats(0.0, 0.9))
def test_calibration_lands_just_below_the_target(target: float, q: float, steps: int, spent: float) -> None:
    ledger = Ledger(target, 1e-5)
    if spent > 0.05:  # some of the budget is gone already
        ledger.charge(step(0, q=q, z=Ledger(target * spent, 1e-5).calibrate(q, 20), steps=20))
    z = ledger.calibrate(q, steps)
    ledger.charge(step(1, q=q, z=z, steps=steps))
    assert ledger.epsilon <= target + 1e-9
    assert ledger.epsilon >= target - 0.01 or z == 0.05
    with pytest.raises(BudgetSpent, match="is spent and this release would make it"):
        ledger.charge(step(2, q=1.0, z=0.1))
    assert ledger.epsilon <= target + 1e-9  # a refusal spends nothing


@given(st.lists(st.tuples(rates, noises), min_size=1, max_size=8))
def test_whatever_is_asked_the_budget_holds(asked: list[tuple[float, float]]) -> None:
    ledger = Ledger(1.0, 1e-5)
    for number, (q, z) in enumerate(asked):
        before = ledger.to_json()
        try:
            ledger.charge(step(number, q=q, z=z))
        except BudgetSpent:
            assert ledger.to_json() == before
    assert ledger.epsilon <= 1.0 + 1e-9
    again = Ledger.from_json(ledger.to_json())
    assert again.epsilon == pytest.approx(ledger.epsilon, abs=1e-12) and again.to_json() == ledger.to_json()


def test_a_group_is_charged_once_at_its_least_noise() -> None:
    ledger = Ledger(math.inf, 1e-5)
    for part in range(5):  # five batches of one epoch: no sample is in two
        ledger.charge(Release(group="epoch 1", part=str(part), digest=f"a{part}", z=2.0))
    assert ledger.events == [(1.0, 2.0, 1)]
    ledger.charge(Release(group="epoch 1", part="2", digest="a2", z=2.0))  # the same bytes again
    assert ledger.events == [(1.0, 2.0, 1)]
    ledger.charge(Release(group="epoch 1", part="5", digest="a5", z=1.0))  # a batch with less noise
    np.testing.assert_allclose(ledger._rdp, rdp(1.0, 1.0))
    ledger.charge(Release(group="epoch 1", part="2", digest="other", z=2.0))  # other bytes about batch 2
    np.testing.assert_allclose(ledger._rdp, rdp(1.0, 1.0) + rdp(1.0, 2.0))


def test_pure_epsilons_add_up() -> None:
    ledger = Ledger(3.0, 1e-5)
    ledger.charge(Release(group="labels", pure=1.0))
    ledger.charge(Release(group="labels", pure=1.0))  # once for all
    assert ledger.epsilon == 1.0
    z = ledger.calibrate(1.0, 1)
    ledger.charge(step(1, z=z))
    assert 2.99 <= ledger.epsilon <= 3.0
    with pytest.raises(BudgetSpent):
        ledger.charge(Release(group="labels again", pure=0.5))


def test_no_noise_is_no_privacy() -> None:
    ledger = Ledger(math.inf, 1e-5)
    assert ledger.calibrate(0.1, 100) == 0.0
    ledger.charge(step(1, z=0.0))
    assert math.isinf(ledger.epsilon)
    with pytest.raises(BudgetSpent):
        Ledger(100.0, 1e-5).charge(step(1, z=0.0))


@pytest.mark.parametrize(
    "asked",
    [{"steps": -5}, {"steps": 0}, {"z": -1.0}, {"z": math.nan}, {"q": 1.5}, {"q": -0.1}, {"pure": -1.0}],
)
def test_nothing_gives_a_budget_back(asked: dict[str, Any]) -> None:
    """Steps and noise come from the server."""
    with pytest.raises(ValueError, match="no release has"):
        Release(group="a", **{"z": 1.0, "q": 0.1, **asked})
    assert math.isinf(Ledger(1.0, 1e-5).after(Release(group="a", z=1e-9, q=0.1)))  # nor takes all memory


def test_small_epsilons_can_be_told() -> None:
    """Opacus' own orders end at 63, and cannot report less than 0.103."""
    assert Ledger(0.05, 1e-5).calibrate(0.1, 100) < 100.0


def test_a_query_is_quick_after_ten_thousand_steps() -> None:
    ledger = Ledger(math.inf, 1e-5)
    for number in range(10_000):
        ledger.charge(step(number, q=0.01, z=1.0 + (number % 7) / 10))
    started = time.process_time()
    for _ in range(10):
        assert ledger.epsilon > 0.0
    assert time.process_time() - started < 0.1
    assert Ledger.from_json(ledger.to_json()).epsilon == pytest.approx(ledger.epsilon, rel=1e-9)


def test_a_broken_book_is_named() -> None:
    for text in ("", "[]", '{"budget": 1}', json.dumps({"events": [[1, 2]]})):
        with pytest.raises(ValueError, match="no privacy ledger"):
            Ledger.from_json(text)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from fedlam_app.privacy.accounting import Ledger;"
        "Ledger(1.0, 1e-5).calibrate(0.1, 9); print('torch' in sys.modules)"
    )
    assert alone(code) == "False"


def alone(code: str) -> str:
    """Return what a fresh process prints."""
    command, root = [sys.executable, "-c", code], Path(accounting.__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
