"""Noise and channels: the formulas against what is drawn and what runs, and what schedules are worth.

    python -m benchmarks.privacy_channel

Simulated: y = h a (x + n) + w of half a million entries on one band, and the sum of ten devices over the air.
Running: a split run whose Jacobians travel uncoded, in this process, with all that devices and server really
do. Worst cases: 1,000 Rayleigh draws of links over four decades of mean SNR, as a receiver has them that is
11 dB better. Schedules: late weights of rho = 0.9 over 20 rounds; and for channels the distortions that
Rayleigh fading makes of them, known beforehand and causally, over 2,000 draws of 20 rounds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import Figure, write_result
from fedlam_app.base.keys import rng
from fedlam_app.config import Scalar
from fedlam_app.privacy import channel
from fedlam_app.privacy.accounting import Ledger, epsilon_of, rdp
from fedlam_app.privacy.schedule import by_channel, even_share, late_weights, rescaled, variances

SEED, ENTRIES, DRAWS = 7, 500_000, 1000
FIGURE_DB, MARGIN_DB, Z = 8.0, 3.0, 2.0
ROUNDS, RHO = 20, 0.9


def simulated() -> list[Figure]:
    """Return how far the noise of simulated links is from the formulas."""
    draw, worst_one, worst_sum = rng(SEED, "links"), 0.0, 0.0
    for gain in (0.1, 1.0, 30.0):
        sent = channel.orthogonal(gain, 1.0, channel.REAL_SHARE, 1.0 / 384.0, Z**2)
        h, a, s = gain**0.5, float(sent.amplitude) ** 0.5, float(sent.artificial) ** 0.5
        x = draw.standard_normal(ENTRIES) / 384.0**0.5
        w = channel.REAL_SHARE**0.5 * draw.standard_normal(ENTRIES)
        off = (h * a * (x + s * draw.standard_normal(ENTRIES)) + w) / (h * a) - x
        wanted = float(channel.received(gain, channel.REAL_SHARE, sent.amplitude, sent.artificial))
        worst_one = max(worst_one, abs(float(off.std()) / wanted**0.5 - 1.0))
    for power in (0.1, 1.0, 10.0, 100.0):  # one example: K = 10, |h| = 0.192, S = 8, d = 1000
        sent = channel.together(np.full(10, 0.192**2), power, 1.0, 0.064, Z**2)
        c, s = float(sent.amplitude) ** 0.5, float(sent.artificial) ** 0.5
        own = s * draw.standard_normal((10, ENTRIES // 10)).sum(axis=0)
        off = own + draw.standard_normal(ENTRIES // 10) / c
        wanted = 10.0 * float(sent.artificial) + 1.0 / float(sent.amplitude)
        worst_sum = max(worst_sum, abs(float(off.std()) / wanted**0.5 - 1.0))
    return [
        Figure(
            "privacy", "sigma on bands of their own, simulated, off the formula", worst_one, "", "<= 0.02"
        ),
        Figure("privacy", "sigma over the air, simulated, off the formula", worst_sum, "", "<= 0.02"),
    ]


def worst_cases() -> list[Figure]:
    """Return in how many of 1,000 fading draws the noise is below its target, and the largest power."""
    draw = rng(SEED, "rayleigh")
    mean = 10.0 ** draw.uniform(-1.0, 3.0, DRAWS)
    snr, signal = mean * draw.exponential(size=DRAWS), 1.0 / 384.0
    gain = channel.worst(snr, mean, FIGURE_DB, MARGIN_DB)
    sent = channel.orthogonal(gain, 1.0, channel.REAL_SHARE, signal, Z**2)
    there = channel.received(gain, channel.REAL_SHARE, sent.amplitude, sent.artificial)
    below = int((np.sqrt(there) < Z * (1.0 - 1e-12)).sum())
    power = float(channel.power(sent.amplitude, sent.artificial, signal).max())
    naive = channel.orthogonal(snr, 1.0, channel.REAL_SHARE, signal, Z**2)
    short = channel.received(gain, channel.REAL_SHARE, naive.amplitude, naive.artificial)
    missed = float((np.sqrt(short) < Z).mean())
    free = 1.0 - float(np.sqrt(sent.artificial).mean()) / Z
    sums = [channel.together(snr[i : i + 10], 1.0, 0.05, signal, Z**2) for i in range(0, DRAWS, 10)]
    totals = np.array([10.0 * float(one.artificial) + 0.05 / float(one.amplitude) for one in sums])
    loudest = [
        float(channel.power(float(one.amplitude) / snr[i * 10 : i * 10 + 10], one.artificial, signal).max())
        for i, one in enumerate(sums)
    ]
    return [
        Figure("privacy", "worst-case draws below z = 2, of 1000", below, "", "== 0"),
        Figure("privacy", "largest power over the limit's", power, "", "<= 1.000000001"),
        Figure(
            "privacy", "sums over the air below z = 2, of 100", int((totals < 3.999999).sum()), "", "== 0"
        ),
        Figure("privacy", "largest power over the air", max(loudest), "", "<= 1.000000001"),
        Figure("privacy", "draws below z = 2 where the estimate is trusted", missed, "", ">= 0.9"),
        Figure("privacy", "artificial noise that the worst case saves", free, ""),
    ]


def schedules() -> list[Figure]:
    """Return what schedules gain over even spending."""
    weights = late_weights(ROUNDS, RHO)
    v = variances(weights, float(ROUNDS))
    late = float((weights * v).sum() / weights.sum())
    factors = rescaled(np.sqrt(v), 0.05, 1.2, 10, 1e-5)
    even = epsilon_of(rdp(0.05, 1.2) * ROUNDS * 10, 1e-5)
    book = Ledger(np.inf, 1e-5, events=[(0.05, 1.2 * f, 10) for f in factors.tolist()])
    draw = rng(SEED, "schedules")
    known, causal, least = [], [], np.inf
    for _ in range(2000):
        d = 1.0 / (draw.exponential(size=ROUNDS) + 0.1)
        flat = float((1.0 / (1.0 + d)).sum())
        known.append(_reached(by_channel(d, float(ROUNDS)), d) / flat)
        causal.append(_reached(_causal(1.0 / d), d) / flat)
        least = min(least, known[-1])
    within = float(book.epsilon - even)
    return [
        Figure("privacy", "late rounds, weighted noise over that of even ones", late, "", "<= 0.918"),
        Figure("privacy", "sampled late plan, epsilon over the even one's", within, "", "<= 0.000000001"),
        Figure("privacy", "sampled late plan, epsilon below the even one's", -within, "", "<= 0.01"),
        Figure("privacy", "channels known beforehand, least gain over even", least, "", ">= 1"),
        Figure(
            "privacy", "channels known beforehand, mean gain over even", float(np.mean(known)), "", ">= 1"
        ),
        Figure("privacy", "channels as they come, mean gain over even", float(np.mean(causal)), "", ">= 1"),
    ]


def running() -> list[Figure]:
    """Return how far the noise of runs is from the formulas, on tiny models and made texts."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAM_CACHE"] = os.environ["FEDLAM_DEVICES"] = folder
        one, spent, said = _uncoded(Path(folder))
    added, gone = said["z_artificial"] / said["z_asked"], abs(one - 1.0)
    return [
        Figure("privacy", "sigma of the link of a split run, off the formula", gone, "", "<= 0.02"),
        Figure("privacy", "epsilon that the run was charged, of 8", spent, "", "<= 8"),
        Figure("privacy", "noise that devices add, over z", added, "", "<= 1"),
        Figure("privacy", "noise at the receiver, over z", said["z_effective"] / said["z_asked"], "", ">= 1"),
    ]


