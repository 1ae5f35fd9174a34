"""The transformer baseline of LLM4CP: encoder and decoder, one forward pass for all future slots.

The reference runs InformerStack with 12 start tokens (arXiv 2406.14440, baselines). With 16 slots there is
nothing for sparse attention to save, so attention is full here: the encoder reads the history, the decoder
reads its last 12 slots followed by F zero slots (Informer's generative decoder, arXiv 2012.07436 §3) and
its last F outputs are the forecast. Small and stated, not tuned: width 96, 4 heads, 2 + 1 layers, no
dropout, fixed sinusoidal positions. A row is scaled by its own history, as in ``recurrent``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedlam_app.models.recurrent import row_scale


class Transformer(nn.Module):
    """Forecast rows (B, T, K, 2) -> (B, F, K, 2) with a small encoder-decoder transformer."""

    positions: Tensor

    def __init__(
        self,
        subcarriers: int = 48,
        history: int = 16,
        future: int = 4,
        width: int = 96,
        heads: int = 4,
        start: int = 12,
    ) -> None:
        super().__init__()
        self.future = future
        self.start = min(start, history)
        self.enter = nn.Linear(2 * subcarriers, width)
        feed = 2 * width
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, feed, 0.0, "gelu", batch_first=True, norm_first=True),
            num_layers=2,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, feed, 0.0, "gelu", batch_first=True, norm_first=True),
            num_layers=1,
        )
        self.leave = nn.Linear(width, 2 * subcarriers)
        self.register_buffer("positions", sinusoids(history + future, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next F slots of x (B, T, K, 2)."""
        scale = row_scale(x)
        slots = (x / scale).flatten(2)  # (B, T, 2K)
        history = slots.shape[1]
        memory = self.encoder(self.enter(slots) + self.positions[:history])
        unknown = slots.new_zeros(len(slots), self.future, slots.shape[2])
        asked = torch.cat([slots[:, history - self.start :], unknown], dim=1)
        places = self.positions[history - self.start : history + self.future]
        answered = self.decoder(self.enter(asked) + places, memory)[:, -self.future :]
        return self.leave(answered).unflatten(2, (-1, 2)) * scale


def sinusoids(length: int, width: int) -> Tensor:
    """Return fixed positions (length, width), width even: sine and cosine (arXiv 1706.03762 §3.5)."""
    place = torch.arange(length)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).flatten(1)
