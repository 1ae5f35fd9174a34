"""Combinations that privacy forbids: what would break a guarantee is refused, never only warned of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlam_app.config import RunConfig

IN_CLIENTS = ("dp-sgd",)
ON_SERVER = ("client",)
AT_THE_CUT = ("server-dp-sgd", "jacobian", "logit", "randomised-response", "release-once")
FROZEN_HEAD = ("server-dp-sgd", "jacobian")  # a head that trains would carry a sample into others' Jacobians
POLLING = ("power-of-choice", "power-of-choice-stale", "oort", "tifl")  # live on devices' losses
SCHEDULED = ("dp-sgd", "client", "jacobian", "logit")  # release something every round
BY_NORMS = ("importance", "update-aware")  # choose by the norms of updates
SUMMED = 3  # devices; of the sum of two, each takes its own away
DP_SGD = (
    "fedavg-lora",
    "fedit",
    "fedavg-full",
    "fedprox",
    "ffa-lora",
    "rolora",
    "flora",
    "fedex-lora",
    "flexlora",
    "hetlora",
    "fedsa-lora",
    "local",
)  # what a device sends is a function of its own noised steps; not: 'fed-sb', whose probe is a clear gradient
WITH_SAMPLES = ("text-classification", "language-modelling", "mixture")


def broken(config: RunConfig) -> Iterator[str]:
    """Yield what the table ``privacy`` and the rest forbid each other, whatever the strategy."""
    privacy = config.privacy
    if privacy.ledgers and not Path(privacy.ledgers).is_absolute():
        yield f"'privacy.ledgers' = '{privacy.ledgers}' is not allowed: it must be an absolute path"
    if privacy.ledgers and config.job == "compare":
        yield (
            f"'privacy.ledgers' = '{privacy.ledgers}' is not allowed with 'job' = 'compare', whose"
            " experiments would spend each other's budgets; it must be empty"
        )
    yield from _masked(config)
    if not privacy.on:
        return
    key = f"'privacy.mechanism' = '{privacy.mechanism}'"
    if config.job == "case-study":
        yield f"{key} is not allowed with 'job' = 'case-study'; it must be 'none', or the job another"
    if config.federation.placement == "sites" and privacy.randomness == "seed":
        yield (
            "'privacy.randomness' = 'seed' is not allowed with 'federation.placement' = 'sites', where the"
            " server knows the seed and could subtract the noise; it must be 'device'"
        )
    if config.faults.attack != "none":
        yield (
            f"{key} is not allowed with 'faults.attack' = '{config.faults.attack}', which changes what leaves"
            " a device after it was clipped; the attack must be 'none', or the mechanism 'none'"
        )
    yield from _schedules(config)
    yield from _channels(config)
    if privacy.withholds and config.selection.policy in POLLING and config.fleet.profiles != "none":
        yield (
            f"{key} is not allowed with 'selection.policy' = '{config.selection.policy}', which asks devices"
            " for their losses; the policy must be another"
        )


def with_strategy(config: RunConfig, space: str, linear: bool) -> Iterator[str]:
    """Yield what the mechanism and a strategy of that family forbid each other."""
    privacy = config.privacy
    if not privacy.on:
        return
    key, name = f"'privacy.mechanism' = '{privacy.mechanism}'", config.strategy
    allowed = {"adapter": (*IN_CLIENTS, *ON_SERVER), "gradient": (*AT_THE_CUT, *ON_SERVER)}[space]
    if privacy.mechanism not in allowed:
        yield f"{key} is not allowed with 'strategy' = '{name}'; it must be {', '.join(allowed)}, or none"
    if privacy.mechanism in FROZEN_HEAD and config.split.heads != "frozen":
        yield (
            f"{key} is not allowed with 'split.heads' = '{config.split.heads}': a head that trains on clear"
            " labels would carry one sample into the others' Jacobians; it must be 'frozen'"
        )
    if privacy.mechanism == "client" and not linear:
        yield (
            f"{key} is not allowed with 'strategy' = '{name}', which needs more than the sum of what devices"
            " send; the strategy must be one that averages, such as 'fedavg-lora'"
        )
    if privacy.mechanism == "client":
        yield from _of_devices(config, space)
    if privacy.secure and space == "gradient":
        yield (
            f"'privacy.secure' = true is not allowed with 'strategy' = '{name}', whose gradients the edge"
            " server itself makes, device by device; the strategy must be one of adapter space, such as"
            " 'fedavg-lora'"
        )
    if privacy.mechanism == "dp-sgd":
        yield from _of_samples(config)
    if privacy.mechanism in AT_THE_CUT and config.task != "text-classification":
        yield f"{key} is not allowed with 'task' = '{config.task}'; it must be 'text-classification'"


def _of_samples(config: RunConfig) -> Iterator[str]:
    """Yield what DP-SGD on the devices cannot do."""
    key, name, model = "'privacy.mechanism' = 'dp-sgd'", config.strategy, config.model
    if name not in DP_SGD:
        yield (
            f"{key} is not allowed with 'strategy' = '{name}', whose devices send something else than what"
            f" their own noised steps made; the strategy must be {', '.join(DP_SGD)}"
        )
    if config.task not in WITH_SAMPLES:
        yield (
            f"{key} is not allowed with 'task' = '{config.task}', whose samples never come twice; the task"
            f" must be {', '.join(WITH_SAMPLES)}, or the mechanism 'client'"
        )
    elif config.task != "mixture" and (
        model.tuning == "full" or (model.tuning == "ln" and "gpt2" in model.backbone)
    ):
        what = "words" if model.tuning == "full" else "positions"
        yield (
            f"{key} is not allowed with 'model.tuning' = '{model.tuning}', which trains the table of {what},"
            " shared by the samples of a batch; it must be 'lora'"
        )


def _of_devices(config: RunConfig, space: str) -> Iterator[str]:
    """Yield what the protection of whole devices forbids."""
    key, fleet = "'privacy.mechanism' = 'client'", config.fleet.profiles != "none"
    if config.strategy == "central":
        yield (
            f"{key} is not allowed with 'strategy' = 'central', where one device has everything; the strategy"
            " must be one that averages, such as 'fedavg-lora'"
        )
    if space == "gradient" and config.split.heads == "averaged":
        yield (
            f"{key} is not allowed with 'split.heads' = 'averaged': the heads that devices hand in to be"
            " averaged are neither clipped nor noised; it must be 'personal' or 'frozen'"
        )
    if fleet and config.selection.policy in BY_NORMS:
        yield (
            f"{key} is not allowed with 'selection.policy' = '{config.selection.policy}', which chooses by"
            " the norms of updates, and would tell of them by its choice; the policy must be another"
        )
    if fleet and config.wireless.transport == "air":
        yield from _of_the_sum(config)
    if fleet and config.privacy.cohort == "poisson":
        yield (
            "'privacy.cohort' = 'poisson' is not allowed with 'fleet.profiles' ="
            f" '{config.fleet.profiles}', where a policy chooses and no secret coin does; it must be"
            " 'visible', or the profiles 'none'"
        )


def _of_the_sum(config: RunConfig) -> Iterator[str]:
    """Yield what devices whose noise is in a sum over the air cannot do."""
    privacy, air = config.privacy, "'wireless.transport' = 'air'"
    if config.wireless.air == "least-error":
        yield (
            f"'privacy.mechanism' = 'client' with {air} is not allowed with 'wireless.air' = 'least-error',"
            " which drowns weak devices, and their noise; it must be 'inversion' or 'truncated'"
        )
    if privacy.quantile or privacy.secure:
        name, value = ("quantile", "0") if privacy.quantile else ("secure", "false")
        yield (
            f"'privacy.{name}' is not allowed with {air}, where the sum is all that is heard; it must be"
            f" {value}, or the transport 'ofdma'"
        )


def _schedules(config: RunConfig) -> Iterator[str]:
    """Yield what a budget that is not spent evenly cannot go with."""
    privacy, wireless = config.privacy, config.wireless
    key = f"'privacy.schedule' = '{privacy.schedule}'"
    if privacy.schedule == "uniform":
        return
    if privacy.mechanism not in SCHEDULED:
        yield (
            f"{key} is not allowed with 'privacy.mechanism' = '{privacy.mechanism}'; it must be 'uniform', or"
            f" the mechanism {', '.join(SCHEDULED)}"
        )
    if privacy.schedule == "late":
        return
    if config.fleet.profiles == "none":
        yield (
            f"{key} is not allowed with 'fleet.profiles' = 'none', where there is no channel; it must be"
            " 'late' or 'uniform'"
        )
    if config.selection.mode == "asynchronous" or config.strategy == "fedbuff":
        yield (
            f"{key} is not allowed where devices do not work in rounds; the mode must be 'synchronous',"
            " 'deadline' or 'over-selection', and the strategy not 'fedbuff'"
        )
    if wireless.transport == "ofdma" and wireless.loss == "none":
        yield (
            f"{key} is not allowed with 'wireless.loss' = 'none', where every channel is as good as another;"
            " it must be 'rayleigh' or 'harq', or 'wireless.transport' 'analog' or 'air'"
        )


def _channels(config: RunConfig) -> Iterator[str]:
    """Yield where the receiver's noise must not count."""
    privacy = config.privacy
    if not privacy.count_channel_noise:
        return
    key, transport = "'privacy.count-channel-noise' = true", config.wireless.transport
    pairs = {"jacobian": "analog", "client": "air"}
    if config.fleet.profiles == "none" or pairs.get(privacy.mechanism) != transport:
        yield (
            f"{key} is not allowed with 'privacy.mechanism' = '{privacy.mechanism}' and"
            f" 'wireless.transport' = '{transport}': it counts where what is clipped is"
            " sent as it is in a fleet, that is 'jacobian' with 'analog', or 'client' with 'air'"
        )
    if config.federation.placement == "sites":
        yield (
            f"{key} is not allowed with 'federation.placement' = 'sites', whose real links are digital: the"
            " channel is the server's simulation, and hides nothing from it; it must be false"
        )


def _masked(config: RunConfig) -> Iterator[str]:
    """Yield what cannot be summed under masks."""
    privacy, key = config.privacy, "'privacy.secure' = true"
    if not privacy.secure:
        return
    if privacy.mechanism != "client":
        yield (
            f"{key} is not allowed with 'privacy.mechanism' = '{privacy.mechanism}'; it must be false, or the"
            " mechanism 'client'"
        )
    if config.train.wanted < SUMMED:
        yield (
            f"{key} is not allowed with {config.train.wanted} devices a round, whose sum hides little; there"
            f" must be {SUMMED} or more"
        )
    if config.fleet.profiles == "none":
        return
    if config.wireless.transport == "analog":
        yield (
            f"{key} is not allowed with 'wireless.transport' = 'analog': noise on a masked number leaves"
            " nothing of it; it must be 'ofdma'"
        )
    if config.selection.mode == "asynchronous":
        yield (
            f"{key} is not allowed with 'selection.mode' = 'asynchronous': masks cancel among those who work"
            " together; the mode must be 'synchronous', 'deadline' or 'over-selection'"
        )
