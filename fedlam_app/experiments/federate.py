"""The federation that a configuration asks for: its rule, in the round of the rule's family."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray

from clients.adapter import torch_device
from fedlam_app.base.registry import pick
from fedlam_app.base.vectors import pack
from fedlam_app.config import RunConfig
from fedlam_app.models.factors import layout_of
from fedlam_app.models.split import SplitModel
from fedlam_app.rules_wireless import has_fleet
from fedlam_app.tasks.base import Task
from strategies import ALGORITHMS
from strategies.adapter_round import AdapterFederation
from strategies.algorithm import Algorithm
from strategies.base import Federation
from strategies.hands import Hands, without_radio
from strategies.noised import noised, says
from strategies.secure_round import SecureFederation


def federate(config: RunConfig, cell: str, task: Task, model: SplitModel) -> Federation:
    """Return the federation of one experiment; ``cell`` is the JSON of its overrides.

    In gradient space the model's backbone is the edge server's, from now on: pass one of its own.
    """
    algorithm = pick(ALGORITHMS, config.strategy, "strategy")(config)
    devices = [0] if config.strategy == "central" else list(range(config.train.devices))
    scale = config.model.alpha / config.model.rank
    if algorithm.space == "adapter":
        algorithm.init(pack(model.trainable().values()).astype(np.float32), devices, layout_of(model, scale))
    else:
        model = model.to(torch_device(config.device))
        torch.set_num_threads(config.federation.server_threads or os.cpu_count() or 1)
        algorithm.init(pack(model.server_side().values()), devices, layout_of(model.backbone, scale))
    hands = _on_air(config, algorithm, task, model) if has_fleet(config) else without_radio(algorithm)
    if says(config):
        examples, width = _examples(config, task), int(getattr(model.backbone, "width", 1))
        own = hands.participation, config, algorithm.space, examples, width, hands.reception.summary
        hands.participation = noised(*own)
    if algorithm.space == "adapter":
        kind = SecureFederation if config.privacy.secure else AdapterFederation
        return kind(algorithm, cell, devices, config.federation, hands)
    if config.privacy.mechanism == "server-dp-sgd":
        from strategies.server_dp import TrustedFederation as Split
    else:
        from strategies.split_lora import SplitFederation as Split  # type: ignore[assignment]

    return Split(algorithm, cell, devices, config, task, model, hands)


def _on_air(config: RunConfig, algorithm: Algorithm, task: Task, model: SplitModel) -> Hands:
    from strategies.fleet_hands import on_air

    return on_air(config, algorithm, task, model, _examples(config, task))


def _examples(config: RunConfig, task: Task) -> NDArray[np.float64]:
    return np.array([task.examples(k) for k in range(config.train.devices)], np.float64)
