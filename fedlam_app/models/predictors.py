"""Channel predictors by name, each a ``SplitModel`` from ``Rows`` to (B, F, K, 2).

The small networks have no cut: they are the middle module between two that only unwrap and pass on.
Adding a predictor is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlam_app.base.keys import seed_of
from fedlam_app.base.registry import pick
from fedlam_app.config import ModelConfig
from fedlam_app.models import backbones, lora
from fedlam_app.models.rows import Rows
from fedlam_app.models.split import SplitModel


@dataclass(frozen=True)
class Shape:
    """Axes of a row: T history slots, F future slots, K subcarriers."""

    history: int
    future: int
    subcarriers: int


class _History(nn.Module):
    def forward(self, rows: Rows) -> tuple[Tensor, None]:
        return rows.history, None


class _Forecast(nn.Module):
    def forward(self, forecast: Tensor, side: None) -> Tensor:
        return forecast


def build(model: ModelConfig, seed: int, shape: Shape) -> SplitModel:
    """Return the predictor that the configuration names: the same weights for the same seed."""
    make = pick(PREDICTORS, model.name, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        return make(model, seed, shape)


def _backbone(model: ModelConfig, seed: int) -> backbones.Backbone | backbones.NoBackbone:
    frozen = backbones.load(model.backbone, blocks=model.blocks, weights=model.weights, seed=seed)
    return lora.tune(frozen, model.tuning, rank=model.rank, alpha=model.alpha, seed=seed, on=model.lora_on)


def _clean(model: ModelConfig, seed: int, shape: Shape) -> SplitModel:
    from fedlam_app.models.csi import llm4cp_clean

    backbone = _backbone(model, seed)
    return llm4cp_clean(
        backbone,
        backbone.width,
        subcarriers=shape.subcarriers,
        history=shape.history,
        future=shape.future,
        anchored=model.anchor != "none",
    )


def _faithful(model: ModelConfig, seed: int, shape: Shape) -> SplitModel:
    from fedlam_app.models.llm4cp import llm4cp

    backbone = _backbone(model, seed)
    return llm4cp(
        backbone, backbone.width, subcarriers=shape.subcarriers, history=shape.history, future=shape.future
    )


def _recurrent(model: ModelConfig, seed: int, shape: Shape) -> SplitModel:
    from fedlam_app.models.recurrent import Recurrent

    return _whole(Recurrent(model.name, shape.subcarriers, shape.history, shape.future))


def _convolutional(model: ModelConfig, seed: int, shape: Shape) -> SplitModel:
    from fedlam_app.models.convolutional import Convolutional

    return _whole(Convolutional(shape.subcarriers, shape.history, shape.future))


def _transformer(model: ModelConfig, seed: int, shape: Shape) -> SplitModel:
    from fedlam_app.models.transformer import Transformer

    return _whole(Transformer(shape.subcarriers, shape.history, shape.future))


def _whole(network: nn.Module) -> SplitModel:
    return SplitModel(_History(), network, _Forecast())


PREDICTORS: dict[str, Callable[[ModelConfig, int, Shape], SplitModel]] = {
    "llm4cp-clean": _clean,
    "llm4cp": _faithful,
    "rnn": _recurrent,
    "lstm": _recurrent,
    "gru": _recurrent,
    "cnn": _convolutional,
    "transformer": _transformer,
}
