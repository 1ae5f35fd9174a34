"""What only the registries and the user's files know of a run: refused here, before anything starts.

``fedlam run`` asks before it submits, and the ServerApp asks again, for a plain ``flwr run`` comes past the
command line. Every experiment of a job is checked, with the strategy that it runs under.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedlam_app import rules_privacy, rules_split, rules_wireless
from fedlam_app.base.registry import pick
from fedlam_app.config import CLASSICAL, ConfigError, RunConfig, parse, to_flat
from fedlam_app.experiments.cells import Cell, cells_of
from fedlam_app.rules import MIXTURE, TEXT_TASKS, about_channels, has_backbone, without_backbone
from fedlam_app.rules_wireless import has_fleet

BASELINES = {
    "channel-prediction": CLASSICAL,
    "text-classification": ("majority", "linear-probe"),
    "language-modelling": ("majority",),
    "mixture": ("majority", "linear-probe"),
}
LORA_BY_NAME = ("fedit",)  # the same rule as 'fedavg-lora', which may train layer norms too
NO_COHORT = ("local", "central")  # each device alone, or one that has everything


def check(config: RunConfig) -> None:
    """Raise ``ConfigError``, in one sentence, where ``config`` names or combines what cannot run."""
    from fedlam_app.tasks import TASKS
    from strategies import ALGORITHMS
    from strategies.selection import POLICIES

    try:
        pick(TASKS, config.task, "task")
        _names(config)
        for name in config.compare.policies:
            pick(POLICIES, name, "policy in 'compare.policies':")
        if config.job == "compare":
            known = {**ALGORITHMS, **dict.fromkeys(BASELINES.get(config.task, ()))}
            for name in config.compare.strategies:
                pick(known, name, "strategy in 'compare.strategies':")
        if config.job == "case-study":
            for sentence in _of_the_case_study(config):
                raise ConfigError(sentence)
        for cell in cells_of(config):
            _check_cell(config, cell)
        _weights(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_files(config: RunConfig) -> None:
    """Read the user's data once, so that what is damaged, missing or too little is refused before Ray."""
    read: list[tuple[object, ...]] = []
    for own in _experiments(config) if config.job == "sweep" else (config,):
        data = (own.seed, own.data, own.text, own.mixture, own.fleet, own.train.devices)
        if data not in read:
            read.append(data)
            _check_files(own)