def _uncoded(folder: Path) -> tuple[float, float, dict[str, float]]:
    """Run six rounds; return the std of the received noise over the formula's, epsilon and what was said."""
    from fedlam_app.client_app import app
    from fedlam_app.grid import InProcessGrid
    from tests.fleet_runs import federation_of
    from tests.tiny import tiny_text_run

    flat: dict[str, Scalar] = tiny_text_run(folder) | {
        "results": str(folder / "run"),
        "strategy": "fedsgd-lora",
        "split.heads": "frozen",
        "wire.jacobian": "fp32",
        "fleet.profiles": "mixed",
        "fleet.on-share": 1.0,
        "wireless.radius-m": 150.0,
        "wireless.tx-power-dbm": -5.0,
        "wireless.transport": "analog",
        "selection.policy": "random",
        "privacy.mechanism": "jacobian",
        "privacy.count-channel-noise": True,
        "train.rounds": 6,
        "federation.supernodes": 1,
    }
    federation: Any = federation_of(flat)
    receiver, found = federation.hands.receiver, []
    heard = receiver.rows

    def listened(device: int, step: int, rows: NDArray[Any]) -> NDArray[Any]:
        got = heard(device, step, rows)
        std = receiver.turn.receiver[receiver.turn.ids.index(device)] / len(rows)
        found.append(((got - rows) / std).astype(np.float64).ravel())
        return got

    receiver.rows = listened
    grid = InProcessGrid(app, 1, flat)
    for number in range(1, 7):
        federation.train_round(grid, number)
    spent = max(Ledger.from_json(text).epsilon for text in federation.ledgers.values())
    return float(np.concatenate(found).std()), spent, federation.hands.participation.summary()


def _reached(p: NDArray[np.float64], d: NDArray[np.float64]) -> float:
    """Return sum_t 1 / (v_t + D_t) at v_t = 1 / p_t."""
    return float((p / (1.0 + p * d)).sum())


def _causal(quality: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what each round gets that knows those before it."""
    left, found = float(len(quality)), []
    for t, now in enumerate(quality.tolist()):
        found.append(even_share(left, len(quality) - t, now, float(quality[: t + 1].mean())))
        left -= found[-1]
    return np.array(found)


def main() -> int:
    """Measure, write ``results/privacy_channel.json``; 0 where every bound holds."""
    figures = [figure for part in (simulated, worst_cases, schedules, running) for figure in part()]
    for figure in figures:
        print(f"{figure.name}: {figure.value:.6g} {figure.unit} {figure.bound}")
    write_result("privacy_channel", figures, seed=SEED)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
