"""Which experiments a job consists of: a cell is a name and the configuration keys that it changes.

The case study of "Edge Large AI Models" (arXiv:2505.00321): LLM4CP federated over 1, 2, 5 and 10 edge
servers with 5 % of the data each, beside the same model and small networks trained alone on a shard,
the pooled upper bound, and classical predictors that need no training. The job ``compare`` puts strategies
of any one task beside each other, and beside that task's classical names. The job ``sweep`` has a cell for
every point of a product of axes and for every seed; a cell's name is its point, whatever the other points
are, so that a sweep may grow.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from fedlam_app.base.axes import EPSILON, MECHANISM, SEED, Point, points, read_axes, spelling, words
from fedlam_app.config import ConfigError, RunConfig, Scalar, defaults
from fedlam_app.rules_wireless import WITHOUT_RADIO


@dataclass(frozen=True)
class Cell:
    """One experiment: ``overrides`` on the run's configuration, or a classical predictor by name."""

    name: str  # 'fed-10', 'gru-local', 'central', 'fedit', 'ar'; unique within a seed
    label: str  # for tables and legends
    seed: int
    overrides: dict[str, Scalar] = field(default_factory=dict)
    classical: str = ""  # name of a predictor that is not trained, or empty
    axes: Point = field(default_factory=dict)  # of a sweep: its point, without the seed

    @property
    def key(self) -> str:
        """The name of this cell's state file."""
        return f"{self.name}-seed{self.seed}"


def cells_of(config: RunConfig) -> list[Cell]:
    """Return the cells of the configured job, in the order in which they run."""
    if config.job == "train":
        return [Cell(config.strategy, _train_label(config), config.seed)]
    if config.job == "compare":
        compare = config.compare
        return [
            _strategy(name, policy, seed)
            for seed in compare.seeds
            for name in compare.strategies
            for policy in (compare.policies if _chooses(name) else ()) or ("",)
        ]
    if config.job == "sweep":
        return _product(config)
    study = config.case_study
    return [cell for seed in study.seeds for cell in _of_seed(config, seed)]


def _train_label(config: RunConfig) -> str:
    if config.task == "channel-prediction":
        return f"{config.model.name}, {config.strategy}, {config.train.devices} servers"
    return f"{config.strategy}, {config.train.devices} devices"


def _chooses(name: str) -> bool:
    """Whether a row of the comparison has devices to choose from."""
    return name not in CLASSICAL_LABELS and name not in WITHOUT_RADIO


def _strategy(name: str, policy: str, seed: int) -> Cell:
    """A row of the comparison: a strategy on the run's own task and devices, or a classical name."""
    if name in CLASSICAL_LABELS:
        return Cell(name, CLASSICAL_LABELS[name], seed, {"seed": seed}, classical=name)
    overrides: dict[str, Scalar] = {"seed": seed, "strategy": name}
    if name == "fedavg-full":  # stands beside LoRA strategies with a tuning of its own
        overrides["model.tuning"] = "full"
    if policy:
        return Cell(f"{name}-{policy}", f"{name}, {policy}", seed, overrides | {"selection.policy": policy})
    return Cell(name, name, seed, overrides)


def _product(config: RunConfig) -> list[Cell]:
    """Return the cells of a sweep, seeds outermost; points that are one experiment are one cell."""
    axes = read_axes(config.sweep.over)
    privacy, mechanisms = config.privacy, axes.get(MECHANISM, (config.privacy.mechanism,))
    own = [key for key in axes if key.startswith("privacy.") and key != MECHANISM]
    if own and set(mechanisms) == {"none"}:
        raise ConfigError(
            f"'sweep.over' has the axis '{own[0]}', which changes nothing where 'privacy.mechanism' = 'none';"
            " the mechanism must be another"
        )
    if EPSILON in axes and privacy.device_epsilons:
        raise ConfigError(
            f"'sweep.over' has the axis '{EPSILON}', which changes nothing beside 'privacy.device-epsilons';"
            " that must be empty"
        )
    found: dict[str, Cell] = {}
    for point in points(axes):
        cell = _at(config, point)
        found.setdefault(cell.key, cell)
    return list(found.values())


