"""The edge server's pass: one frozen backbone for any number of devices, a low-rank path for each.

    R = f(E; W, {A_k, B_k})                  one forward over the tokens E of all devices
    g_k = (dR_k / d(A_k, B_k))^T J_k         every device's gradient, from one backward with the Jacobians J

g_k is the gradient of device k's own loss l_k, J_k = dl_k/dR_k: nothing is summed over devices, so they
can be clipped, compared or weighted one by one. Equal to working device after device, to rounding.
Tokens come packed; BERT, GPT-2 and Llama run on them as they are (``lean``), other models on samples of
like length, padded. Devices are worked off in chunks. The graphs of the first ``kept_tokens`` tokens are
kept; further chunks keep nothing and run again in ``backward``, so that memory grows by a device's tokens
and gradient only, at the price of a second forward. Passes of at most that many tokens never pay it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlam_app.models.backbones import Backbone
from fedlam_app.models.lean import FANS, Wanted, family
from fedlam_app.models.low_rank import Layer, Paths, Rows, Run, layer_of, linear, segments
from fedlam_app.models.split import Tokens

CHUNK_TOKENS = 1024  # a chunk takes whole devices until it has as many
KEPT_TOKENS = 1024  # for MiniLM, a graph is 18 kB a token and block
LENGTH_STEP = 8  # padded samples share a chunk where their lengths, rounded up to this, are equal


class BatchedBackbone:
    """One frozen backbone for any number of devices, a low-rank path for each.

    A vector (p,) is the backbone's trainable parameters in the order of ``named_parameters``. Tunings
    other than LoRA have no low-rank path: they go device after device, through the same interface; and so
    does everything where ``plain`` asks for the reference.
    """

    def __init__(self, backbone: Backbone, kept_tokens: int = KEPT_TOKENS, *, plain: bool = False) -> None:
        trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        places, start = {}, 0
        for parameter in trainable.values():
            places[id(parameter)] = start
            start += parameter.numel()
        self.size = start  # p
        self._backbone, self._trainable = backbone, trainable
        self._kept_tokens = kept_tokens
        self._adapted = {
            module: layer_of(module, places)
            for module in backbone.modules()
            if hasattr(module, "lora_A") and hasattr(module, "base_layer")
        }
        covered = sum(
            layer.a.stop - layer.a.start + layer.b.stop - layer.b.start for layer in self._adapted.values()
        )
        self._low_rank = covered == start and not plain  # nothing but LoRA trains
        model: Any = backbone.model
        self._core = model.base_model.model if self._adapted else model
        self._family = family(self._core) if self._low_rank else None
        self._layers = dict(self._adapted)
        if self._family is not None:  # plain linears too: there, their products are ours
            for module in self._core.modules():
                inside = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
                if inside and module not in self._layers:
                    self._layers[module] = layer_of(module, places)
        self._chunks: list[_Chunk] = []

    def forward(
        self, vectors: NDArray[Any], rows: Sequence[int] | NDArray[Any], tokens: Tokens, slots: NDArray[Any]
    ) -> Tensor:
        """Representations (R or B, D), in the order of the tokens' rows or samples; detached.

        ``vectors`` (m, p): adapter values; ``rows[k]``: the one that device slot k uses; ``slots`` (B,):
        the device slot of each sample, in any order.
        """
        self.forget()
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ValueError(f"adapter vectors must have shape (m, {self.size}), got {vectors.shape}")
        used, order = np.unique(np.asarray(rows), return_inverse=True)
        like = next(iter(self._trainable.values()))
        self._vectors = torch.as_tensor(vectors[used], dtype=like.dtype, device=like.device)  # (m', p)
        self._rows, self._tokens = order.tolist(), tokens
        alone, padded = not self._low_rank, self._low_rank and self._family is None
        self._chunks = _chunks(tokens, torch.as_tensor(np.asarray(slots)), alone, padded)
        count = len(tokens.lengths if tokens.rows is None else tokens.rows)
        output = tokens.values.new_zeros(count, tokens.values.shape[1])
        kept = 0
        for chunk in self._chunks:
            kept += len(chunk.tokens)
            output[chunk.outputs] = self._run(chunk, graph=kept <= self._kept_tokens)
        return output

    def backward(self, jacobians: Tensor, want_tokens: bool = False) -> tuple[NDArray[Any], Tensor | None]:
        """Gradients (K, p) of every device's own loss and, if wanted, dL/d(token values) (N, D).

        ``jacobians`` (R or B, D) is dl_k/d(representation). The graph is freed.
        """
        # numpy's zeros are untouched memory: nothing is written before the gradients are.
        zeros = np.zeros((len(self._rows), self.size), self._vectors[:0].cpu().numpy().dtype)
        gradients = torch.from_numpy(zeros).to(self._vectors)  # (K, p)
        values = self._tokens.values
        into_tokens = torch.zeros_like(values) if want_tokens else None
        for chunk in self._chunks:
            if chunk.graph is None:
                self._run(chunk, graph=True)
            assert chunk.graph is not None
            leaf, inputs, output, paths = chunk.graph
            chunk.graph = None
            paths.gradients, paths.want_tokens = gradients, want_tokens
            wanted = [leaf, inputs] if want_tokens else [leaf]
            found = torch.autograd.grad(
                output, wanted, jacobians[chunk.outputs].to(output), allow_unused=True
            )
            if not self._low_rank:
                gradients[chunk.slot] += found[0]
            if into_tokens is not None:
                into_tokens[chunk.tokens] = found[1]
        self.forget()
        return gradients.cpu().numpy(), into_tokens

    def forget(self) -> None:
        """Drop the graph without a backward."""
        self._chunks = []

    def _run(self, chunk: _Chunk, graph: bool) -> Tensor:
        """Forward of one chunk; its graph is kept in it where asked."""
        inputs = self._tokens.values.detach()[chunk.tokens]  # (n, D)
        with torch.set_grad_enabled(graph):
            inputs.requires_grad_(graph)
            leaf = self._vectors.new_zeros(())
            if not self._low_rank:
                leaf = self._vectors[self._rows[chunk.slot]].clone()
            leaf.requires_grad_(graph)
            fan = 1 if self._family is None else FANS[self._family]
            paths = Paths(self._vectors, self._rows, leaf, fan=fan)
            if self._family is not None:
                output = self._lean(inputs, chunk, paths)
            else:
                output = chunk.pick(self._states(inputs, chunk, paths))
        if graph:
            chunk.graph = (leaf, inputs, output, paths)
        return output.detach()

    def _lean(self, inputs: Tensor, chunk: _Chunk, paths: Paths) -> Tensor:
        """Representations of a chunk by the lean forward of the model's family."""
        assert self._family is not None

        def apply(module: nn.Module, x: Tensor, rows: Rows, gelu: str = "") -> Tensor:
            return linear(x, self._layers[module], rows.segments, paths, gelu)

        if chunk.wanted is None:
            return chunk.pick(
                self._family(self._core, inputs, chunk.layout, Wanted(chunk.layout, None), apply)
            )
        index, back = torch.unique(chunk.wanted, return_inverse=True)  # ascending
        layout = chunk.layout
        rows = Rows(layout.positions[index], layout.samples[index], layout.slots)
        return self._family(self._core, inputs, layout, Wanted(rows, index), apply)[back]

    def _states(self, inputs: Tensor, chunk: _Chunk, paths: Paths) -> Tensor:
        """Last hidden states of a chunk's packed tokens."""
        layout = chunk.layout
        arguments: dict[str, Any] = {"inputs_embeds": layout.pad(inputs)}
        if not layout.even:
            arguments["attention_mask"] = layout.present().long()
        model = self._backbone.model
        if self._low_rank:
            runs = [
                (start * layout.longest, stop * layout.longest, slot)
                for start, stop, slot in chunk.sample_runs
            ]
            with _patched(self._adapted, runs, paths):
                states = model(**arguments).last_hidden_state
        else:
            parts = paths.anchor.split([p.numel() for p in self._trainable.values()])
            own = {
                name.removeprefix("model."): part.view_as(p)
                for (name, p), part in zip(self._trainable.items(), parts, strict=True)
            }
            states = torch.func.functional_call(model, own, (), arguments).last_hidden_state
        return layout.unpad(states)


