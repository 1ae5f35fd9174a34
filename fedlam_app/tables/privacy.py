"""What is hidden, from whom, and for how large an epsilon; what each mechanism claims is in
``privacy/statement.py``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedlam_app.tables.base import Natural, Positive, Share, Table, split

Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=True)]

WITHHOLDING = ("dp-sgd", "client", "server-dp-sgd", "jacobian", "logit")  # a true loss would tell of the data


def split_numbers(value: object) -> Any:
    """Turn ``"1,8,inf"`` into ``(1.0, 8.0, inf)``; what is no number stays as it is, to be refused."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return (float(value),)
    parts = split(value)
    return tuple(map(_number, parts)) if isinstance(parts, tuple) else parts


def _number(part: object) -> object:
    try:
        return float(part)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return part


class PrivacyConfig(Table):
    """Differential privacy: one mechanism, its budget and its noise."""

    mechanism: Literal[
        "none",
        "dp-sgd",
        "client",
        "server-dp-sgd",
        "jacobian",
        "logit",
        "randomised-response",
        "release-once",
    ]
    """What is done about privacy. Adapter space: ``dp-sgd`` on the devices, ``client`` on the server. The
    split: ``server-dp-sgd`` (trusted server), ``jacobian``, ``logit`` and ``randomised-response`` (labels,
    given clear embeddings), ``release-once`` (inputs and labels)."""
    target_epsilon: Epsilon
    """Budget of a device (its samples', or with ``client`` its own); ``inf``: clipped, without noise."""
    device_epsilons: Annotated[tuple[Epsilon, ...], BeforeValidator(split_numbers)]
    """Budgets of the device profiles, comma-separated; device k has the k-th, in turns. Empty:
    ``privacy.target-epsilon`` for all."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Delta of every (epsilon, delta) that is printed."""
    noise_multiplier: Annotated[float, Field(ge=0)]
    """Noise over the largest norm, sigma / C; 0 finds the least that keeps the budget to the last round."""
    clip: Annotated[float, Field(gt=0)]
    """C: the largest norm of what one sample (with ``client``: one device) adds."""
    sampling_rate: Share
    """Poisson rate q at which ``dp-sgd`` and ``server-dp-sgd`` draw each sample for a step; 0 is
    ``train.batch-rows`` over the device's samples (at most 1)."""
    randomness: Literal["seed", "device"]
    """Where noise comes from: ``seed``, the run's: reproducible, and known to whoever knows the seed;
    ``device``: a secret that each device draws once and keeps."""
    ledgers: str
    """Folder of ledgers that outlive a run, one a device: what earlier runs spent on the same data counts.
    Empty: a run has its own."""
    label_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the budget that ``release-once`` spends on labels (randomised response)."""
    dimensions: Positive
    """Dimensions of the public projection that ``release-once`` releases a text in."""
    public_texts: Annotated[str, Field(min_length=1)]
    """Texts, public, whose principal directions the projection is (as ``text.source``)."""
    cohort: Literal["visible", "poisson"]
    """With ``client``: who takes part is known, and nothing is claimed from it; or each device takes part in
    a round by a secret coin of chance ``train.cohort`` / ``train.devices``, which amplifies privacy."""
    quantile: Annotated[float, Field(ge=0, lt=1)]
    """With ``client``: the share of updates that the adaptive clip leaves whole; 0 keeps ``privacy.clip``."""
    quantile_lr: Annotated[float, Field(gt=0)]
    """Rate of the adaptive clip."""
    secure: bool
    """With ``client``: secure aggregation; the server sees the sum of the updates alone."""
    survivors: Annotated[float, Field(gt=0.5, le=1)]
    """Share of a device's neighbours that must survive for a masked sum to be opened."""
    neighbours: Natural
    """Devices that each shares masks with; 0 is all others of the round."""
    schedule: Literal["uniform", "late", "channel"]
    """How the budget is spent over rounds: evenly; late rounds get more; or rounds with a good channel do."""
    late_weight: Annotated[float, Field(gt=0, le=1)]
    """With ``late``: weight of a round's noise over that of the next."""
    count_channel_noise: bool
    """Whether the receiver's own noise counts towards the noise asked for (uncoded analog links alone);
    against the server, who owns the receiver, that is trust."""
    channel_margin_db: Annotated[float, Field(ge=0)]
    """How much better than estimated an adversary's link may be, where channel noise counts."""

    @property
    def on(self) -> bool:
        """Whether anything is done."""
        return self.mechanism != "none"

    @property
    def withholds(self) -> bool:
        """Whether devices keep their losses to themselves."""
        return self.mechanism in WITHHOLDING

    def budget(self, device: int) -> float:
        """Return the epsilon that a device may spend."""
        own = self.device_epsilons
        return own[device % len(own)] if own else self.target_epsilon

    def label_epsilon(self, device: int) -> float:
        """Return the epsilon that a device's labels are randomised with; inf: they are the true ones."""
        share = {"randomised-response": 1.0, "release-once": self.label_share}.get(self.mechanism)
        return math.inf if share is None else share * self.budget(device)

    @property
    def noiseless(self) -> bool:
        """Whether every budget is infinite, and no noise asked for: clipping alone."""
        budgets = self.device_epsilons or (self.target_epsilon,)
        return self.noise_multiplier == 0.0 and all(map(math.isinf, budgets))
