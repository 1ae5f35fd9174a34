"""Transformer blocks on packed tokens: no padding outside attention, no work for rows that nobody reads.

The same mathematics as the modules of transformers, from the same frozen weights, written for tokens
(N, D) of many samples one after the other. In the last block only the keys and values need every token:
queries, attention output and MLP run for the ``wanted`` rows alone. With one representation a sample that
is 10/12 of a block, forward and backward. GELU is computed again in backward instead of kept.

BERT: arXiv:1810.04805. GPT-2: Radford et al., 2019. Llama: arXiv:2302.13971, rotary positions
arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlam_app.models.low_rank import Rows


class Linear(Protocol):
    """Apply a linear module, with its low-rank paths, to packed rows; a GELU before it where asked."""

    def __call__(self, module: nn.Module, x: Tensor, rows: Rows, gelu: str = "") -> Tensor: ...


class Wanted(NamedTuple):
    """The rows that are read after the last block."""

    rows: Rows
    places: Tensor | None  # (R,) ascending places among all rows; None: all

    def take(self, x: Tensor) -> Tensor:
        """(N, D) -> (R, D)."""
        return x if self.places is None else x[self.places]


Family = Callable[[Any, Tensor, Rows, Wanted, Linear], Tensor]


def family(model: nn.Module) -> Family | None:
    """Return the lean forward of a model of transformers, ``None`` where there is none."""
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    if name == "BertModel" and not config.is_decoder and not config.add_cross_attention:
        return bert
    if name == "GPT2Model" and not config.add_cross_attention:
        return gpt2
    return llama if name == "LlamaModel" else None


def bert(model: Any, x: Tensor, rows: Rows, wanted: Wanted, linear: Linear) -> Tensor:
    """(N, D) tokens -> (R, D) last hidden states of the wanted rows."""
    places = model.embeddings
    x = x + places.token_type_embeddings.weight[0] + places.position_embeddings.weight[rows.positions]
    x = places.LayerNorm(x)
    for block in model.encoder.layer:
        asks = wanted if block is model.encoder.layer[-1] else Wanted(rows, None)
        attention, own = block.attention, asks.take(x)  # (R, D)
        q = linear(attention.self.query, own, asks.rows)
        k, v = (linear(part, x, rows) for part in (attention.self.key, attention.self.value))
        heads = attention.self.num_attention_heads
        seen = attend(q, k, v, asks.rows, rows, heads=heads, scale=attention.self.scaling)
        own = attention.output.LayerNorm(linear(attention.output.dense, seen, asks.rows) + own)
        inner = linear(block.intermediate.dense, own, asks.rows)  # (R, 4 D)
        inner, gelu = activate(inner, block.intermediate.intermediate_act_fn)
        x = block.output.LayerNorm(linear(block.output.dense, inner, asks.rows, gelu) + own)
    return x


def gpt2(model: Any, x: Tensor, rows: Rows, wanted: Wanted, linear: Linear) -> Tensor:
    """(N, D) tokens -> (R, D) last hidden states of the wanted rows."""
    x = x + model.wpe.weight[rows.positions]
    for block in model.h:
        asks = wanted if block is model.h[-1] else Wanted(rows, None)
        q, k, v = linear(block.attn.c_attn, block.ln_1(x), rows).chunk(3, dim=1)  # (N, D) each
        heads, scale = block.attn.num_heads, block.attn.scaling
        seen = attend(asks.take(q), k, v, asks.rows, rows, heads=heads, scale=scale, causal=True)
        own = asks.take(x) + linear(block.attn.c_proj, seen, asks.rows)  # (R, D)
        inner, gelu = activate(linear(block.mlp.c_fc, block.ln_2(own), asks.rows), block.mlp.act)
        x = own + linear(block.mlp.c_proj, inner, asks.rows, gelu)
    return cast(Tensor, model.ln_f(x))


def llama(model: Any, x: Tensor, rows: Rows, wanted: Wanted, linear: Linear) -> Tensor:
    """(N, D) tokens -> (R, D) last hidden states of the wanted rows."""
    places = torch.arange(rows.longest, device=x.device)[None]
    cos, sin = (table[0] for table in model.rotary_emb(x, position_ids=places))  # (S, d) each
    for block in model.layers:
        asks = wanted if block is model.layers[-1] else Wanted(rows, None)
        attention, normed = block.self_attn, block.input_layernorm(x)
        q = linear(attention.q_proj, asks.take(normed), asks.rows)
        k, v = (linear(part, normed, rows) for part in (attention.k_proj, attention.v_proj))
        q, k = (_turn(part, cos, sin, of.positions) for part, of in ((q, asks.rows), (k, rows)))
        heads = q.shape[1] // attention.head_dim
        seen = attend(q, k, v, asks.rows, rows, heads=heads, scale=attention.scaling, causal=True)
        own = asks.take(x) + linear(attention.o_proj, seen, asks.rows)  # (R, D)
        normed = block.post_attention_layernorm(own)
        gate, up = (linear(part, normed, asks.rows) for part in (block.mlp.gate_proj, block.mlp.up_proj))
        x = own + linear(block.mlp.down_proj, block.mlp.act_fn(gate) * up, asks.rows)
    return cast(Tensor, model.norm(x))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asking: Rows,
    rows: Rows,
    *,
    heads: int,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """Attention within each sample: queries (R, H d) on keys and values (N, G d) -> (R, H d); G divides H."""
    width = q.shape[1] // heads

    def split(x: Tensor, of: Rows) -> Tensor:
        return of.pad(x).unflatten(2, (-1, width)).transpose(1, 2)  # (B, H or G, S, d)

    allowed = None
    if not rows.even or (causal and asking is not rows):
        allowed = rows.present()[:, None, None, :]  # (B, 1, 1, S)
    if causal and allowed is not None:
        asked = asking.pad(asking.positions[:, None].to(q)).squeeze(2)  # (B, S') place of each query
        allowed = allowed & (torch.arange(rows.longest, device=q.device) <= asked[:, None, :, None])
    keys, values = split(k, rows), split(v, rows)
    if keys.shape[1] < heads:
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
    seen = F.scaled_dot_product_attention(
        split(q, asking), keys, values, allowed, is_causal=causal and allowed is None, scale=scale
    )
    return asking.unpad(seen.transpose(1, 2).flatten(2))


def activate(x: Tensor, module: nn.Module) -> tuple[Tensor, str]:
    """Apply an activation module; a GELU is left to the linear that follows, as its approximation's name."""
    gelu = {"GELUActivation": "none", "NewGELUActivation": "tanh"}.get(type(module).__name__, "")
    return (x, gelu) if gelu else (module(x), "")


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of each head of (N, H d) by its row's angle."""
    heads = x.unflatten(1, (-1, cos.shape[1]))  # (N, H, d)
    low, high = heads.chunk(2, dim=2)
    turned = torch.cat((-high, low), dim=2)
    return (heads * cos[positions][:, None] + turned * sin[positions][:, None]).flatten(1)


FANS: dict[Family, int] = {bert: 3, gpt2: 1, llama: 3}  # linears that read the tokens, which come first
