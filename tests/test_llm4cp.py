"""The faithful LLM4CP equals the reference, and has its faults; the clean one does not."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fedlam_app.config import parse
from fedlam_app.models import backbones, predictors
from fedlam_app.models.llm4cp import llm4cp, load_reference
from fedlam_app.models.rows import Rows
from fedlam_app.models.split import SplitModel

SHAPE = predictors.Shape(history=16, future=4, subcarriers=48)


def _fill(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that anyone can make again: a sine per parameter, with a phase from its name."""
    phase = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 1000
    values = 0.05 * torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * 0.7 + phase)
    norm = name.split(".")[-2].startswith("ln_") and name.endswith("weight")
    return (values + norm).reshape(shape).float()


def _reference_state(model: SplitModel) -> dict[str, torch.Tensor]:
    """The reference's names for the model's tensors, with a dead parameter among them."""
    renames = {
        "embedding.token_conv.": "enc_embedding1.value_embedding.tokenConv.",
        "head.output_layer_time.": "output_layer_time.0.",
        "backbone.model.": "gpt2.",
        "embedding.": "",
        "head.": "",
    }
    state = {"patch_layer_fre.weight": torch.zeros(4, 4)}
    for name, tensor in model.state_dict().items():
        ours = next(prefix for prefix in renames if name.startswith(prefix))
        theirs = renames[ours] + name[len(ours) :]
        shape = torch.Size([1024, 768]) if theirs == "gpt2.wpe.weight" else tensor.shape
        state[theirs] = _fill(theirs, shape)
    return state


def _faithful() -> SplitModel:
    return llm4cp(backbones.load("random-gpt2", blocks=2), 768, channels=8, blocks=1).eval()


