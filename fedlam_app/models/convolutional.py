"""The convolutional baseline of LLM4CP: an auto-encoder over the time-frequency image of one row.

After the reference (arXiv 2406.14440, baselines): 3x3 convolutions widen the two channels (re, im) and
narrow them again, tanh between them, then a linear map over time takes T slots to F. The reference goes
2-8-...-512-...-2 (about 3 M weights where the widths double); this one is 2-8-16-32-16-8-2 (12 k weights),
which is stated and not tuned. A row is scaled by its own history, as in ``recurrent``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from fedlam_app.models.recurrent import row_scale

_CHANNELS = (2, 8, 16, 32, 16, 8, 2)


class Convolutional(nn.Module):
    """Forecast rows (B, T, K, 2) -> (B, F, K, 2) with 3x3 convolutions and a linear map over time."""

    def __init__(
        self,
        subcarriers: int = 48,
        history: int = 16,
        future: int = 4,
        channels: tuple[int, ...] = _CHANNELS,
    ) -> None:
        super().__init__()
        if channels[0] != 2 or channels[-1] != 2:
            raise ValueError(f"channels are {channels}; the first and the last must be 2 (re, im)")
        layers: list[nn.Module] = []
        for entering, leaving in pairwise(channels):
            layers += [nn.Conv2d(entering, leaving, 3, padding=1), nn.Tanh()]
        self.image = nn.Sequential(*layers[:-1])  # the last convolution is linear: channels are unbounded
        self.time = nn.Linear(history, future)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next F slots of x (B, T, K, 2)."""
        scale = row_scale(x)
        image = self.image((x / scale).permute(0, 3, 1, 2))  # (B, 2, T, K)
        slots = self.time(image.transpose(2, 3))  # (B, 2, K, F)
        return torch.permute(slots, (0, 3, 2, 1)) * scale
