"""What one sample may add, bounded: each sample's rows scaled down to a largest norm.

    clip_C(g_i) = g_i min(1, C / ||g_i||),   g_i (T_i, D): all rows of sample i, taken as one vector

This is the projection on the ball of radius C: it never moves two vectors apart, and whatever came in, what
comes out has a norm of at most C. (M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016,
arXiv:1607.00133, clip the gradients of parameters so; here it is the gradient at a cut.) A sample is clipped
as a whole and not row by row: its rows together tell of it, and T_i rows of norm C would have norm
sqrt(T_i) C. Whatever is not finite becomes zero, so that a norm is never NaN and no sample poisons a sum.

Computed in float64, whatever comes in: in float32 a norm may be off by 1e-7 of itself for every doubling of
D, and the square of 1e20 is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_samples(rows: Tensor, counts: Sequence[int], clip: float) -> Tensor:
    """Return rows (R, D) with each sample's scaled to a norm of at most ``clip``, as float64.

    ``counts`` (B,) says how many of the rows, in order, are of each sample.
    """
    norms = sample_norms(rows, counts)  # (B,)
    factors = clip / norms.clamp_min(clip)  # at most 1
    owner = _owners(counts, rows.device)
    scaled = rows.double() * factors[owner, None]
    # Times zero would not do: zero times infinity is NaN.
    return torch.where(torch.isfinite(norms)[owner, None], scaled, torch.zeros_like(scaled))


def sample_norms(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the norm of each sample's rows (B,), as float64; not finite where one of them is not."""
    squares = rows.double().square().sum(1)  # (R,)
    return squares.new_zeros(len(counts)).index_add(0, _owners(counts, rows.device), squares).sqrt()


def _owners(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return whose each row is, (R,)."""
    return torch.repeat_interleave(torch.tensor(list(counts), dtype=torch.int64, device=device))