def _check_files(config: RunConfig) -> None:
    try:
        if config.task in TEXT_TASKS:
            _texts(config)
        elif about_channels(config) and (config.data.source != "sionna" or config.data.test_source):
            from fedlam_app.data.sources import check_files as channels

            channels(config.data, config.seed)
        _traces(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def warnings(config: RunConfig) -> list[str]:
    """Return what must be said aloud before a run starts."""
    if config.wire.embedding == "token-ids" and any(map(_is_split, _experiments(config))):
        return ["wire.embedding = 'token-ids': the server sees every text; privacy: none"]
    return []


def promises(config: RunConfig) -> list[str]:
    """Return what the experiments of a job promise of privacy, each promise once."""
    from fedlam_app.privacy.statement import statement

    budgets: dict[str, list[str]] = {}  # what differs in the budget alone is said once
    for promise in filter(None, map(statement, _experiments(config))):
        budget, _, rest = promise.text().partition("\n")
        said = budgets.setdefault(rest, [])
        said += [] if budget in said else [budget]
    return ["\n".join([*said, rest]) for rest, said in budgets.items()]


def _experiments(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the configuration of every experiment that trains; seeds make no difference here."""
    flat = to_flat(config)
    for cell in cells_of(config):
        if not cell.classical:
            yield parse({**flat, **cell.overrides})


def _check_cell(config: RunConfig, cell: Cell) -> None:
    """Refuse one experiment of a job; of a sweep the sentence says which."""
    if cell.classical:
        return
    try:
        own = parse({**to_flat(config), **cell.overrides})
        if cell.axes:
            _names(own)
            _weights(own)
        for sentence in _combined(own):
            raise ConfigError(sentence)
    except ValueError as error:
        raise ConfigError(f"in '{cell.label}': {error}" if cell.axes else str(error)) from None


def _names(config: RunConfig) -> None:
    """Look up what is named."""
    from fedlam_app.models.predictors import PREDICTORS
    from strategies import ALGORITHMS
    from strategies.selection import POLICIES

    pick(ALGORITHMS, config.strategy, "strategy")
    pick(POLICIES, config.selection.policy, "selection.policy")
    if about_channels(config):
        pick(PREDICTORS, config.model.name, "model.name")


def _weights(config: RunConfig) -> None:
    """Find the weights of the backbone."""
    from fedlam_app.models.backbones import locate

    if has_backbone(config):
        locate(config.model.backbone, config.model.weights)


def _is_split(config: RunConfig) -> bool:
    from strategies import ALGORITHMS

    return ALGORITHMS[config.strategy].space == "gradient"


def _of_the_case_study(config: RunConfig) -> Iterator[str]:
    """Yield what the case study is not about: it compares numbers of servers that predict channels."""
    other = "it must be {}, or the job 'train' or 'compare'"
    if not about_channels(config):
        yield (
            f"'task' = '{config.task}' is not allowed with 'job' = 'case-study', which is about channels; "
            + other.format("'channel-prediction'")
        )
    if _is_split(config):
        yield (
            f"'strategy' = '{config.strategy}' is not allowed with 'job' = 'case-study', whose servers"
            " average adapters; " + other.format("a strategy of adapter space")
        )
    if config.train.cohort:
        yield (
            f"'train.cohort' = {config.train.cohort} is not allowed with 'job' = 'case-study', which varies"
            " the number of servers; " + other.format("0")
        )
    if config.train.ranks:
        yield (
            f"'train.ranks' = '{','.join(map(str, config.train.ranks))}' is not allowed with 'job' ="
            " 'case-study', some of whose models have no ranks; " + other.format("empty")
        )


def _combined(config: RunConfig) -> Iterator[str]:
    """Yield what a strategy cannot do with the rest of an experiment's configuration."""
    from strategies import ALGORITHMS, device_dp

    rule, name, model = ALGORITHMS[config.strategy], config.strategy, config.model
    if config.train.cohort and name in NO_COHORT:
        yield (
            f"'train.cohort' = {config.train.cohort} is not allowed with 'strategy' = '{name}', where"
            " everyone takes part; it must be 0"
        )
    if has_fleet(config) and config.wireless.transport == "air" and not rule.linear:
        can = [key for key, other in ALGORITHMS.items() if other.linear and key not in NO_COHORT]
        yield (
            f"'wireless.transport' = 'air' is not allowed with 'strategy' = '{name}', which needs more than"
            f" the sum of what devices send; it must be 'ofdma', or the strategy one that averages:"
            f" {', '.join(can)}"
        )
    yield from rules_wireless.with_space(config, rule.space)
    yield from rules_privacy.with_strategy(config, rule.space, rule.linear)
    if config.privacy.mechanism == "client":
        device_dp.check(config, rule.space)
    if rule.space == "gradient":
        if sentence := rules_split.broken(config):
            yield sentence
        return
    yield from rules_split.blocks(config)
    if model.precision == "float64":
        yield (
            f"'model.precision' = 'float64' is not allowed with 'strategy' = '{name}', whose vectors travel"
            " as float32; it must be 'float32', or the strategy one of gradient space"
        )
    if name == "fedavg-full" and model.tuning != "full" and config.task != MIXTURE:
        yield (
            f"'model.tuning' = '{model.tuning}' is not allowed with 'strategy' = 'fedavg-full', which trains"
            " everything; it must be 'full'"
        )
    if rule.lora or name in LORA_BY_NAME:
        if not has_backbone(config):
            what, remedy = without_backbone(config)
            yield f"'strategy' = '{name}' needs LoRA, and {what} has no backbone to adapt; {remedy}"
        if model.tuning != "lora":
            yield (
                f"'model.tuning' = '{model.tuning}' is not allowed with 'strategy' = '{name}', which works on"
                " LoRA factors; it must be 'lora'"
            )
    if len(set(config.train.ranks)) > 1 and not rule.unlike_ranks:
        can = [key for key, other in ALGORITHMS.items() if other.unlike_ranks]
        yield (
            f"'train.ranks' = '{','.join(map(str, config.train.ranks))}' is not allowed with 'strategy' ="
            f" '{name}', whose devices must have one rank; it must be empty, or the strategy {', '.join(can)}"
        )


def _traces(config: RunConfig) -> None:
    """Read the traces that a fleet's devices are dealt from."""
    from fedlam_app.wireless import traces

    fleet = config.fleet
    if fleet.profiles == "none":
        return
    for path, read in (
        (fleet.capacity, traces.read_capacity),
        (fleet.behaviour, traces.read_behaviour),
        (fleet.speeds, traces.read_speeds),
    ):
        if path:
            read(path)


def _texts(config: RunConfig) -> None:
    """Read the texts, share them out, and see whether a text has room beside its label."""
    import numpy as np

    from fedlam_app.data.label_partition import partition
    from fedlam_app.data.text import load_texts
    from fedlam_app.tasks.language_modelling import LanguageModelling

    text = config.text
    train, _ = load_texts(text, config.seed)
    partition(text.partition, train.labels, config.train.devices, text.dirichlet, config.seed)
    if config.task == "language-modelling":
        LanguageModelling(config).encode(train.take(np.unique(train.labels, return_index=True)[1]))
