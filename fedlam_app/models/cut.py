"""The first cut, moved into the backbone: its first c blocks run on the device, with their adapters.

    device   embedding, positions, blocks 1 .. c      (``front``)
    server   blocks c + 1 .. n, the final norm        (``rest``)

A tuned backbone is cut, and its blocks are moved, not copied: front then rest computes what the whole
computes, from the same initial adapters, and their parameters, front first, are the whole's in its order. So
a vector of the one model is a vector of the other. Rotary positions (Llama) are taken in every block and need
no part of their own. This is the cut of "SplitLoRA", arXiv:2407.00952.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedlam_app.base.registry import pick
from fedlam_app.models.backbones import Backbone
from fedlam_app.models.split import SplitModel, Tokens


class Front(nn.Module):
    """The positions and first blocks of a backbone: tokens to tokens, packed or not."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor | Tokens) -> Tensor | Tokens:
        """Map (B, S, D) to (B, S, D), or Tokens to the Tokens of which the same rows are needed."""
        if not isinstance(tokens, Tokens):
            return self.backbone(tokens)
        every = torch.arange(len(tokens.values), device=tokens.values.device)
        return tokens._replace(values=self.backbone(tokens._replace(rows=every)))  # (N, D)


class FrontEmbedding(nn.Module):
    """Device side: an embedding module, then the backbone's first blocks."""

    def __init__(self, embedding: nn.Module, front: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.front = front

    def forward(self, x: Any) -> tuple[Tensor | Tokens, Any]:
        """Map a task input to the states after the last block on the device."""
        tokens, side = self.embedding(x)
        return self.front(tokens), side


def on_device(model: SplitModel, blocks: int) -> SplitModel:
    """Return ``model`` with its backbone's first blocks on the device; 0 leaves it as it is."""
    if not blocks:
        return model
    front, rest = cut(model.backbone, blocks)
    return SplitModel(FrontEmbedding(model.embedding, front), rest, model.head)


def cut(backbone: nn.Module, blocks: int) -> tuple[Front, Backbone]:
    """Take a tuned backbone apart behind block ``blocks``; the rest is the same object, without the front.

    A backbone that does not have more blocks than that raises ``ValueError``.
    """
    if not isinstance(backbone, Backbone):
        raise ValueError(f"'split.device-blocks' = {blocks} needs a backbone of several blocks, and has none")
    core = _core(backbone)
    family = pick(FAMILIES, type(core).__name__, "model to cut")
    every: Any = core.get_submodule(family.blocks)
    if not 1 <= blocks < len(every):
        raise ValueError(
            f"'split.device-blocks' = {blocks} leaves the server no block of the {len(every)} that the"
            f" backbone has; at most {len(every) - 1} can be on the device"
        )
    core.set_submodule(family.blocks, nn.ModuleList())
    front = copy.deepcopy(backbone)  # of everything but the blocks: positions and norms
    core.set_submodule(family.blocks, every[blocks:])
    for name in family.added:
        core.set_submodule(name, _Nothing(core.get_submodule(name)))
    for name in family.first_norm:
        core.set_submodule(name, nn.Identity())
    first = _core(front)
    first.set_submodule(family.blocks, every[:blocks])
    for name in family.last_norm:
        first.set_submodule(name, nn.Identity())
    return Front(front), backbone


class _Nothing(nn.Module):
    """Stands where a table of positions stood: adds zero, holds no parameter."""

    weight: Tensor

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        of: Any = table.weight
        self.register_buffer("weight", of.new_zeros(len(of), 1), persistent=False)  # broadcasts over D

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class _Family(NamedTuple):
    """Where a model of transformers keeps what a cut takes apart."""

    blocks: str
    added: tuple[str, ...] = ()  # tables that are added to the tokens before the first block
    first_norm: tuple[str, ...] = ()
    last_norm: tuple[str, ...] = ()


def _core(backbone: Backbone) -> nn.Module:
    """Return the model of transformers inside, peft's wrapper or not."""
    from peft import PeftModel

    model: Any = backbone.model
    return model.get_base_model() if isinstance(model, PeftModel) else model


FAMILIES = {
    "BertModel": _Family(
        blocks="encoder.layer",
        added=("embeddings.position_embeddings", "embeddings.token_type_embeddings"),
        first_norm=("embeddings.LayerNorm",),
    ),
    "GPT2Model": _Family(blocks="h", added=("wpe",), last_norm=("ln_f",)),
    "LlamaModel": _Family(blocks="layers", last_norm=("norm",)),
}