def _at(config: RunConfig, point: Point) -> Cell:
    """Return the cell of one point; without privacy nothing else of the table ``privacy`` is an axis."""
    if point.get(MECHANISM) == "none":
        point = {k: v for k, v in point.items() if k == MECHANISM or not k.startswith("privacy.")}
    # One training each; so that every rule holds that holds for the job 'train'.
    overrides: dict[str, Scalar] = {"job": "train", SEED: config.seed}
    overrides |= {key: _scalar(key, value) for key, value in point.items()}
    if point.get("strategy") == "fedavg-full":
        overrides.setdefault("model.tuning", "full")  # as in a comparison
    axes = {key: spelling(value) for key, value in point.items() if key != SEED}
    axes = axes or {"strategy": config.strategy}  # seeds alone repeat one training
    seed = overrides[SEED]
    return Cell(_name(axes), words(axes), seed if isinstance(seed, int) else 0, overrides, axes=axes)


def _name(axes: Point) -> str:
    """Return a point as the name of a file: the same in whatever order the axes stand."""
    name = ",".join(f"{key}={axes[key]}" for key in sorted(axes))
    plain = re.sub(r"[^A-Za-z0-9.=,+-]", "_", name)
    if plain == name and len(name) <= 160:
        return name
    return f"{plain[:150]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _scalar(key: str, value: str) -> Scalar:
    """Return an axis' value as the kind of scalar that the key's default is; what is none stays, refused."""
    usual = defaults().get(key, "")
    if isinstance(usual, str):
        return value.replace("|", ",")
    if isinstance(usual, bool):
        return {"true": True, "false": False}.get(value, value)
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _of_seed(config: RunConfig, seed: int) -> list[Cell]:
    study, most = config.case_study, max(config.case_study.servers)
    own: dict[str, Scalar] = {"seed": seed}
    cells = [
        Cell(
            f"fed-{servers}",
            f"Federated LLM4CP, {servers} server{'s' if servers > 1 else ''}",
            seed,
            {**own, "train.devices": servers},
        )
        for servers in sorted(study.servers, reverse=True)
    ]
    for name in study.competitors:
        if name.startswith("central"):
            cells.append(_central(name, own, most, config))
        elif name.endswith("-local"):
            cells.append(_local(name.removesuffix("-local"), own, most, config))
        else:
            cells.append(Cell(name, CLASSICAL_LABELS[name], seed, own, classical=name))
    return cells


def _central(name: str, own: dict[str, Scalar], most: int, config: RunConfig) -> Cell:
    """All shards in one place, at the federation's sample budget: the same steps of joint batches.

    'central-small' spends that budget on many steps of single batches instead.
    """
    overrides: dict[str, Scalar] = {**own, "strategy": "central", "train.devices": most}
    if name == "central":
        return Cell(name, "Pooled central LLM4CP", int(own["seed"]), overrides)
    train = config.train
    rows = max(1, round(train.batch_rows / most))  # central batches are ``train.devices`` times this
    steps = round(train.local_steps * train.batch_rows / rows)
    overrides |= {"train.batch-rows": rows, "train.local-steps": steps}
    return Cell(name, "Pooled central LLM4CP, small batches", int(own["seed"]), overrides)


def _local(model: str, own: dict[str, Scalar], most: int, config: RunConfig) -> Cell:
    """Every shard alone. Ten models are ten evaluations, so they are scored at fewer rounds."""
    seldom = max(1, config.train.rounds // 2)
    overrides: dict[str, Scalar] = {
        **own,
        "strategy": "local",
        "train.devices": most,
        "train.evaluate-every": seldom,
    }
    if model != "llm4cp":
        overrides |= {"model.name": model, "model.anchor": "none"}
    return Cell(f"{model}-local", f"{model.upper()} local (mean over shards)", int(own["seed"]), overrides)


CLASSICAL_LABELS = {
    "repeat-last": "No prediction (repeat last)",
    "ar": "AR(10), forward-backward",
    "pad": "PAD (Prony, angle-delay)",
    "ridge": "Ridge on history and AR(10)",
    "wiener-ar": "Wiener denoising + AR",
    "majority": "Majority class",
    "linear-probe": "Linear probe on frozen features",
}
