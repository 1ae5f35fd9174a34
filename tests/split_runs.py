"""Split rounds small enough for tests and honest about the wire: tiny backbones, made texts, real messages.

Every message crosses as the protobuf bytes that Flower puts on a socket, both ways, and is read back from
them. :class:`Reference` is the same model unsplit, in plain PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from numpy.typing import NDArray
from torch import nn

from clients.memory import Memory
from fedlam_app import rules
from fedlam_app.base.keys import rng
from fedlam_app.base.records import (
    SplitOrder,
    SplitReport,
    cut,
    decode,
    kind_of,
)
from fedlam_app.base.schedule import learning_rate
from fedlam_app.base.split_payload import Downlink, Uplink, from_bytes, from_integers, position
from fedlam_app.base.vectors import pack, unpack
from fedlam_app.client_app import app
from fedlam_app.config import RunConfig, Scalar, parse
from fedlam_app.experiments.federate import federate
from fedlam_app.grid import InProcessGrid
from fedlam_app.models import backbones
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks import TASKS
from fedlam_app.tasks.base import Task
from strategies.base import Cost
from strategies.split_lora import SplitFederation
from tests.tiny import tiny_run

Flat = dict[str, Scalar]
Client = Callable[[Message, Context], Message]
EXACT: Flat = {
    "model.precision": "float64",
    "wire.embedding": "fp64",
    "wire.representation": "fp64",
    "wire.jacobian": "fp64",
}
FP32: Flat = {"wire.embedding": "fp32", "wire.representation": "fp32", "wire.jacobian": "fp32"}
WIDTH = 32
_runs = itertools.count()


@pytest.fixture(autouse=True)
def tiny_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register BERT, GPT-2 and Llama of width 32 with keyed random weights: import this into a test file."""
    for name, build, like in (
        ("tiny-bert", _bert, "random"),
        ("tiny-gpt2", _gpt2, "random-gpt2"),
        ("tiny-llama", _llama, "smollm2"),
    ):
        source = replace(backbones.SOURCES[like], width=WIDTH, hub="", package="", build=build)
        monkeypatch.setitem(backbones.SOURCES, name, source)
    monkeypatch.setattr(rules, "CAUSAL", (*rules.CAUSAL, "tiny-gpt2", "tiny-llama"))


def text_run(folder: Path, **keys: Scalar) -> Flat:
    """Return a run of 4 devices on 64 texts in unlike shards: four steps an epoch, a step a round."""
    flat: Flat = {
        "job": "train",
        "seed": 7,
        "task": "text-classification",
        "strategy": "fedsgd-lora",
        "text.source": str(_texts(folder / "texts.csv")),
        "text.train": 64,
        "text.test": 12,
        "text.partition": "dirichlet",
        "text.dirichlet": 2.0,
        "text.max-tokens": 16,
        "model.backbone": "tiny-bert",
        "model.blocks": 2,
        "model.rank": 2,
        "model.alpha": 4,
        "train.devices": 4,
        "train.rounds": 6,
        "train.local-steps": 1,
        "train.batch-rows": 4,
        "train.lr": 0.01,
        "split.head-lr": 0.5,
        "federation.server-threads": 1,
        **EXACT,
    }
    return with_keys(flat, **keys)


def channel_run(folder: Path, **keys: Scalar) -> Flat:
    """Return a run of channel prediction on LoRA: the embedding trains, so nothing can be cached."""
    base: Flat = {"strategy": "fedsgd-lora", "model.backbone": "tiny-bert", "split.head-lr": 0.05}
    return with_keys(tiny_run(folder) | base | FP32 | {"federation.server-threads": 1}, **keys)


def with_keys(flat: Flat, **keys: Scalar) -> Flat:
    """Return a run with other values: ``train__local_steps=2`` is ``train.local-steps``."""
    return flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}


class WireGrid(InProcessGrid):
    """The in-process grid behind a socket's serialisation; keeps the raw bytes of every reply."""

    def __init__(self, client: Client, supernodes: int, run_config: Flat) -> None:
        def over_the_wire(message: Message, context: Context) -> Message:
            answer = message_to_proto(client(_crossed(message), context)).SerializeToString()
            self.uplink.append(answer)
            return message_from_proto(MessageProto.FromString(answer))

        super().__init__(over_the_wire, supernodes, run_config)  # type: ignore[arg-type]
        self.uplink: list[bytes] = []


@dataclass(frozen=True)
class Fold:
    """What the rule was given, and where its model stood."""

    step: int
    device: int
    gradient: NDArray[Any]  # (p,)
    weight: float
    at: NDArray[Any]  # (p,)


