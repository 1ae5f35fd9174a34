"""One frozen linear layer, a low-rank path for each device: forward once, every device's gradient once.

Rows of x belong to devices k in contiguous segments. With u_k = s x_k A_k^T and v_k = s dy_k B_k,

    y_k = x_k W^T + b + u_k B_k^T                        one product with W for all devices
    dx_k = dy_k W + v_k A_k,   dB_k = dy_k^T u_k,   dA_k = v_k^T x_k

so the graph holds x and u (r columns), W exists once, and a device costs products of width r only. Where
all devices hold the same A and B, u, v, y and dx are one product each. LoRA: Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(NamedTuple):
    """A linear layer: frozen weights, and where its A and B lie in a device's vector."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    rank: int = 0  # 0: no low-rank path
    scale: float = 0.0
    a: slice = slice(0)  # A (r, in) in the vector
    b: slice = slice(0)  # B (out, r) in the vector


Run = tuple[int, int, int]  # (start, stop, slot): rows that belong to one device


class Rows:
    """Packed rows of several samples, sample after sample, and which device each sample belongs to."""

    def __init__(self, positions: Tensor, samples: Tensor, slots: Tensor) -> None:
        self.positions = positions  # (N,) place of each row in its sample
        self.samples = samples  # (N,) sample of each row, ascending
        self.slots = slots  # (B,) device of each sample
        counts = torch.bincount(samples, minlength=len(slots))  # (B,)
        self.count, self.longest = len(slots), int(counts.max())
        self.even = bool((counts == self.longest).all())  # no padding needed
        starts = counts.cumsum(0) - counts
        # Where each row lies among B x longest padded ones.
        self.padded = samples * self.longest + torch.arange(len(samples), device=samples.device)
        self.padded -= starts[samples]
        self.segments = segments(slots, counts)

    def pad(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, longest, D); rows that are not there are zero."""
        if not self.even:
            x = x.new_zeros(self.count * self.longest, x.shape[1]).index_copy(0, self.padded, x)
        return x.view(self.count, self.longest, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, longest, D) -> (N, D)."""
        x = x.reshape(self.count * self.longest, -1)
        return x if self.even else x.index_select(0, self.padded)

    def present(self) -> Tensor:
        """Which padded rows are there: (B, longest) bool."""
        there = torch.zeros(self.count * self.longest, dtype=torch.bool, device=self.padded.device)
        there[self.padded] = True
        return there.view(self.count, self.longest)


def segments(slots: Tensor, counts: Tensor) -> list[Run]:
    """(start, stop, slot) of the runs of rows of one device; sample b has ``counts[b]`` rows."""
    runs: list[Run] = []
    start = 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if runs and runs[-1][2] == slot:
            runs[-1] = (runs[-1][0], start + count, slot)
        elif count:
            runs.append((start, start + count, slot))
        start += count
    return runs


@dataclass
class Paths:
    """The devices' vectors during one pass, and what backward makes of them."""

    vectors: Tensor  # (m, p)
    rows: Sequence[int]  # rows[k]: the vector of slot k
    anchor: Tensor  # () leaf that ties the layers to the graph where their input needs no gradient
    gradients: Tensor | None = None  # (K, p), added to in backward
    want_tokens: bool = True  # whether the gradient goes on below the first layers
    fan: int = 1  # how many layers read the tokens themselves
    calls: int = field(default=0, init=False)

    @property
    def shared(self) -> bool:
        """Whether all devices hold the same adapter."""
        return len(self.vectors) == 1


