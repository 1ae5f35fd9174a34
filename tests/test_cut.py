"""A cut inside the backbone changes nothing that is computed: outputs, gradients, and a whole split step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlam_app.base.keys import rng, seed_of
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.vectors import pack
from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.models import batched
from fedlam_app.models.backbones import BERT_LINEARS, GPT2_LINEARS, LLAMA_LINEARS, Backbone, NoBackbone
from fedlam_app.models.batched import BatchedBackbone
from fedlam_app.models.cut import cut, on_device
from fedlam_app.models.factors import layout_of
from fedlam_app.models.lora import tune
from fedlam_app.models.predictors import Shape, build
from fedlam_app.models.rows import Rows
from fedlam_app.models.split import SplitModel, Tokens
from fedlam_app.tasks.text_classification import TextClassification
from strategies.split_lora import SplitFederation

BLOCKS = 3
FAMILIES = ["bert", "gpt2", "llama"]
LINEARS = {"bert": BERT_LINEARS, "gpt2": GPT2_LINEARS, "llama": LLAMA_LINEARS}
LENGTHS = (5, 1, 12, 7)


def tiny(name: str, tuning: str = "lora") -> Backbone:
    """Three blocks of width 24, tuned, all of them random, in float64."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    torch.manual_seed(seed_of(1, name))
    sizes: dict[str, Any] = {"vocab_size": 2, "bos_token_id": None, "eos_token_id": None}
    model: Any
    if name == "bert":
        sizes |= {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": BLOCKS}
        model = BertModel(BertConfig(**sizes, num_attention_heads=3), add_pooling_layer=False)
        model.embeddings.word_embeddings = None
    elif name == "gpt2":
        sizes |= {"n_embd": 24, "n_layer": BLOCKS, "n_head": 3, "n_positions": 16}
        model = GPT2Model(GPT2Config(**sizes, use_cache=False))
        model.wte = None
    else:
        sizes |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": BLOCKS}
        model = LlamaModel(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
        )
        model.embed_tokens = None
    backbone = tune(Backbone(model, 24, LINEARS[name]).eval(), tuning, rank=3).to(torch.float64)
    assert isinstance(backbone, Backbone)
    for parameter in backbone.parameters():  # frozen ones too: a norm that does nothing would hide a mistake
        noise = rng(2, "tuned", name, parameter.numel()).standard_normal(tuple(parameter.shape))
        parameter.data += 0.1 * torch.from_numpy(noise)
    return backbone


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def tokens_of(rows: int) -> Tokens:
    draw = rng(3, "tokens")
    values = torch.from_numpy(draw.standard_normal((sum(LENGTHS), 24))).requires_grad_(True)
    wanted = torch.from_numpy(draw.integers(0, sum(LENGTHS), rows)) if rows else None
    return Tokens(values, torch.tensor(LENGTHS), wanted)


def gradients(output: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.from_numpy(rng(4, "upstream").standard_normal(tuple(output.shape)))
    return torch.autograd.grad(output, of, upstream)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blocks", range(1, BLOCKS))
@pytest.mark.parametrize("rows", [0, 9], ids=["mean", "rows"])
def test_the_parts_are_the_whole(name: str, blocks: int, rows: int) -> None:
    tokens, whole = tokens_of(rows), tiny(name)
    output = whole(tokens)
    expected = gradients(output, *trainable(whole), tokens.values)
    front, rest = cut(tiny(name), blocks)
    assert len(trainable(front)) * (BLOCKS - blocks) == len(trainable(rest)) * blocks > 0
    states = front(tokens)
    assert isinstance(states, Tokens)
    same(rest(states), output)
    same(gradients(rest(states), *trainable(front, rest), tokens.values), expected)
    packed = tokens.values[: LENGTHS[0]][None]  # a batch of one length crosses unpacked
    same(rest(front(packed)), whole(packed))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lean", [True, False])
def test_the_server_batches_the_rest(name: str, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge server's pass over the rest, and its gradients of the tokens, pulled through the front."""
    if not lean:
        monkeypatch.setattr(batched, "family", lambda model: None)
    tokens, whole = tokens_of(9), tiny(name)
    output = whole(tokens)
    expected = gradients(output, *trainable(whole), tokens.values)
    front, rest = cut(tiny(name), 1)
    states = front(tokens)
    assert isinstance(states, Tokens)
    server = BatchedBackbone(rest)
    vector = pack(trainable(rest))
    crossed = Tokens(states.values.detach(), *states[1:])
    same(server.forward(vector[None], [0], crossed, np.zeros(len(LENGTHS), int)), output)
    upstream = torch.from_numpy(rng(4, "upstream").standard_normal(tuple(output.shape)))
    own, into = server.backward(upstream, want_tokens=True)
    assert into is not None
    mine = torch.autograd.grad(states.values, [*trainable(front), tokens.values], into)
    parts = [part.ravel() for part in expected]
    count = len(trainable(front))
    same(torch.cat([g.ravel() for g in mine]), torch.cat([*parts[:count], parts[-1]]))
    same(torch.from_numpy(own[0]), torch.cat(parts[count:-1]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tuning", ["lora", "ln", "full"])
def test_a_vector_of_the_whole_is_one_of_the_parts(name: str, tuning: str) -> None:
    """Every parameter is in one part, the trainable ones in the same order, under names of their own."""
    whole = SplitModel(nn.Identity(), tiny(name, tuning), nn.Identity())
    parts = on_device(SplitModel(nn.Identity(), tiny(name, tuning), nn.Identity()), 1)
    np.testing.assert_array_equal(pack(parts.trainable().values()), pack(whole.trainable().values()))
    assert len(parts.trainable()) == len(whole.trainable())
    assert len(list(parts.parameters())) == len(list(whole.parameters()))
    assert parts.trainable_share() == whole.trainable_share()
    pairs = [layout_of(model, 1.0).pairs for model in (whole, parts)]
    assert [(p.a, p.b, p.rank) for p in pairs[0]] == [(p.a, p.b, p.rank) for p in pairs[1]]
    assert {p.name for p in pairs[1]} == {p.name for p in layout_of(parts, 1.0).pairs}
    assert len({p.name for p in pairs[1]}) == len(pairs[1])


def test_channel_predictors_can_be_cut_too() -> None:
    config = parse({"model.backbone": "random", "model.blocks": 2}).model
    models = [build(config, 1, Shape(16, 4, 48)).eval() for _ in range(2)]
    rows = Rows(torch.from_numpy(rng(5, "rows").standard_normal((3, 16, 48, 2))).float())
    with torch.no_grad():
        torch.testing.assert_close(on_device(models[0], 1)(rows), models[1](rows), rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [BLOCKS, BLOCKS + 4])
def test_a_cut_that_leaves_nothing_to_the_server_is_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"'split.device-blocks' = {blocks} .* of the 3 .* at most 2 "):
        cut(tiny("bert"), blocks)
    with pytest.raises(ValueError, match=r"'split.device-blocks' = 1 needs a backbone of several blocks"):
        cut(NoBackbone(24), 1)


# --- a run ------------------------------------------------------------------------------------------

RUN: dict[str, Scalar] = {
    "job": "train",
    "task": "text-classification",
    "model.backbone": "random",
    "model.blocks": 2,
    "model.precision": "float64",
    "text.train": 24,
    "text.test": 8,
    "text.max-tokens": 16,
    "train.devices": 3,
    "train.rounds": 2,
    "train.local-steps": 1,
    "train.batch-rows": 4,
    "train.clip-norm": 0.0,
    "train.weight-decay": 0.0,
    "split.device-blocks": 1,
    "split.heads": "averaged",
    "split.average-every": 1,
    "wire.embedding": "fp64",
    "wire.representation": "fp64",
    "wire.jacobian": "fp64",
    "wire.stochastic": False,
    "wire.delta": False,
    "server.optimiser": "sgd",
    "server.momentum": 0.0,
    "federation.server-threads": 1,
}


def after_rounds(flat: dict[str, Scalar], rounds: int) -> SplitFederation:
    config = parse(flat)
    task = TextClassification(config)
    federation = federate(config, json.dumps({}), task, task.build_model())
    assert isinstance(federation, SplitFederation)
    grid = InProcessGrid(app, config.federation.supernodes, flat)
    for number in range(1, rounds + 1):
        assert not federation.train_round(grid, number).failures
    return federation


def whole_vector(federation: SplitFederation) -> Any:
    return federation.modules.whole(federation.algorithm.models()[0])


def test_a_split_step_is_descent_on_the_pooled_batch_of_the_uncut_model(tmp_path: Path) -> None:
    """Heads and fronts are averaged after every step, so device, server and pooled descent are one."""
    flat = {**RUN, "results": str(tmp_path), "strategy": "fedsgd-lora"}
    config = parse({**flat, "split.device-blocks": 0})
    task = TextClassification(config)
    model = task.build_model()
    parameters = list(model.trainable().values())
    server = np.concatenate(
        [np.full(p.numel(), n in model.server_side()) for n, p in model.trainable().items()]
    )
    assert server.any()
    blocks = np.concatenate([np.full(p.numel(), ".layer.0." in n) for n, p in model.trainable().items()])
    train = config.train
    for number in (1, 2):
        batches = [task.batch(k, number, 0) for k in range(3)]
        total = sum(task.weight(batch) for batch in batches)
        loss = sum((task.weight(b) / total * task.loss(model, b) for b in batches), torch.tensor(0.0))
        found = pack(torch.autograd.grad(loss, parameters))
        on_server = learning_rate(train.lr, train.rounds, number)
        device = learning_rate(config.split.head_lr, train.rounds, number)
        vector = pack(parameters) - np.where(server & ~blocks, on_server, device) * found
        start = 0
        for p in parameters:
            p.data.copy_(torch.from_numpy(vector[start : start + p.numel()]).view_as(p))
            start += p.numel()
    before = pack(task.build_model().trainable().values())
    got = whole_vector(after_rounds(flat, 2))
    for part in (server & blocks, server & ~blocks, ~server):  # front, rest, head: each has moved
        assert np.linalg.norm(vector[part] - before[part]) > 0
        np.testing.assert_allclose(got[part], vector[part], rtol=1e-10, atol=1e-12)


def test_sequential_splitlora_runs_on_its_own_cut(tmp_path: Path) -> None:
    """The baseline: SplitLoRA's cut, its loop over the devices, and adapters that are averaged every R."""
    own: dict[str, Scalar] = {"strategy": "splitlora", "split.cache": False, "split.average-every": 2}
    own |= {"model.precision": "float32", "results": str(tmp_path)}
    own |= dict.fromkeys(("wire.embedding", "wire.representation", "wire.jacobian"), "fp32")
    federation = after_rounds({**RUN, **own}, 2)
    assert federation.modules.number == 1  # averages
    named = TextClassification(parse({**RUN, **own})).build_model().trainable()
    front = np.concatenate([np.full(p.numel(), ".front." in name) for name, p in named.items()])
    moved = whole_vector(federation) - pack(named.values())
    assert np.abs(moved[front]).max() > 0 and np.isfinite(moved).all()


def test_token_ids_cannot_stand_for_states(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'wire.embedding' = 'token-ids' .* 'split.device-blocks' = 1"):
        TextClassification(parse({**RUN, "wire.embedding": "token-ids"})).build_model()
