"""LLM4CP as published: the reference's tensor walk, and its weights, as a ``SplitModel``.

Paper: B. Liu, X. Liu, S. Gao, X. Cheng, L. Yang, "LLM4CP: Adapting Large Language Models for Channel
Prediction", JCIN 9(2), 2024, arXiv:2406.14440. One row is one user and one antenna.

Kept on purpose, because a faithful baseline has the faults of its original (``csi.py`` mends them):
the mean and deviation are taken over the whole batch, so a row's output depends on its batch mates;
the delay image is scaled by 1/K and its real and imaginary parts are read as if interleaved; it is
added to the frequency image without going back; positions are added twice; 16 tokens, not 4.
Left out, because they cannot change an output: ``patch_layer_fre``, the temporal embedding, the word
embedding and the positions after the 16th.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlam_app.models.rows import Rows
from fedlam_app.models.split import SplitModel

Scale = tuple[Tensor, Tensor]  # mean and deviation of the batch


class ChannelAttention(nn.Module):
    """sigmoid(fc(mean) + fc(max)), fc = 1x1 conv, ReLU, 1x1 conv: (B, C, T, K) -> (B, C, 1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.fc2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        average, largest = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return torch.sigmoid(self._fc(average) + self._fc(largest))

    def _fc(self, pooled: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(pooled)))


class ResBlock(nn.Module):
    """x + CA(r) r with r = conv(ReLU(conv(x))), 3x3: the paper's CSI attention, (B, C, T, K) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.ca = ChannelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        r = self.conv2(torch.relu(self.conv1(x)))
        return x + self.ca(r) * r


class Embedding(nn.Module):
    """Device side: normalise, patch mixing, CSI attention in delay and frequency, token embedding."""

    def __init__(self, width: int, subcarriers: int, history: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.patch = 4
        self.patch_layer = nn.Linear(self.patch, self.patch)
        self.RB_e = _image_stack(channels, blocks)
        self.RB_f = _image_stack(channels, blocks)
        self.token_conv = nn.Conv1d(2 * subcarriers, width, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.token_conv.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.register_buffer("positions", _sinusoids(history, width), persistent=False)
        self.dropout = nn.Dropout(0.1)
        self.predict_linear_pre = nn.Linear(history, history)

    def forward(self, rows: Rows) -> tuple[Tensor, Scale]:
        """Map histories (B, T, K, 2) to tokens (B, T, D), and keep the batch's mean and deviation."""
        x = rows.history
        mean, deviation = x.mean(), x.std()
        frequency = (x - mean) / deviation  # (B, T, K, 2)
        delay = torch.fft.ifft(torch.view_as_complex(frequency.contiguous()), dim=2)  # (B, T, K)
        delay = torch.cat([delay.real, delay.imag], 2).view(frequency.shape)  # the reference's reading
        image = self.RB_e(self._mix(frequency)) + self.RB_f(self._mix(delay))  # (B, 2, T, K)
        features = image.permute(0, 3, 1, 2).flatten(1, 2)  # (B, 2K, T), re and im interleaved
        tokens = self.token_conv(features).transpose(1, 2) + self.positions  # (B, T, D)
        tokens = self.dropout(tokens)
        return self.predict_linear_pre(tokens.transpose(1, 2)).transpose(1, 2), (mean, deviation)

    def _mix(self, x: Tensor) -> Tensor:
        """Mix the 4 slots of a patch, then lay out as an image: (B, T, K, 2) -> (B, 2, T, K)."""
        batch, slots, carriers, _ = x.shape
        patches = x.reshape(batch, slots // self.patch, self.patch, 2 * carriers)
        mixed = self.patch_layer(patches.transpose(2, 3)).transpose(2, 3)  # (B, T/4, 4, 2K)
        return mixed.reshape(batch, slots, carriers, 2).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Device side: width to 2K, history slots to future slots, undo the normalisation."""

    def __init__(self, width: int, subcarriers: int, history: int, future: int) -> None:
        super().__init__()
        self.out_layer_dim = nn.Linear(width, 2 * subcarriers)
        self.output_layer_time = nn.Linear(history, future)

    def forward(self, tokens: Tensor, scale: Scale) -> Tensor:
        """Map (B, T, D) to the forecast (B, F, K, 2)."""
        mean, deviation = scale
        carriers = self.out_layer_dim(tokens)  # (B, T, 2K)
        slots = self.output_layer_time(carriers.transpose(1, 2)).transpose(1, 2)  # (B, F, 2K)
        return (slots * deviation + mean).unflatten(2, (-1, 2))


def llm4cp(
    backbone: nn.Module,
    width: int,
    *,
    subcarriers: int = 48,
    history: int = 16,
    future: int = 4,
    channels: int = 64,
    blocks: int = 4,
) -> SplitModel:
    """Return the faithful LLM4CP around a backbone of that width; one row (B, T, K, 2) -> (B, F, K, 2)."""
    if history % 4:
        raise ValueError(
            f"LLM4CP mixes patches of 4 slots: the history must be a multiple of 4, got {history}"
        )
    embedding = Embedding(width, subcarriers, history, channels, blocks)
    return SplitModel(embedding, backbone, Head(width, subcarriers, history, future))


def load_reference(model: SplitModel, state: Mapping[str, Tensor]) -> None:
    """Load a ``state_dict`` of the reference implementation (GPT-2); a missing key raises ``KeyError``."""
    prefixes = {
        "patch_layer.": "embedding.patch_layer.",
        "RB_e.": "embedding.RB_e.",
        "RB_f.": "embedding.RB_f.",
        "enc_embedding1.value_embedding.tokenConv.": "embedding.token_conv.",
        "predict_linear_pre.": "embedding.predict_linear_pre.",
        "out_layer_dim.": "head.out_layer_dim.",
        "output_layer_time.0.": "head.output_layer_time.",
        "gpt2.": "backbone.model.",
    }
    ours = model.state_dict()
    renamed = {}
    for name, tensor in state.items():
        for theirs, mine in prefixes.items():
            if name.startswith(theirs):
                key = mine + name[len(theirs) :]
                if key in ours:  # dead parameters of the reference have no counterpart
                    renamed[key] = tensor[: len(ours[key])] if name == "gpt2.wpe.weight" else tensor
    missing = sorted(set(ours) - set(renamed))
    if missing:
        raise KeyError(f"the reference state_dict lacks {len(missing)} tensors, the first is '{missing[0]}'")
    model.load_state_dict(renamed)


def _image_stack(channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        *(ResBlock(channels) for _ in range(blocks)),
        nn.Conv2d(channels, 2, 3, padding=1),
    )


def _sinusoids(length: int, width: int) -> Tensor:
    """Return the fixed positions of Vaswani et al. (2017): (length, width)."""
    angles = torch.arange(length)[:, None] * torch.exp(
        torch.arange(0, width, 2) * (-math.log(10000.0) / width)
    )
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)  # (length, width)