def linear(x: Tensor, layer: Layer, runs: Sequence[Run], paths: Paths, gelu: str = "") -> Tensor:
    """Apply the layer with every device's low-rank path: (N, in) -> (N, out).

    ``gelu`` ('none' or 'tanh') applies that GELU to x before; backward computes it again, so that the
    graph holds x only.
    """
    paths.calls += 1
    return cast(Tensor, _Linear.apply(x, paths.anchor, layer, runs, paths, gelu))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, layer: Layer, runs: Sequence[Run], paths: Paths, gelu: str
    ) -> Tensor:
        ctx.layer, ctx.runs, ctx.paths, ctx.gelu = layer, runs, paths, gelu
        ctx.first = paths.calls <= paths.fan
        before = x
        if gelu:
            x = F.gelu(x, approximate=gelu)
        y = F.linear(x, layer.weight, layer.bias)  # (N, out)
        if not layer.rank:
            if gelu:
                ctx.save_for_backward(before)
            return y
        a, b = _factors(layer, paths.vectors)
        if paths.shared:
            u = (x @ a[0].t()).mul_(layer.scale)  # (N, r)
            y.addmm_(u, b[0].t())
        else:
            u = x.new_empty(len(x), layer.rank)
            for start, stop, slot in runs:
                row = paths.rows[slot]
                torch.mm(x[start:stop], a[row].t(), out=u[start:stop]).mul_(layer.scale)
                y[start:stop].addmm_(u[start:stop], b[row].t())
        ctx.save_for_backward(before, u)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        layer, paths = ctx.layer, ctx.paths
        dy = upstream[0].contiguous()  # (N, out)
        below = ctx.needs_input_grad[0] and (paths.want_tokens or not ctx.first)
        dx = product(dy, layer.weight.t()) if below else None  # (N, in)
        if layer.rank:
            before, u = ctx.saved_tensors
            x = F.gelu(before, approximate=ctx.gelu) if ctx.gelu else before
            a, b = _factors(layer, paths.vectors)
            v = x.new_empty(len(x), layer.rank)
            if paths.shared:
                # (B^T dy^T)^T and not dy B: MKL is many times faster at few rows than at few columns.
                v = (b[0].t() @ dy.t()).t().mul_(layer.scale)  # (N, r)
                if dx is not None:
                    dx.addmm_(v, a[0])
            else:
                for start, stop, slot in ctx.runs:
                    row = paths.rows[slot]
                    torch.mm(dy[start:stop], b[row], out=v[start:stop]).mul_(layer.scale)
                    if dx is not None:
                        dx[start:stop].addmm_(v[start:stop], a[row])
            da, db = _factors(layer, paths.gradients)
            sizes = [stop - start for start, stop, _ in ctx.runs]
            parts = (v.t().split(sizes, 1), x.split(sizes), u.t().split(sizes, 1), dy.split(sizes))
            for (*_, slot), v_k, x_k, u_k, dy_k in zip(ctx.runs, *parts, strict=True):
                da[slot].addmm_(v_k, x_k)
                db[slot].add_((u_k @ dy_k).t())
        if ctx.gelu and dx is not None:
            dx = torch.ops.aten.gelu_backward(dx, ctx.saved_tensors[0], approximate=ctx.gelu)
        return dx, None, None, None, None, None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for gradients, (N, in) and (out, in) -> (N, out), by the fastest library that torch carries.

    In float32 on CPUs with AVX-512 that is oneDNN, which uses it on every maker's; MKL, torch's own choice,
    does so on Intel's only (measured on AMD: 215 against 95 GFLOP/s a core). Without AVX-512 MKL is faster.
    Forward stays with torch's choice: the same products as peft's give the same representations, and the
    gradients agree to 1e-6.
    """
    if not (_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"):
        return x @ weight.t()
    parts = [
        torch.ops.mkldnn._linear_pointwise(some, columns, None, "none", [], "")
        for some, columns in zip(x.split(_LONGEST_SUM, 1), weight.split(_LONGEST_SUM, 1), strict=True)
    ]
    for part in parts[1:]:
        parts[0].add_(part)
    return cast(Tensor, parts[0])


def layer_of(module: nn.Module, places: dict[int, int]) -> Layer:
    """Return a linear module, plain or peft's, as a ``Layer``; ``places``: id of a parameter -> offset."""
    tuned: Any = module
    base = getattr(tuned, "base_layer", tuned)
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()  # GPT-2's Conv1D: (in, out)
    if base is module:
        return Layer(weight, tuned.bias)
    (name,) = tuned.active_adapters
    a, b = (getattr(tuned, part)[name].weight for part in ("lora_A", "lora_B"))
    start_a, start_b = places[id(a)], places[id(b)]
    return Layer(
        weight,
        base.bias,
        len(a),
        tuned.scaling[name],
        slice(start_a, start_a + a.numel()),
        slice(start_b, start_b + b.numel()),
    )


def _factors(layer: Layer, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's A (m, r, in) and B (m, out, r) as views of the vectors (m, p)."""
    out, width = layer.weight.shape
    a = vectors[:, layer.a].unflatten(1, (layer.rank, width))
    return a, vectors[:, layer.b].unflatten(1, (out, layer.rank))


_ONEDNN = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_LONGEST_SUM = 512  # oneDNN sums a row in one chain: shorter ones round less