def test_faithful_equals_the_reference_on_its_state_dict() -> None:
    """Numbers printed by the authors' own code (commit 441af011) for these weights and this input."""
    model = _faithful()
    load_reference(model, _reference_state(model))
    n = torch.arange(3 * 16 * 96, dtype=torch.float64)
    x = torch.sin(n * 0.37).float() + 0.1 * torch.cos(n.float() * 0.11)
    with torch.no_grad():
        y = model(Rows(x.reshape(3, 16, 48, 2))).flatten(2)  # (3, 4, 96)
    first = [0.40729090571403503, -0.6676724553108215, 0.7552847266197205, -0.8035857081413269]
    last = [1.3705275058746338, -1.2500636577606201, 1.0854287147521973, -0.6257980465888977]
    torch.testing.assert_close(y[0, 0, :4], torch.tensor(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[2, 3, -4:], torch.tensor(last), rtol=1e-4, atol=1e-5)
    assert float(y.double().square().sum()) == pytest.approx(591.3039050377034, rel=1e-5)


def test_a_reference_state_dict_with_a_hole_is_refused() -> None:
    model = _faithful()
    state = _reference_state(model)
    del state["RB_e.1.ca.fc2.weight"]
    with pytest.raises(KeyError, match=r"lacks 1 tensors.*RB_e\.1\.ca\.fc2\.weight"):
        load_reference(model, state)


def _clean(anchor: str = "none", **keys: str | int) -> SplitModel:
    config = parse(
        {"model.backbone": "random", "model.blocks": 2, "model.anchor": anchor}
        | {f"model.{key}": value for key, value in keys.items()}
    )
    model = predictors.build(config.model, 3, SHAPE)
    # At the start LoRA and gates are zero: move every parameter, so that the whole model is exercised.
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in model.trainable().values():
            p += 0.01 * torch.randn(p.shape, generator=generator)
    return model.eval()


def _rows(batch: int, anchored: bool) -> Rows:
    generator = torch.Generator().manual_seed(1)
    history = torch.randn(batch, 16, 48, 2, generator=generator)
    return Rows(history, torch.randn(batch, 4, 48, 2, generator=generator) if anchored else None)


@pytest.mark.parametrize("anchor", ["none", "ar"])
def test_a_clean_row_does_not_depend_on_its_batch_mates(anchor: str) -> None:
    model, rows = _clean(anchor), _rows(8, anchor != "none")
    loud = Rows(*(None if x is None else torch.cat([x[:1], 100.0 * x[1:]]) for x in rows))
    alone = Rows(*(None if x is None else x[:1] for x in rows))
    with torch.no_grad():
        together, among_loud, single = model(rows)[:1], model(loud)[:1], model(alone)
    scale = single.abs().max()
    assert (together - single).abs().max() / scale < 1e-5
    assert (among_loud - single).abs().max() / scale < 1e-5


def test_the_faithful_row_does_depend_on_its_batch_mates() -> None:
    """Fault F5 of the reference, kept in the faithful model: the reason for the clean one."""
    model, rows = _faithful(), _rows(8, False)
    loud = Rows(torch.cat([rows.history[:1], 3.0 * rows.history[1:]]))
    with torch.no_grad():
        assert (model(loud)[0] - model(rows)[0]).abs().max() > 1e-2


def test_a_clean_forecast_turns_with_a_common_phase_and_grows_with_scale() -> None:
    model, rows = _clean(), _rows(4, False)
    turned = torch.view_as_real(torch.view_as_complex(rows.history) * torch.exp(torch.tensor(0.8j)))
    with torch.no_grad():
        y = torch.view_as_complex(model(rows).contiguous())
        z = torch.view_as_complex(model(Rows(turned)).contiguous())
    torch.testing.assert_close(z, y * torch.exp(torch.tensor(0.8j)), rtol=1e-3, atol=1e-4)


def test_an_anchored_model_starts_at_its_anchor() -> None:
    config = parse({"model.backbone": "random", "model.blocks": 1, "model.anchor": "ar"})
    model, rows = predictors.build(config.model, 0, SHAPE), _rows(4, True)
    assert rows.anchor is not None
    torch.testing.assert_close(model(rows), rows.anchor, rtol=1e-5, atol=1e-5)


def test_an_anchored_model_without_an_anchor_says_so() -> None:
    with pytest.raises(ValueError, match="needs rows with an anchor"):
        _clean("ar")(_rows(2, False))


@pytest.mark.parametrize("name", list(predictors.PREDICTORS))
def test_every_predictor_is_seeded_and_every_trainable_parameter_can_learn(name: str) -> None:
    config = parse({"model.name": name, "model.backbone": "random", "model.blocks": 1})
    one, two, other = (predictors.build(config.model, seed, SHAPE) for seed in (5, 5, 6))
    rows = _rows(4, False)
    torch.manual_seed(0)
    output = one(rows)
    assert output.shape == (4, 4, 48, 2)
    state = two.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())
    different = other.state_dict()
    assert any(not torch.equal(tensor, different[key]) for key, tensor in one.state_dict().items())
    with torch.no_grad():  # leave the zero initialisations, which block gradients by design
        for p in one.trainable().values():
            p += 0.01 * torch.randn_like(p)
    one(rows).square().sum().backward()
    dead = [key for key, p in one.trainable().items() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize(("backbone", "width"), [("random", 384), ("random-gpt2", 768)])
def test_at_most_five_percent_travels(backbone: str, width: int) -> None:
    config = parse({"model.backbone": backbone})
    model = predictors.build(config.model, 0, SHAPE)
    assert model.backbone.width == width
    assert model.trainable_share() <= 0.05
    assert 4 * sum(p.numel() for p in model.trainable().values()) <= 6.5e6


def test_layer_norm_tuning_trains_norms_only() -> None:
    model = _clean(tuning="ln")
    inside = [key for key in model.trainable() if key.startswith("backbone.")]
    assert inside and all("LayerNorm" in key for key in inside)


def test_without_a_backbone_embedding_and_head_meet() -> None:
    assert _clean(backbone="none", tuning="ln")(_rows(2, False)).shape == (2, 4, 48, 2)


def test_an_anchor_without_noise_is_left_alone() -> None:
    """A row whose taps are all strong and clean gives the gate nothing to open for."""
    model = _clean("ar")
    slots = torch.arange(16, dtype=torch.float64)
    history = torch.exp(2j * torch.pi * 0.05 * slots)[:, None] * torch.ones(48)  # one tap, one ray, no noise
    rows = Rows(torch.view_as_real(history.to(torch.complex64))[None].contiguous(), torch.randn(1, 4, 48, 2))
    assert rows.anchor is not None
    first = torch.view_as_complex(rows.anchor).mean(-1)  # tap 0 of the anchor, up to sqrt(K)
    with torch.no_grad():
        forecast = torch.view_as_complex(model(rows).contiguous()).mean(-1)
    torch.testing.assert_close(forecast, first, rtol=0, atol=1e-2)