class Run:
    """A split federation under test, its LoRA started away from B = 0, where A would have no gradient."""

    def __init__(self, flat: Flat, folder: Path, client: Client = app, supernodes: int = 2) -> None:
        self.flat: Flat = {**flat, "results": str(folder / f"run-{next(_runs)}")}
        self.config: RunConfig = parse(self.flat)
        self.task: Task = TASKS[self.config.task](self.config)
        federation: Any = federate(self.config, "{}", self.task, self.task.build_model())
        self.federation: SplitFederation = federation
        self.algorithm = self.federation.algorithm
        self.federation.supernodes = supernodes
        vector = self.lora
        self.start = vector + 0.1 * rng(7, "start").standard_normal(len(vector)).astype(vector.dtype)
        self.algorithm.init(self.start, self.federation.devices, self.algorithm.layout)
        self.grid = WireGrid(client, supernodes, self.flat)
        self.memory = Memory(self.config)  # of the devices, where the workers of this test keep it
        self.folds: list[Fold] = []
        fold = self.algorithm.fold

        def recorded(device: int, gradient: NDArray[Any], weight: float) -> None:
            step = self.algorithm.steps + 1  # type: ignore[attr-defined]  # a rule counts it after its folds
            at = self.algorithm.models()[0].copy()
            self.folds.append(Fold(step, device, gradient.copy(), weight, at))
            fold(device, gradient, weight)

        self.algorithm.fold = recorded  # type: ignore[method-assign]

    def rounds(self, first: int = 1, last: int = 0) -> list[Cost]:
        """Run the rounds ``first`` to ``last`` (0: the last of the run)."""
        last = last or self.config.train.rounds
        return [self.federation.train_round(self.grid, number) for number in range(first, last + 1)]

    @property
    def lora(self) -> NDArray[Any]:
        """The server's vector (p,)."""
        return self.algorithm.models()[0]

    def kept(self, device: int) -> NDArray[Any]:
        """Return a device's own modules, as the memory that the server believes in has them (q,)."""
        return self.memory.load(device, self.federation.known[device])["kept"]

    def payloads(self) -> Iterator[tuple[SplitOrder, int, Downlink, Uplink]]:
        """Yield (order, place in it, what came down, what went up) of every device that answered."""
        for sent, answer in zip(self.grid.delivered[::2], self.grid.delivered[1::2], strict=True):
            if kind_of(sent.content) != "SplitOrder" or answer.has_error():
                continue
            order, report = decode(sent.content, SplitOrder), decode(answer.content, SplitReport)
            downs = cut(order.payload, order.sizes)
            for device, up in zip(report.devices, cut(report.payload, report.sizes), strict=True):
                place = order.devices.index(device)
                yield order, place, from_bytes(downs[place], Downlink), from_bytes(up, Uplink)

    def sent_up(self) -> list[tuple[int, int]]:
        """Return (device, sample) of every embedding that came up, in order, twice where it came twice."""
        found = []
        for order, place, down, up in self.payloads():
            ids = from_integers(down.missing, "<u4").tolist()
            assert len(ids) == len(from_integers(up.lengths))
            found += [(order.devices[place], i) for i in ids]
        return found


class Reference:
    """The unsplit model of a run, in plain PyTorch; ``double`` computes it in double precision."""

    def __init__(self, run: Run, double: bool = False) -> None:
        self.config, self.task = run.config, run.task
        model: SplitModel = run.task.build_model()
        self.model = (model.double() if double else model).train()
        self.lora, self.modules = self.model.server_side(), self.model.device_side()
        self.first = pack(self.modules.values())

    def gradient(self, fold: Fold, modules: NDArray[Any]) -> NDArray[Any]:
        """Return autograd's LoRA gradient (p,) of a device's own batch; the modules' stays in them."""
        unpack(fold.at, self.lora.values())
        unpack(modules, self.modules.values())
        self.model.zero_grad()
        batch = self.task.batch(fold.device, *position(fold.step, self.config.train.local_steps))
        self.task.loss(self.model, batch).backward()
        return pack(p.grad for p in self.lora.values() if p.grad is not None)

    def rate(self, peak: float, step: int) -> float:
        """Return the rate of a step of a schedule with this peak."""
        return learning_rate(peak, self.config.train.rounds, step / self.config.train.local_steps)

    def descend(self, step: int) -> None:
        """Step the device's modules by plain gradient descent."""
        with torch.no_grad():
            for p in self.modules.values():
                p -= self.rate(self.config.split.head_lr, step) * p.grad  # type: ignore[operator]

    def follow(self, folds: list[Fold]) -> Iterator[tuple[Fold, NDArray[Any]]]:
        """Yield every fold with the gradient that it should be, each device with a head of its own."""
        self.heads: dict[int, NDArray[Any]] = {}
        for fold in folds:
            yield fold, self.gradient(fold, self.heads.get(fold.device, self.first))
            self.descend(fold.step)
            self.heads[fold.device] = pack(self.modules.values())

    def tensors(self, vector: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return a vector's parts by the names of the LoRA tensors."""
        ends = np.cumsum([p.numel() for p in self.lora.values()])[:-1]
        return dict(zip(self.lora, np.split(vector, ends), strict=True))


def _crossed(message: Message) -> Message:
    return message_from_proto(MessageProto.FromString(message_to_proto(message).SerializeToString()))


def _texts(path: Path) -> Path:
    """Write 80 texts of 4 to 14 words from 300, whose first word tells their class."""
    if not path.exists():
        draw = rng(7, "made texts")
        lines = ["text,label"]
        for number in range(80):
            label = int(draw.integers(3))
            words = draw.integers(300, size=draw.integers(3, 14))
            text = " ".join([f"class{label}", *(f"w{i}" for i in words), f"n{number}"])
            lines.append(f"{text},kind{label}")
        path.write_text("\n".join(lines) + "\n")
    return path


def _bert(folder: Path | None, blocks: int, positions: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**_shape(blocks), max_position_embeddings=positions, **off)
    model = BertModel(config, add_pooling_layer=False)
    model.embeddings.word_embeddings = None
    return model


def _gpt2(folder: Path | None, blocks: int, positions: int) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    model = GPT2Model(GPT2Config(**_shape(blocks), n_positions=positions, **off))
    model.wte = None
    return model


def _llama(folder: Path | None, blocks: int, positions: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(LlamaConfig(**_shape(blocks), num_key_value_heads=2, use_cache=False))
    model.embed_tokens = None
    for block in model.layers:  # the norms of transformers compute in float32, whatever they are given
        block.input_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        block.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
    model.norm = nn.RMSNorm(WIDTH, eps=1e-6)
    return model


def _shape(blocks: int) -> dict[str, Any]:
    """Return what the three families have in common; weights wide enough that attention is not flat."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": blocks, "num_attention_heads": 4}
    return shape | {"intermediate_size": 48, "vocab_size": 1, "initializer_range": 0.2}
