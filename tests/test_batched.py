"""The batched pass is plain peft, device after device: representations, gradients, dL/dE, to rounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedlam_app.base.keys import rng, seed_of
from fedlam_app.models import batched
from fedlam_app.models.backbones import BERT_LINEARS, GPT2_LINEARS, LLAMA_LINEARS, Backbone
from fedlam_app.models.batched import BatchedBackbone
from fedlam_app.models.lora import tune
from fedlam_app.models.split import Tokens

QUERY_VALUE = {"bert": r".*\.(query|value)", "gpt2": r".*\.c_attn", "llama": r".*\.[qv]_proj"}
ALL = {"bert": BERT_LINEARS, "gpt2": GPT2_LINEARS, "llama": LLAMA_LINEARS}
LENGTHS = (5, 1, 12, 7, 12, 3, 9)
SLOTS = (2, 0, 1, 0, 2, 2, 1)  # unequal batches, in no order


@cache
def tiny(name: str, linears: str = "", tuning: str = "lora", dtype: torch.dtype = torch.float64) -> Backbone:
    """Two blocks of width 24, random, tuned."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    torch.manual_seed(seed_of(1, name))
    sizes: dict[str, Any] = {"vocab_size": 2, "bos_token_id": None, "eos_token_id": None}
    model: Any
    if name == "bert":
        sizes |= {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
        model = BertModel(BertConfig(**sizes, num_attention_heads=3), add_pooling_layer=False)
    elif name == "gpt2":
        sizes |= {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
        model = GPT2Model(GPT2Config(**sizes, use_cache=False))
    else:
        sizes |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
        model = LlamaModel(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
        )
    backbone = Backbone(model, 24, linears or ALL[name]).eval()
    tuned = tune(backbone, tuning, rank=3).to(dtype)
    assert isinstance(tuned, Backbone)
    return tuned


def load_vector(backbone: Backbone, vector: NDArray[Any]) -> None:
    """Put one device's vector into the backbone."""
    flat, start = torch.from_numpy(vector), 0
    with torch.no_grad():
        for p in (p for p in backbone.parameters() if p.requires_grad):
            p.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()


def sequential_gradients(
    backbone: Backbone, vectors: NDArray[Any], rows: list[int], tokens: Tokens, slots: Any, jacobians: Tensor
) -> tuple[Tensor, NDArray[Any], Tensor]:
    """Device after device, sample after sample, with plain peft: R, gradients, dL/dE."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    own = np.concatenate([p.detach().numpy().ravel() for p in parameters])
    ends = tokens.lengths.cumsum(0).tolist()
    output, into_tokens = torch.zeros_like(jacobians), torch.zeros_like(tokens.values)
    gradients = np.zeros((len(rows), len(own)), own.dtype)
    for slot, row in enumerate(rows):
        load_vector(backbone, vectors[row])
        for sample in np.flatnonzero(np.asarray(slots) == slot).tolist():
            start, stop = ends[sample] - int(tokens.lengths[sample]), ends[sample]
            inputs = tokens.values[start:stop].clone().requires_grad_(True)
            states = backbone(inputs[None])[0]  # (S, D)
            mine, chosen = torch.tensor([sample]), states.mean(0, keepdim=True)
            if tokens.rows is not None:
                mine = torch.nonzero((tokens.rows >= start) & (tokens.rows < stop))[:, 0]
                chosen = states[tokens.rows[mine] - start]
            output[mine] = chosen.detach()
            found = torch.autograd.grad(chosen, [*parameters, inputs], jacobians[mine])
            gradients[slot] += np.concatenate([g.numpy().ravel() for g in found[:-1]])
            into_tokens[start:stop] = found[-1]
    load_vector(backbone, own)
    return output, gradients, into_tokens


def adapters(backbone: Backbone, count: int) -> NDArray[np.float64]:
    """(count, p) vectors around the backbone's own, with B away from zero."""
    own = [p.detach().double().numpy().ravel() for p in backbone.parameters() if p.requires_grad]
    start = np.concatenate(own)
    return start + 0.1 * rng(2, "adapters").standard_normal((count, len(start)))


def case(lengths: tuple[int, ...], rows: int, dtype: torch.dtype) -> tuple[Tokens, Tensor]:
    """Tokens of these lengths with ``rows`` wanted ones, drawn with repeats (0: means), and Jacobians."""
    draw = rng(3, "case", *lengths)
    total = sum(lengths)
    values = torch.tensor(draw.standard_normal((total, 24)), dtype=dtype)
    wanted = torch.tensor(draw.integers(0, total, rows)) if rows else None
    jacobians = torch.tensor(draw.standard_normal((rows or len(lengths), 24)), dtype=dtype)
    return Tokens(values, torch.tensor(lengths), wanted), jacobians


def worst(one: Any, other: Any) -> float:
    """Largest relative difference of two arrays, or of two devices' arrays."""
    a, b = (torch.as_tensor(x).double() for x in (one, other))
    return float(max((x - y).norm() / y.norm().clamp(min=1e-30) for x, y in zip(a, b, strict=True)))


def both(
    backbone: Backbone,
    vectors: NDArray[Any],
    rows: list[int],
    tokens: Tokens,
    slots: Any,
    jacobians: Tensor,
    kept: int = batched.KEPT_TOKENS,
) -> tuple[float, float, float]:
    """Relative differences of the batched pass from the sequential one: R, gradients, dL/dE."""
    expected = sequential_gradients(backbone, vectors, rows, tokens, slots, jacobians)
    server = BatchedBackbone(backbone, kept)
    output = server.forward(vectors, rows, tokens, np.asarray(slots))
    gradients, into_tokens = server.backward(jacobians, want_tokens=True)
    assert into_tokens is not None and not output.requires_grad
    assert gradients.dtype == np.asarray(expected[1]).dtype
    server.forward(vectors, rows, tokens, np.asarray(slots))
    again, none = server.backward(jacobians)  # without dL/dE: less work, the same gradients
    assert none is None
    np.testing.assert_array_equal(again, gradients)
    return (
        worst(output, expected[0]),
        worst(gradients, expected[1]),
        worst(into_tokens[None], expected[2][None]),
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("linears", [ALL, QUERY_VALUE], ids=["all", "query-value"])
@pytest.mark.parametrize("rows", [[0, 0, 0], [2, 0, 1]], ids=["one-adapter", "own-adapters"])
@pytest.mark.parametrize("wanted", [0, 9], ids=["mean", "rows"])
def test_one_pass_is_device_after_device(
    name: str, linears: dict[str, str], rows: list[int], wanted: int
) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        backbone = tiny(name, linears[name], dtype=dtype)
        tokens, jacobians = case(LENGTHS, wanted, dtype)
        assert max(both(backbone, adapters(backbone, 3), rows, tokens, SLOTS, jacobians)) <= bound


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(0, 6),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from([1, 12, 1000]),
)
def test_however_the_samples_are_spread(
    samples: list[tuple[int, int]], wanted: int, rows: list[int], at_once: int
) -> None:
    """Any lengths, owners (some devices with none), adapters, and sizes of chunk and of what is kept."""
    lengths, slots = zip(*samples, strict=True)
    backbone = tiny("bert")
    tokens, jacobians = case(lengths, wanted, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "CHUNK_TOKENS", at_once)
        found = both(backbone, adapters(backbone, 3), rows, tokens, slots, jacobians, kept=2 * at_once)
        assert max(found) <= 1e-12


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_without_a_lean_forward_goes_through_its_modules(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "family", lambda model: None)
    backbone = tiny(name)
    tokens, jacobians = case(LENGTHS, 9, torch.float64)
    assert max(both(backbone, adapters(backbone, 3), [1, 2, 0], tokens, SLOTS, jacobians)) <= 1e-12
    assert not any("forward" in vars(module) for module in backbone.modules())  # peft's own again


def test_layer_norms_go_device_after_device() -> None:
    backbone = tiny("bert", tuning="ln")
    tokens, jacobians = case(LENGTHS, 0, torch.float64)
    assert max(both(backbone, adapters(backbone, 2), [1, 0, 1], tokens, SLOTS, jacobians)) <= 1e-12


def test_a_device_moves_no_other_devices_gradient() -> None:
    backbone = tiny("bert")
    tokens, jacobians = case(LENGTHS, 0, torch.float64)
    server, vectors = BatchedBackbone(backbone), adapters(backbone, 1)
    found = []
    for factor in (1.0, -7.0):
        server.forward(vectors, [0, 0, 0], tokens, np.array(SLOTS))
        scaled = jacobians * torch.where(torch.tensor(SLOTS) == 2, factor, 1.0)[:, None]
        found.append(server.backward(scaled)[0])
    np.testing.assert_array_equal(found[0][:2], found[1][:2])
    np.testing.assert_allclose(found[1][2], -7.0 * found[0][2], rtol=1e-9, atol=1e-12)


def test_frozen_weights_exist_once() -> None:
    backbone = tiny("bert")
    held = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    layers = BatchedBackbone(backbone)._layers.values()
    assert layers and all(layer.weight.untyped_storage().data_ptr() in held for layer in layers)


def test_a_vector_of_another_length_is_refused() -> None:
    tokens, _ = case(LENGTHS, 0, torch.float64)
    with pytest.raises(ValueError, match=r"must have shape \(m, \d+\), got \(1, 5\)"):
        BatchedBackbone(tiny("bert")).forward(np.zeros((1, 5)), [0], tokens, np.zeros(7, int))
