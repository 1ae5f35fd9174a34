"""Selection policies written plainly: loops over devices, in double precision, with the same draws.

Each function takes the configuration, the state of a round, the generator, what the policy remembers (its
``state()`` before the choice) and N, and returns the places (ascending) and the weights, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedlam_app.tables.wireless import SelectionConfig
from strategies.selection import POLICIES
from strategies.selection.base import Outcome, RoundState

Memory = Mapping[str, np.ndarray]
Chosen = tuple[list[int], list[float] | None]
Reference = Callable[[SelectionConfig, RoundState, np.random.Generator, Memory, int], Chosen]


def largest(values: Sequence[float], count: int) -> list[int]:
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    return sorted(order[:count])


def drawn_by(weights: Sequence[float], count: int, draw: np.random.Generator) -> list[int]:
    if count >= len(weights):
        return list(range(len(weights)))
    clocks = draw.standard_exponential(len(weights), np.float32).tolist()
    return largest([weight / clock for weight, clock in zip(weights, clocks, strict=True)], count)


def evenly(among: int, count: int, draw: np.random.Generator) -> list[int]:
    if count >= among:
        return list(range(among))
    return sorted(draw.choice(among, count, replace=False, shuffle=False).tolist())


def uniform(_: SelectionConfig, s: RoundState, draw: np.random.Generator, __: Memory, ___: int) -> Chosen:
    return evenly(len(s), s.wanted, draw), None


def best_channel(_: SelectionConfig, s: RoundState, __: object, ___: Memory, ____: int) -> Chosen:
    return largest(s.gain_hz.tolist(), s.wanted), None


def proportional_fair(
    _: SelectionConfig, s: RoundState, draw: np.random.Generator, memory: Memory, __: int
) -> Chosen:
    scores = []
    for place, k in enumerate(s.ids.tolist()):
        rate = float(s.bits[place]) / float(s.upload_s[place])
        mean = float(memory["mean_bps"][k])
        scores.append(1.0 if mean == 0.0 else rate / mean)
    if len(scores) <= s.wanted:
        return list(range(len(scores))), None
    last = sorted(scores, reverse=True)[s.wanted - 1]
    sure = [place for place, score in enumerate(scores) if score > last * 1.0001]
    level = [place for place, score in enumerate(scores) if last * 0.9999 <= score <= last * 1.0001]
    return sorted(sure + [level[i] for i in evenly(len(level), s.wanted - len(sure), draw)]), None


def age(config: SelectionConfig, s: RoundState, _: object, __: Memory, ___: int) -> Chosen:
    scores = []
    for place in range(len(s)):
        x, alpha = s.number - int(s.last[place]), config.fairness
        worth = math.log(1 + x) if alpha == 1.0 else ((1 + x) ** (1 - alpha) - 1) / (1 - alpha)
        scores.append(worth * float(s.bits[place]) / float(s.upload_s[place]))
    return largest(scores, s.wanted), None


def update_aware(config: SelectionConfig, s: RoundState, _: object, __: Memory, ___: int) -> Chosen:
    best = largest(s.gain_hz.tolist(), math.ceil(config.candidates * s.wanted))
    return [best[i] for i in largest([float(s.norm[place]) for place in best], s.wanted)], None


def power_of_choice(_: SelectionConfig, s: RoundState, __: object, ___: Memory, ____: int) -> Chosen:
    return largest(s.loss.tolist(), s.wanted), None


def power_of_choice_stale(
    config: SelectionConfig, s: RoundState, draw: np.random.Generator, _: Memory, __: int
) -> Chosen:
    pool = drawn_by(s.examples.tolist(), math.ceil(config.candidates * s.wanted), draw)
    return [pool[i] for i in largest([float(s.loss[place]) for place in pool], s.wanted)], None


def fedcs(config: SelectionConfig, s: RoundState, _: object, __: Memory, ___: int) -> Chosen:
    upload, ready = [], []
    for place in range(len(s)):
        x = float(s.gain_hz[place]) / s.band_hz
        gain = math.log(1 + s.wanted * x) / (s.wanted * math.log(1 + x))
        upload.append(float(s.upload_s[place]) * gain)
        ready.append(float(s.fixed_s[place]))
    left, chosen, theta = set(range(len(s))), [], 0.0
    while left and len(chosen) < s.wanted:
        cost = {k: max(upload[k], upload[k] + ready[k] - theta) for k in left}
        best = min(left, key=lambda k: (cost[k], upload[k] + ready[k], k))
        end = theta + cost[best]
        if end >= config.deadline_s and (chosen or end == math.inf):
            break
        left.remove(best)
        chosen.append(best)
        theta = end
    return sorted(chosen), None


def tifl(
    config: SelectionConfig, s: RoundState, draw: np.random.Generator, memory: Memory, devices: int
) -> Chosen:
    count = min(config.tiers, devices)
    latency, tier = memory["latency_s"].astype(float).tolist(), memory["tier"].tolist()
    edges, credits = memory["edges_s"].tolist(), memory["credits"].tolist()
    profiled = int(memory["counts"][0])
    due = profiled == 0 or (config.reprofile and s.number - profiled >= config.reprofile)
    share = 1.0 - (1.0 - 1.0 / config.memory) ** config.reprofile
    for place, k in enumerate(s.ids.tolist()):
        time_s = min(float(s.fixed_s[place] + s.upload_s[place]), 1e9)
        if latency[k] == 0.0:
            latency[k] = time_s
            tier[k] = sum(edge < time_s for edge in edges)
        elif due:
            latency[k] = float(np.float32(latency[k] + share * (time_s - latency[k])))  # as it is kept
    if due and len(s):
        known = sorted(value for value in latency if value > 0.0)
        edges = [known[max(len(known) * t // count, 1) - 1] for t in range(1, count)]
        tier = [sum(edge < value for edge in edges) if value > 0.0 else -1 for value in latency]
    if len(s) <= s.wanted:
        return list(range(len(s))), None
    members: list[list[int]] = [[] for _ in range(count)]
    for place, k in enumerate(s.ids.tolist()):
        members[tier[k]].append(place)
    if not any(credits[t] for t in range(count) if members[t]):
        means = []
        for t in range(count):
            own = [latency[k] for k in range(devices) if tier[k] == t]
            means.append(sum(own) / len(own) if own else math.inf)
        credits = [max(round(20 * min(means) / mean), 1) for mean in means]
    chances = [float(memory["chances"][t]) if members[t] and credits[t] else 0.0 for t in range(count)]
    point, drawn = draw.random() * sum(chances), 0
    while point >= chances[drawn]:
        point -= chances[drawn]
        drawn += 1
    chosen: list[int] = []
    for t in [*range(drawn, -1, -1), *range(drawn + 1, count)]:
        if len(chosen) < s.wanted and members[t]:
            chosen += [members[t][i] for i in evenly(len(members[t]), s.wanted - len(chosen), draw)]
    return sorted(chosen), None


def oort(config: SelectionConfig, s: RoundState, draw: np.random.Generator, memory: Memory, _: int) -> Chosen:
    count = len(s)
    if count <= s.wanted:
        return list(range(count)), None
    _, eps, percentile = memory["pace"].tolist()
    eps = max(0.98 * eps, 0.3)
    took = [
        float(memory["duration_s"][k]) or float(s.fixed_s[place] + s.upload_s[place])
        for place, k in enumerate(s.ids.tolist())
    ]
    limit = sorted(took)[min(int(count * percentile / 100.0), count - 1)]
    ratios = [0.0 if t == math.inf else min(limit / t, 1.0) for t in took]  # who never finishes is no use
    damp = [ratio**config.penalty for ratio in ratios]
    known = [place for place in range(count) if s.loss[place] < math.inf]
    unknown = [place for place in range(count) if s.loss[place] == math.inf]
    exploit = min(s.wanted - min(round(eps * s.wanted), len(unknown)), len(known))
    chosen = []
    if exploit:
        utility = [float(s.examples[place]) * float(s.loss[place]) for place in known]
        high = sorted(utility)[math.ceil(0.95 * len(known)) - 1]
        low = min(utility)
        scores = []
        for place, value in zip(known, utility, strict=True):
            score = (min(value, high) - low) / (high - low) if high > low else 0.0
            score += math.sqrt(0.1 * math.log(s.number) / max(int(s.last[place]), 1))
            scores.append(score * damp[place])
        cut = 0.95 * sorted(scores, reverse=True)[exploit - 1]
        pool = [i for i, score in enumerate(scores) if score >= cut]
        chosen += [known[pool[i]] for i in drawn_by([scores[i] for i in pool], exploit, draw)]
    explore = s.wanted - exploit
    sizes = [float(s.examples[place]) * damp[place] for place in unknown]
    pool = largest(sizes, 5 * explore)
    chosen += [unknown[pool[i]] for i in drawn_by([sizes[i] for i in pool], explore, draw)]
    return sorted(chosen), None


def importance(
    config: SelectionConfig, s: RoundState, draw: np.random.Generator, _: Memory, devices: int
) -> Chosen:
    known = [float(norm) for norm in s.norm if norm < math.inf]
    top = max(known, default=0.0) or 1.0
    if max(known, default=0.0) == 0.0:
        norms = [1.0] * len(s)
    else:
        norms = [top if norm == math.inf else max(float(norm), 0.01 * top) for norm in s.norm]
    sizes = [float(n) * norm for n, norm in zip(s.examples, norms, strict=True)]
    times = [float(f + u) for f, u in zip(s.fixed_s, s.upload_s, strict=True)]
    alive = [k for k in range(len(s)) if sizes[k] > 0.0 and times[k] < math.inf]
    if len(s) <= s.wanted:
        alive = list(range(len(s)))
    if len(alive) <= s.wanted:
        return alive, [1.0 / devices] * len(alive)
    rho = min(config.rho, 1.0 - 1e-6)
    u = [sizes[k] / sum(sizes[j] for j in alive) for k in alive]
    t = [times[k] / (sum(times[j] for j in alive) / len(alive)) for k in alive]

    def p_of(multiplier: float) -> list[float]:
        return [x * math.sqrt((1 - rho) / (rho * y + multiplier)) for x, y in zip(u, t, strict=True)]

    low, high = -rho * min(t), 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle <= -rho * min(t) or sum(p_of(middle)) > 1.0:
            low = middle
        else:
            high = middle
    p = p_of(high)
    certain: set[int] = set()
    while True:
        left = sum(p[i] for i in range(len(p)) if i not in certain)
        tau = (s.wanted - len(certain)) / left
        more = {i for i in range(len(p)) if i not in certain and tau * p[i] > 1.0}
        if not more:
            break
        certain |= more
    chance = [1.0 if i in certain else tau * p[i] for i in range(len(p))]
    point, end, taken = draw.random(), 0.0, sorted(certain)
    for i in range(len(p)):
        if i not in certain:
            end += chance[i]
            if end > point:
                taken.append(i)
                point += 1.0
    taken.sort()
    return [alive[i] for i in taken], [1.0 / (devices * chance[i]) for i in taken]


REFERENCES: dict[str, Reference] = {
    "random": uniform,
    "best-channel": best_channel,
    "proportional-fair": proportional_fair,
    "fedcs": fedcs,
    "tifl": tifl,
    "oort": oort,
    "power-of-choice": power_of_choice,
    "power-of-choice-stale": power_of_choice_stale,
    "importance": importance,
    "age": age,
    "update-aware": update_aware,
}


def case(seed: int, number: int, devices: int = 24) -> RoundState:
    """Return a small random state: 0 to 20 devices, some alike, some never heard, some that never finish."""
    draw = np.random.default_rng([seed, number])
    count, wanted = int(draw.integers(0, 21)), int(draw.integers(1, 8))
    rows = draw.integers(0, max(count, 1), count) if draw.random() < 0.4 else np.arange(count)
    heard = draw.random(count) < draw.choice([0.0, 0.5, 1.0])

    def floats(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[rows]

    fixed = np.where(draw.random(count) < 0.05, np.inf, draw.lognormal(2.0, 1.0, count))
    last = np.where(heard, draw.integers(1, max(number, 2), count), 0)[rows]
    return RoundState(
        number=number,
        now_s=60.0 * number,
        devices=devices,
        wanted=wanted,
        band_hz=20e6,
        ids=np.sort(draw.choice(devices, count, replace=False)),
        gain_hz=floats(10.0 ** draw.uniform(5.0, 9.0, count)),
        fixed_s=floats(fixed),
        upload_s=floats(draw.lognormal(2.0, 1.0, count)),
        bits=np.full(count, 1.28e7, np.float32),
        energy_j=floats(draw.lognormal(0.0, 1.0, count)),
        examples=floats(np.where(draw.random(count) < 0.03, 0.0, draw.integers(1, 900, count))),
        loss=floats(np.where(heard, draw.exponential(1.0, count), np.inf)),
        norm=floats(np.where(heard, draw.exponential(1.0, count), np.inf)),
        last=last.astype(np.int32),
        count=(last > 0).astype(np.int32),
    )


def outcome(state: RoundState, places: np.ndarray, draw: np.random.Generator) -> Outcome:
    """Return what a round with these devices may have come to: nine in ten arrive."""
    count = len(places)
    arrived = draw.random(count) < 0.9
    time_s = np.minimum(state.time_s[places].astype(np.float64), 1e4) * draw.lognormal(0.0, 0.1, count)
    return Outcome(
        number=state.number,
        ids=state.ids[places],
        arrived=arrived,
        time_s=time_s,
        energy_j=draw.exponential(1.0, count),
        loss=np.where(arrived, draw.exponential(1.0, count), np.nan),
        norm=np.where(arrived, draw.exponential(1.0, count), np.nan),
        examples=state.examples[places].astype(np.float64),
        round_s=float(time_s.max(initial=0.0)),
    )


def agree(name: str, config: SelectionConfig, seed: int, rounds: int = 3, devices: int = 24) -> bool:
    """Whether a policy chooses as its reference does, over some rounds of one random case."""
    policy = POLICIES[name](config, devices, seed)
    for number in range(1, rounds + 1):
        state = case(seed, number, devices)
        memory = policy.state()
        key = [seed, number, 1]
        found = policy.select(state, np.random.default_rng(key))
        wanted, weights = REFERENCES[name](config, state, np.random.default_rng(key), memory, devices)
        if sorted(found.places.tolist()) != wanted or (found.weights is None) != (weights is None):
            return False
        if weights is not None and not np.allclose(found.weights, weights, rtol=1e-4, atol=0.0):
            return False
        policy.feedback(outcome(state, found.places, np.random.default_rng([seed, number, 2])))
    return True
