"""What each sample of a batch says by itself: its own gradient, and the sum of all after clipping.

    g_i = grad_w l_i(w),      S = sum_i g_i min(1, C / ||g_i||),      ||.|| over all that trains

so that one sample moves S by at most C (M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016,
arXiv:1607.00133, algorithm 1). The g_i come from Opacus (A. Yousefpour et al., 2021, arXiv:2109.12298): hooks
on each layer that trains keep its input a (B, T, i) and its output's gradient b (B, T, o), and

    dL/dW of sample n  =  sum_t b[n, t] a[n, t]^T                                       (B, o, i)

That is right where a layer sees samples along its first axis and nothing goes from one to another. Opacus
does not look whether that is so; :func:`refuse` and the checks in :func:`per_sample` do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedlam_app.base.quiet import root_log_kept

ROUNDING = 1e-3  # how far the sum of the samples' gradients may be from autograd's, of their norms' sum
MARGIN = 1.0 + 1e-6  # what float32 may add to a clipped norm

Gradients = list[Tensor]  # of each parameter in turn, (B, *shape)

PEFT = {
    "prompt_tuning": "prompt tuning has one prompt for the whole batch, which would be clipped as one sample",
    "p_tuning": "prompt tuning has one prompt for the whole batch, which would be clipped as one sample",
    "prefix_tuning": "prompt tuning has one prefix for the whole batch, which would be clipped as one sample",
    "ia3": "IA3 trains vectors outside of any layer that Opacus knows",
    "vera": "VeRA trains vectors outside of any layer that Opacus knows",
}  # families of adapters, by peft's own names
CHECKPOINTING = "gradient checkpointing passes a layer twice, and Opacus gets no per-sample gradient of it"
BATCH_NORM = "BatchNorm mixes the samples of a batch, so that none has a gradient of its own"
DORA = "DoRA scales the weight by a norm that Opacus cannot follow"
LORA_EMBEDDING = "LoRA on embeddings trains outside of any layer that Opacus knows"
TABLE = (
    "a table of embeddings is shared by the samples of a batch, words packed and positions once for all, so"
    " that Opacus cannot tell one sample from the next; it must not train"
)


def refuse(model: nn.Module) -> None:
    """Raise ``ValueError`` where Opacus would get a part of the model wrong, or cannot do it at all."""
    for name, module in model.named_modules():
        if why := _flaw(module):
            raise ValueError(f"DP-SGD is not possible on '{name}' ({type(module).__name__}): {why}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"DP-SGD is not possible on '{name}' in {parameter.dtype}: its noise would be rounded away;"
                " what trains must be float32"
            )


def _flaw(module: nn.Module) -> str:
    """Return what keeps a module from per-sample gradients; empty where nothing is known."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return BATCH_NORM
    if getattr(module, "gradient_checkpointing", False):
        return CHECKPOINTING
    if isinstance(module, nn.Embedding) and module.weight.requires_grad:
        return TABLE
    package, _, rest = type(module).__module__.partition(".tuners.")
    if package != "peft":
        return ""
    family = rest.partition(".")[0]
    if family != "lora":
        return PEFT.get(family, f"the adapter '{family}' was never tried with Opacus; use LoRA")
    if any(getattr(module, "use_dora", {}).values()):
        return DORA
    return LORA_EMBEDDING if len(getattr(module, "lora_embedding_A", ())) else ""


@contextmanager
def per_sample(
    model: nn.Module, trained: Mapping[str, nn.Parameter]
) -> Iterator[Callable[[Tensor], Gradients]]:
    """Hook what trains in a model; yields a function from losses (B,) to their gradients, each its own.

    ``trained`` is all of the model that has ``requires_grad``, by name. When the context ends, the model is
    as it was. The first batch is checked against autograd: a gradient that Opacus does not see is an error.
    """
    refuse(model)
    with root_log_kept():
        from opacus.grad_sample import GradSampleHooks
    hooks = GradSampleHooks(model, loss_reduction="sum")
    checked = False

    def gradients(losses: Tensor) -> Gradients:
        nonlocal checked
        with warnings.catch_warnings():  # of a first layer, whose input has no gradient and needs none
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        for name, p in trained.items():
            _check(name, p, len(losses), whole=not checked)
        checked = True
        found: Gradients = []
        for parameter in trained.values():
            found.append(parameter.grad_sample)  # type: ignore[attr-defined]
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        return found

    try:
        yield gradients
    finally:
        hooks.cleanup()
        for module in model.modules():  # what a pass that failed has left behind would join the next one
            for kept in ("activations", "max_batch_len"):
                module.__dict__.pop(kept, None)


def _check(name: str, parameter: nn.Parameter, samples: int, whole: bool) -> None:
    """Raise ``ValueError`` unless a parameter has a gradient a sample; ``whole``: they make up autograd's."""
    found = getattr(parameter, "grad_sample", None)
    if not isinstance(found, Tensor) or found.shape != (samples, *parameter.shape):
        got = tuple(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(
            f"Opacus does not give per-sample gradients for '{name}': got {got} instead of"
            f" {(samples, *parameter.shape)}"
        )
    if whole and parameter.grad is not None:
        off = (found.sum(0) - parameter.grad).norm()
        most = found.flatten(1).norm(dim=1).sum()
        if off > ROUNDING * most and bool(torch.isfinite(off + most)):
            raise ValueError(
                f"Opacus does not give per-sample gradients for '{name}': their sum is not the batch's own"
            )


def clipped_sum(gradients: Gradients, clip: float) -> list[Tensor]:
    """Return sum_i g_i min(1, C / ||g_i||) of each parameter; a sample that is not finite adds nothing.

    Nor does one so long that its factor is no normal float32: it would be rounded, up to above C.
    """
    norms = torch.stack(
        [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients]
    ).norm(dim=0)  # (B,)
    finite = norms * torch.finfo(torch.float32).tiny < clip / MARGIN  # false for NaN too
    if not bool(finite.all()):  # 0 times NaN is NaN: such rows must go
        gradients, norms = [g[finite] for g in gradients], norms[finite]
    factors = (clip / (norms * MARGIN).clamp_min(1e-30)).clamp(max=1.0)  # (B,)
    return [(factors.to(g.dtype) @ g.flatten(1)).view(g.shape[1:]) for g in gradients]
