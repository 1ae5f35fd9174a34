"""The front of an input-private split: frozen blocks, one vector a text, a public projection, a clip.

    x = pool(f_1 .. f_c(E))                      the device's frozen front; (D,) a text, however long it is
    u = V^T (x - m) / s                          d public coordinates (``privacy/projection.py``)
    u <- u min(1, C / ||u||)                     so that a text more or less changes what leaves by C at most
    t = m + s V u                                lifted: the one token, (D,), that the edge server works on

Of a text, only u crosses, after noise and once (``clients/released.py``): d numbers, and neither its length
nor its tokens. The front holds adapters (it is a cut of a tuned backbone), but they stay at zero and stand
still, or a released vector would not be the same tomorrow. Evaluation takes the same way without noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedlam_app.models.cut import FrontEmbedding
from fedlam_app.models.split import Tokens, flat, select
from fedlam_app.privacy.projection import Projection


class PooledEmbedding(FrontEmbedding):
    """Device side: a text's words to its one projected token."""

    mean: Tensor  # (D,)
    directions: Tensor  # (D, d)
    scale: Tensor  # ()

    def __init__(self, embedding: nn.Module, front: nn.Module) -> None:
        """``front`` is a :class:`~fedlam_app.models.cut.Front`, or the identity where no block is cut off."""
        super().__init__(embedding, front)
        self.requires_grad_(False)

    def aim(self, projection: Projection, clip: float) -> PooledEmbedding:
        """Set the public projection and the largest norm C of what may leave; returns itself."""
        like = next(self.parameters())
        for name, value in (
            ("mean", projection.mean),
            ("directions", projection.directions),
            ("scale", projection.scale),
        ):
            self.register_buffer(name, torch.as_tensor(value).to(like), persistent=False)
        self.clip = clip
        return self

    @property
    def dimensions(self) -> int:
        """d, the numbers that cross for one text."""
        return self.directions.shape[1]

    def pooled(self, x: Any) -> Tensor:
        """Map B texts to their pooled states (B, D)."""
        tokens, _ = super().forward(x)
        packed = flat(tokens)
        return select(packed.values, packed)

    def vectors(self, x: Any) -> Tensor:
        """Map B texts to what may leave of them once noise is added: (B, d), norms at most C."""
        found = (self.pooled(x) - self.mean) @ self.directions / self.scale
        return found * (self.clip / found.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)

    def lift(self, vectors: Tensor) -> Tensor:
        """Map projected vectors (B, d), noised or not, to tokens (B, D) for the blocks that follow."""
        return self.mean + self.scale * vectors @ self.directions.T

    def forward(self, x: Any) -> tuple[Tokens, None]:
        """Map B texts to B samples of one token, as the edge server would see them without noise."""
        values = self.lift(self.vectors(x))
        return Tokens(values, torch.ones(len(values), dtype=torch.int64, device=values.device)), None
