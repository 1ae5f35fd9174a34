"""Low-rank factors against the weights they adapt: merging them in, and the first gradient's best ones.

merge   W <- W + s B A                          for every adapted linear
probe   -dL/dW ~ U S V^T,  A = V^T, B = U S     the best rank-r factors of minus a full gradient
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedlam_app.base.layout import Layout, factors_at
from fedlam_app.base.vectors import Vector, pack


def layout_of(model: nn.Module, scale: float) -> Layout:
    """Return the layout of a model's trainable parameters in the order in which they are packed."""
    named = ((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    return Layout.of(named, scale)


def merge(model: nn.Module, layout: Layout, vector: Vector, rank: int) -> None:
    """Add factors of any rank, pair by pair A then B, into the frozen weights."""
    for pair, (a, b) in zip(layout.pairs, factors_at(layout, vector, rank), strict=True):
        weight, transposed = _stored(model, pair.name)
        product = layout.scale * (torch.from_numpy(b).double() @ torch.from_numpy(a).double())  # (out, in)
        with torch.no_grad():
            weight.copy_(weight.double() + (product.T if transposed else product).to(weight.device))


def probe(model: nn.Module, layout: Layout, loss: Callable[[], Tensor]) -> Vector:
    """Return, as a LoRA vector (p,), the best factors of minus the gradient of ``loss`` by each weight."""
    stored = [_stored(model, pair.name) for pair in layout.pairs]
    weights = [weight.requires_grad_(True) for weight, _ in stored]
    try:
        gradients = torch.autograd.grad(loss(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for pair, (_, transposed), gradient in zip(layout.pairs, stored, gradients, strict=True):
        downhill = -(gradient.T if transposed else gradient).double()  # (out, in)
        u, s, vt = torch.linalg.svd(downhill, full_matrices=False)
        found[f"{pair.name}.lora_A.default.weight"].copy_(vt[: pair.rank])
        found[f"{pair.name}.lora_B.default.weight"].copy_(u[:, : pair.rank] * s[: pair.rank])
    return pack(found.values())


def _stored(model: nn.Module, name: str) -> tuple[Tensor, bool]:
    """Return the frozen weight of an adapted linear, and whether it is kept as (in, out), as GPT-2's are."""
    layer: Any = model.get_submodule(name)
    return layer.get_base_layer().weight, bool(getattr(layer, "fan_in_fan_out", False))