@dataclass
class _Chunk:
    """Samples that are worked off together, ordered by device."""

    tokens: Tensor  # (n,) places of its tokens among all
    outputs: Tensor  # (o,) places of its representations among all
    layout: Rows
    wanted: Tensor | None  # (o,) its tokens that are representations; None: the mean of each sample
    sample_runs: list[Run]
    slot: int  # the first device, the only one where devices go one after the other
    graph: tuple[Tensor, Tensor, Tensor, Paths] | None = None

    def pick(self, states: Tensor) -> Tensor:
        """Representations (o, D) of the states (n, D)."""
        if self.wanted is not None:
            return states[self.wanted]
        sums = states.new_zeros(self.layout.count, states.shape[1]).index_add(0, self.layout.samples, states)
        return sums / torch.bincount(self.layout.samples)[:, None]


def _chunks(tokens: Tokens, slots: Tensor, alone: bool, padded: bool) -> list[_Chunk]:
    """Cut samples, ordered by device, into chunks; ``alone``: one device each; ``padded``: like lengths."""
    lengths = tokens.lengths
    starts = lengths.cumsum(0) - lengths
    buckets = (lengths + LENGTH_STEP - 1) // LENGTH_STEP if padded else torch.zeros_like(lengths)
    order = np.lexsort((slots.numpy(), buckets.numpy()))  # by bucket, then device; stable
    groups: list[list[int]] = []
    size, before = 0, (-1, -1)
    for sample in order.tolist():
        here = (int(buckets[sample]), int(slots[sample]))
        if here != before and (alone or size >= CHUNK_TOKENS or here[0] != before[0]):
            groups.append([])
            size = 0
        groups[-1].append(sample)
        size += int(lengths[sample])
        before = here
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (N,)
    chunks = []
    for group in groups:
        samples = torch.tensor(group)
        own = lengths[samples]
        inside = torch.repeat_interleave(torch.arange(len(samples)), own)  # (n,)
        positions = torch.arange(len(inside)) - (own.cumsum(0) - own)[inside]
        places = starts[samples][inside] + positions
        wanted = None
        outputs = samples
        if tokens.rows is not None:
            local = torch.full((len(owner),), -1)
            local[places] = torch.arange(len(places))
            outputs = torch.nonzero(local[tokens.rows] >= 0)[:, 0]
            wanted = local[tokens.rows[outputs]]
            if not len(outputs):
                continue
        runs = segments(slots[samples], torch.ones_like(samples))
        layout = Rows(positions, inside, slots[samples])
        chunks.append(_Chunk(places, outputs, layout, wanted, runs, int(slots[samples[0]])))
    return chunks


@contextmanager
def _patched(adapted: dict[nn.Module, Layer], runs: Sequence[Run], paths: Paths) -> Iterator[None]:
    """Give peft's layers the low-rank paths of all devices, while the model runs."""

    def forward_of(layer: Layer) -> Any:
        def forward(x: Tensor) -> Tensor:
            return linear(x.reshape(-1, x.shape[-1]), layer, runs, paths).view(*x.shape[:-1], -1)

        return forward

    for module, layer in adapted.items():
        module.forward = forward_of(layer)
    try:
        yield
    finally:
        for module in adapted:
            del module.forward
