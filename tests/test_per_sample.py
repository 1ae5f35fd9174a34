"""Each sample's gradient is its own: against a loop, against edits of the others, and where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.per_sample import Gradients, clipped_sum, per_sample, refuse
from fedlam_app.config import parse
from fedlam_app.models import backbones, lora
from fedlam_app.models.backbones import Backbone
from fedlam_app.models.split import SplitModel
from fedlam_app.models.text import Classifier, LanguageHead, WordEmbedding
from fedlam_app.tasks.language_modelling import LanguageModelling
from fedlam_app.tasks.text import TextBatch, TextTask
from fedlam_app.tasks.text_classification import TextClassification

WIDTH, VOCABULARY, SAMPLES = 32, 50, 5
FAMILIES = ("bert", "llama", "gpt2")


def transformer(family: str) -> nn.Module:
    """Return two random blocks of a family, which takes vectors."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    if family == "bert":
        config = BertConfig(
            intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape
        )
        return BertModel(config, add_pooling_layer=False)
    if family == "llama":
        return LlamaModel(LlamaConfig(intermediate_size=64, num_key_value_heads=2, use_cache=False, **shape))
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Model(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, **dropout))


LINEARS = {
    "bert": backbones.BERT_LINEARS,
    "llama": backbones.LLAMA_LINEARS,
    "gpt2": backbones.GPT2_LINEARS,
}


def tiny(family: str, ffa: bool = False) -> tuple[TextTask, SplitModel]:
    """Return a task and a model with LoRA whose B is drawn: BERT classifies, the others write."""
    backbone = lora.tune(Backbone(transformer(family), WIDTH, LINEARS[family]), "lora", rank=4)
    table = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
    task: TextTask
    if family == "bert":
        task, head = TextClassification(parse({})), Classifier(WIDTH, 3, 0)
    else:
        task, head = LanguageModelling(parse({})), LanguageHead(table)  # type: ignore[assignment]
    model = SplitModel(WordEmbedding(table), backbone, head).train()
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data = 0.1 * torch.randn(p.shape, generator=draw)
        if ffa and ".lora_A." in name:
            p.requires_grad_(False)
    return task, model


