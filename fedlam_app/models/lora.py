"""What trains inside a backbone: LoRA on its linear layers, the layer norms, everything, or nothing.

LoRA (Hu et al., ICLR 2022, arXiv:2106.09685): W x + (alpha / r) B A x with B = 0 at the start, so the
adapted model starts as the pretrained one. Layers come from peft, so adapters load anywhere that
peft does. LN tuning is LLM4CP's choice (Liu et al., arXiv:2406.14440; "frozen pretrained
transformer", Lu et al., AAAI 2022): layer norms, and GPT-2's positions.
"""

from __future__ import annotations

import torch

from fedlam_app.base.keys import seed_of
from fedlam_app.base.registry import pick
from fedlam_app.models.backbones import Backbone, NoBackbone


def tune(
    backbone: Backbone | NoBackbone,
    method: str,
    *,
    rank: int = 8,
    alpha: int = 16,
    seed: int = 0,
    on: str = "all",
) -> Backbone | NoBackbone:
    """Make part of a frozen backbone trainable, in place, and return it.

    ``method`` is 'lora' (rank ``rank``, scale ``alpha / rank``, ``on`` 'all' linear layers or on 'attention',
    queries and values), 'ln', 'full' or 'none'. A backbone without parameters is returned as it is.
    """
    if isinstance(backbone, Backbone):
        if method == "lora":
            _lora(backbone, rank, alpha, seed, backbone.linears if on == "all" else backbone.attention)
        else:
            pick(METHODS, method, "tuning")(backbone)
    return backbone


def _lora(backbone: Backbone, rank: int, alpha: int, seed: int, linears: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=linears, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora"))
        backbone.model = get_peft_model(backbone.model, config)


def _layer_norms(backbone: Backbone) -> None:
    for name, parameter in backbone.model.named_parameters():
        leaf = name.lower()
        parameter.requires_grad_("norm" in leaf or "ln_" in leaf or "wpe" in leaf)


def _everything(backbone: Backbone) -> None:
    backbone.model.requires_grad_(True)


def _nothing(backbone: Backbone) -> None:
    backbone.model.requires_grad_(False)


METHODS = {"ln": _layer_norms, "full": _everything, "none": _nothing}