def samples(task: TextTask, seed: int = 3, count: int = SAMPLES) -> list[Any]:
    """Return texts of unlike lengths, as the task takes them; of a language model, of unlike tails."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(0, VOCABULARY, draw.integers(3, 12)).astype(np.int32) for _ in range(count)]
    if isinstance(task, TextClassification):
        return [(one, int(draw.integers(3))) for one in ids]
    return [(one, int(draw.integers(1, len(one)))) for one in ids]


def gradients_of(model: SplitModel, losses: Callable[[], Tensor]) -> Gradients:
    with per_sample(model, model.trainable()) as gradients:
        return gradients(losses())


def shares(found: Gradients, clip: float) -> Tensor:
    """Return what each sample adds to the clipped sum, (B, p)."""
    alone = [clipped_sum([g[i : i + 1] for g in found], clip) for i in range(len(found[0]))]
    return torch.stack([torch.cat([part.flatten() for part in one]) for one in alone])


@pytest.mark.parametrize("ffa", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_per_sample_gradients_are_those_of_a_loop(family: str, ffa: bool) -> None:
    task, model = tiny(family, ffa)
    texts, trained = samples(task), list(model.trainable().values())
    assert ffa != any(".lora_A." in name for name in model.trainable())
    found = gradients_of(model, lambda: task.losses(model, task.collate(texts)))
    for place, text in enumerate(texts):
        alone = torch.autograd.grad(task.loss(model, task.collate([text])), trained)
        for own, all_of_them in zip(alone, found, strict=True):
            assert (all_of_them[place] - own).norm() <= 1e-4 * own.norm()


def token_mean(task: TextTask, model: SplitModel, batch: TextBatch) -> Tensor:
    """Return a sample's share of the mean over all tokens of the batch, as transformers' own loss has it."""
    own = task.losses(model, batch)
    assert batch.texts.rows is not None
    starts = batch.texts.lengths.cumsum(0)
    counts = torch.bincount(torch.searchsorted(starts, batch.texts.rows, right=True), minlength=len(own))
    return own * counts / counts.sum() * len(own)


def change_by_edits(task: TextTask, model: SplitModel, losses: Callable[..., Tensor]) -> float:
    """Edit each sample in turn; return the largest relative change of what another one adds."""
    texts, others = samples(task), samples(task, seed=4)
    clip = 1e3 if losses is token_mean else 0.01  # the mutant shows in what is not clipped
    before = shares(gradients_of(model, lambda: losses(task, model, task.collate(texts))), clip)
    worst = 0.0
    for edited in range(SAMPLES):
        other = [others[i] if i == edited else text for i, text in enumerate(texts)]
        after = shares(gradients_of(model, lambda b=other: losses(task, model, task.collate(b))), clip)  # type: ignore[misc]
        change = (after - before).norm(dim=1) / before.norm(dim=1)
        worst = max(worst, float(change[torch.arange(SAMPLES) != edited].max()))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_adds_the_same_whatever_the_others_are(family: str) -> None:
    task, model = tiny(family)
    assert change_by_edits(task, model, lambda task, model, batch: task.losses(model, batch)) <= 1e-5


def test_a_mean_over_the_batchs_tokens_would_not_pass() -> None:
    task, model = tiny("gpt2")
    assert change_by_edits(task, model, token_mean) > 0.02


def test_a_language_models_loss_of_a_sample_is_its_mean_over_its_own_tokens() -> None:
    task, model = tiny("llama")
    texts = samples(task)
    expected = torch.stack([task.loss(model, task.collate([text])) for text in texts])
    torch.testing.assert_close(task.losses(model, task.collate(texts)), expected)


def drawn(rows: int, scale: float = 1.0) -> Gradients:
    draw = torch.Generator().manual_seed(rows)
    return [scale * torch.randn(rows, *shape, generator=draw) for shape in ((3, 4), (7,), (2, 2, 2))]


def test_the_clipped_sum_is_that_of_opacus() -> None:
    """Their optimiser on the same gradients, without noise; some are clipped and some are not."""
    from opacus.optimizers import DPOptimizer

    found = [g * torch.linspace(0.01, 3.0, 9).view(-1, *[1] * (g.dim() - 1)) for g in drawn(9)]
    parameters = [nn.Parameter(torch.zeros(g.shape[1:])) for g in found]
    theirs = DPOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    for p, g in zip(parameters, found, strict=True):
        p.grad_sample = g  # type: ignore[attr-defined]
    theirs.step()
    for p, mine in zip(parameters, clipped_sum(found, 1.0), strict=True):
        torch.testing.assert_close(mine, -p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e25])
def test_no_sample_adds_more_than_the_clip(scale: float) -> None:
    norms = shares(drawn(20, scale), 0.7).double().norm(dim=1)
    assert float(norms.max()) <= 0.7 * (1 + 1e-6)
    assert scale < 1.0 or float(norms.min()) >= 0.7 * (1 - 1e-5)  # and it is used up


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1.0])
def test_a_sample_of_the_largest_numbers_keeps_to_the_clip(clip: float) -> None:
    """A server may send weights for which a factor has few bits left."""
    huge = 3e38 * torch.linspace(0.5, 1.0, 100_000)[None]
    for found in (huge, huge * 1e-8):
        assert float(clipped_sum([found], clip)[0].double().norm()) <= clip * (1 + 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_adds_nothing(value: float) -> None:
    found, clean = drawn(6), drawn(6)
    found[1][2, 3] = value
    rest = [g[[0, 1, 3, 4, 5]] for g in clean]
    for mine, expected in zip(clipped_sum(found, 1.0), clipped_sum(rest, 1.0), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0.0, atol=0.0)
    nothing = clipped_sum([g[2:3] for g in found], 1.0)
    assert all(not part.any() for part in nothing)


def test_a_loss_that_is_not_finite_leaves_the_other_samples_alone() -> None:
    task, model = tiny("llama")
    batch = task.collate(samples(task))

    def losses(factor: float) -> Tensor:
        return task.losses(model, batch) * torch.tensor([1.0, 1.0, factor, 1.0, 1.0])

    with per_sample(model, model.trainable()) as gradients:  # not the first batch: that one is checked
        clean = gradients(losses(1.0))
        broken = gradients(losses(float("nan")))
    assert not broken[0][2].isfinite().all()
    expected = clipped_sum([g[[0, 1, 3, 4]] for g in clean], 0.1)
    for mine, other in zip(clipped_sum(broken, 0.1), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_model_is_afterwards_as_it_was() -> None:
    task, model = tiny("bert")
    batch = task.collate(samples(task))
    before, attributes = task.loss(model, batch).detach(), {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError), per_sample(model, model.trainable()):
        task.losses(model, batch)  # what this pass left behind must go, too
        raise ZeroDivisionError
    gradients_of(model, lambda: task.losses(model, batch))
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._backward_hooks
        assert set(vars(module)) == attributes[name]
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())
    assert torch.equal(task.loss(model, batch).detach(), before)


# --- what cannot be done ----------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model of one submodule, so that what is refused has a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def adapted(**keys: Any) -> nn.Module:
    """Return the tiny Llama with the adapter that these keys of LoRA ask for."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(transformer("llama"), LoraConfig(r=2, **keys))  # type: ignore[arg-type]


def other(name: str) -> nn.Module:
    """Return the tiny Llama with an adapter that is not LoRA."""
    import peft

    if name == "prompt tuning":
        prompt = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
        return peft.get_peft_model(transformer("llama"), prompt)  # type: ignore[arg-type]
    if name == "IA3":
        vectors = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        return peft.get_peft_model(transformer("llama"), vectors)  # type: ignore[arg-type]
    shared = peft.VeraConfig(r=2, target_modules=["q_proj"])
    return peft.get_peft_model(transformer("llama"), shared)  # type: ignore[arg-type]


def checkpointed() -> nn.Module:
    model: Any = transformer("llama")
    model.gradient_checkpointing_enable()
    return lora.tune(Backbone(model, WIDTH, LINEARS["llama"]), "lora", rank=2)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "prompt tuning": lambda: other("prompt tuning"),
    "IA3": lambda: other("IA3"),
    "VeRA": lambda: other("VeRA"),
    "DoRA": lambda: adapted(target_modules=["q_proj"], use_dora=True),
    "LoRA on embeddings": lambda: adapted(target_modules=["embed_tokens"]),
    "gradient checkpointing": checkpointed,
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "table of embeddings": lambda: transformer("gpt2"),
    "float32": lambda: nn.Linear(3, 3).bfloat16(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_opacus_gets_wrong_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"DP-SGD is not possible on 'inner.*{name}"):
        refuse(Wrapped(REFUSED[name]()))


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["o_proj"], "lora_bias": True},
    ],
)
def test_lora_of_any_kind_passes(keys: dict[str, Any]) -> None:
    refuse(adapted(**keys))


class Tied(nn.Module):
    """A linear whose weight is used once more, past its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) @ self.linear.weight.T


class Alone(nn.Module):
    """A vector that one layer adds to every sample, such as a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift(x.new_ones(1, 1))


@pytest.mark.parametrize(("kind", "name"), [(Tied, "linear.weight"), (Alone, "shift.weight")])
def test_a_gradient_that_is_not_whole_or_not_by_sample_is_an_error(kind: type[nn.Module], name: str) -> None:
    model = kind().train()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with (
        pytest.raises(ValueError, match=f"Opacus does not give per-sample gradients for '{name}'"),
        per_sample(model, dict(model.named_parameters())) as gradients,
    ):
        gradients(model(x).square().sum(1))
