"""LLM4CP, clean: delay-Doppler tokens | frozen transformer + LoRA | a Wiener predictor that it steers.

After LLM4CP (arXiv:2406.14440), with its faults mended: each row stands alone (per-user scale, no batch
statistics), the delay image is orthonormal and complex, tokens are patches, and no parameter is dead.

    embedding   row (T, K) -> delay taps d_k = K^-1/2 sum_m H_m exp(2 pi i m k / K). Taps of similar delay
                form G groups; the T x T covariance of each group gives its Capon spectrum on J Doppler
                shifts. A token is a patch of that delay-Doppler plane (G / S spectra) with the row's delay
                profile: features that do not change with a common phase or scale.
    backbone    S tokens, frozen and adapted.
    head        each token corrects its groups' log spectrum and sets their noise and the gates of their
                taps; ``STEPS`` likelihood steps sharpen the spectrum against the group's covariance; the
                MMSE predictor of that spectrum maps the taps' history to their future; back by DFT.

So the large model does not regress 4 x 48 numbers: it estimates the statistics that make a linear
predictor optimal, which is what has to generalise over users and scenarios. ``side`` (taps, covariance,
spectrum) stays on the device.

Anchored, the row's forecast y only corrects the forecast z of its whole user (see ``tasks``):
z + g (y - z) per tap and slot. The tokens set the gate g, which is zero at the start and never larger than
the noise's share of the tap's amplitude: a whole user knows its strong taps better than a row does, so
little data cannot make an anchored model worse than its anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedlam_app.models import doppler
from fedlam_app.models.rows import Rows
from fedlam_app.models.split import SplitModel

ATOMS = 32  # Doppler shifts J on the grid
MAX_DOPPLER = 0.15  # cycles a slot: 135 km/h at 2.4 GHz and 0.5 ms
GROUPS = (0, 3 / 48, 6 / 48, 12 / 48)  # where each group of taps starts, as a share of all delays
TOKENS = 2  # S; each carries G / S groups
STEPS = 2  # likelihood steps


class Side(NamedTuple):
    """What the device keeps for its head."""

    taps: Tensor  # (B, T, K) complex, unit mean power
    amplitude: Tensor  # (B, 1, 1)
    covariance: Tensor  # (B, G, T, T) complex128, unit mean diagonal
    log_spectrum: Tensor  # (B, G, J)
    doubt: Tensor  # (B, K) share of noise in each tap's amplitude, at most 1
    anchor: Tensor | None  # (B, F, K) complex taps of the anchor forecast


class Plane(nn.Module):
    """The fixed delay-Doppler plane of a row shape: which tap is in which group, and the atoms."""

    members: Tensor
    late: Tensor
    past: Tensor
    future: Tensor

    def __init__(self, subcarriers: int, history: int, future: int) -> None:
        super().__init__()
        tap = torch.arange(subcarriers)
        # Leakage of the first taps wraps around: the last quarter counts as close to zero delay.
        delay = torch.where(tap < 3 * subcarriers // 4, tap, subcarriers - tap)
        edges = torch.tensor([round(share * subcarriers) for share in GROUPS])
        group = torch.bucketize(delay, edges, right=True) - 1
        members = group == torch.arange(len(GROUPS))[:, None]
        grid = torch.linspace(-MAX_DOPPLER, MAX_DOPPLER, ATOMS)
        constants = {
            "members": members.float(),  # (G, K)
            "late": delay.topk(max(1, subcarriers // 3)).indices,  # taps that hold little but noise
            "past": doppler.atoms(grid, 0, history),  # (T, J)
            "future": doppler.atoms(grid, history, future),  # (F, J)
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)


class Embedding(nn.Module):
    """Device side: rows to delay-Doppler tokens."""

    def __init__(self, plane: Plane, width: int) -> None:
        super().__init__()
        self.plane = plane
        groups, taps = plane.members.shape
        features = groups // TOKENS * (1 + ATOMS) + taps + 2
        self.weight = nn.Parameter(torch.randn(TOKENS, features, width) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(TOKENS, width))

    def forward(self, rows: Rows) -> tuple[Tensor, Side]:
        """Map histories (B, T, K, 2) to tokens (B, S, D)."""
        taps = _to_taps(rows.history)  # (B, T, K)
        profile = taps.abs().square().mean(1)  # (B, K)
        power = profile.mean(-1, keepdim=True) + 1e-12  # (B, 1)
        taps, profile = taps / power.sqrt()[..., None], profile / power

        members = self.plane.members  # (G, K)
        grouped = taps[:, None] * members[None, :, None]  # (B, G, T, K)
        covariance = grouped @ grouped.mH / members.sum(-1)[:, None, None]  # (B, G, T, T)
        level = covariance.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None] + 1e-6  # (B, G, 1)
        covariance = (covariance / level[..., None]).to(torch.complex128)
        # A weak group is mostly noise: its covariance needs more loading to be inverted.
        loading = 0.02 + 0.01 / level[..., None]
        log_spectrum = doppler.capon(covariance, self.plane.past, loading).log().float()  # (B, G, J)

        spectra = torch.cat([0.3 * level.log(), 0.5 * (log_spectrum + 4.0)], -1)  # (B, G, 1 + J)
        noise = profile[:, self.plane.late].mean(-1, keepdim=True)  # (B, 1)
        row = 0.3 * torch.cat([profile + 1e-3, power, noise + 1e-6], -1).log()  # (B, K + 2)
        features = torch.cat(
            [spectra.reshape(len(taps), TOKENS, -1), row[:, None].expand(-1, TOKENS, -1)], -1
        )
        tokens = torch.einsum("bsf,sfd->bsd", features, self.weight) + self.bias
        anchor = None if rows.anchor is None else _to_taps(rows.anchor)  # (B, F, K)
        doubt = ((noise + 1e-6) / (profile + 1e-6)).clamp(max=1.0).sqrt()  # (B, K)
        return tokens, Side(taps, power.sqrt()[..., None], covariance, log_spectrum, doubt, anchor)


class Head(nn.Module):
    """Device side: tokens to Doppler spectra, and spectra to the forecast."""

    def __init__(self, plane: Plane, width: int, anchored: bool) -> None:
        super().__init__()
        self.plane = plane
        groups, taps = plane.members.shape
        self.spectra = nn.Parameter(1e-3 * torch.randn(TOKENS, width, groups // TOKENS * (ATOMS + 1)))
        start = torch.zeros(TOKENS, groups // TOKENS, ATOMS + 1)
        start[..., -1] = -3.0  # log noise relative to the group's power
        self.spectra_bias = nn.Parameter(start.flatten(1))
        self.trust = nn.Parameter(torch.ones(groups, 1))  # in the Capon spectrum
        self.gates = nn.Linear(TOKENS * width, taps)
        nn.init.zeros_(self.gates.weight)
        nn.init.constant_(self.gates.bias, 2.0)  # nearly open
        self.residual = Residual(width, taps, plane.future.shape[0]) if anchored else None

    def forward(self, tokens: Tensor, side: Side) -> Tensor:
        """Map (B, S, D) to the forecast (B, F, K, 2)."""
        past, members = self.plane.past, self.plane.members
        out = torch.einsum("bsd,sdo->bso", tokens, self.spectra) + self.spectra_bias
        out = out.reshape(len(tokens), len(members), ATOMS + 1)  # (B, G, J + 1)
        logits = (out[..., :-1] + self.trust * side.log_spectrum).double()
        spectrum = torch.softmax(logits, -1)  # (B, G, J)
        noise = out[..., -1].double().exp() + 1e-4  # (B, G)
        for _ in range(STEPS):
            spectrum = doppler.likelier(spectrum, noise, side.covariance, past)
        predictor = doppler.mmse_predictor(spectrum, noise, past, self.plane.future)  # (B, G, F, T)
        predictor = predictor.to(side.taps.dtype)
        future = ((predictor @ side.taps[:, None]) * members[:, None]).sum(1)  # (B, F, K)
        gate = torch.sigmoid(self.gates(tokens.flatten(1)))  # (B, K)
        future = future * gate[:, None] * side.amplitude
        if self.residual is not None:
            future = self.residual(future, tokens, side)
        return torch.view_as_real(torch.fft.fft(future, norm="ortho"))


class Residual(nn.Module):
    """Anchor z plus gated correction: z + g (y - z), g = 0 at the start and |g| <= doubt."""

    def __init__(self, width: int, taps: int, future: int) -> None:
        super().__init__()
        self.gate = nn.Linear(TOKENS * width, taps)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.slot = nn.Parameter(torch.ones(future, 1))

    def forward(self, forecast: Tensor, tokens: Tensor, side: Side) -> Tensor:
        """Blend the row's forecast (B, F, K) with the anchor's taps."""
        if side.anchor is None:
            raise ValueError("an anchored model needs rows with an anchor forecast, got none")
        gate = torch.tanh(self.gate(tokens.flatten(1))[:, None] * self.slot)  # (B, F, K)
        gate = gate * side.doubt[:, None]
        return side.anchor + gate * (forecast - side.anchor)


def llm4cp_clean(
    backbone: nn.Module, width: int, *, subcarriers: int, history: int, future: int, anchored: bool
) -> SplitModel:
    """Return the clean LLM4CP around a backbone of that width: ``Rows`` of (B, T, K, 2) -> (B, F, K, 2)."""
    plane = Plane(subcarriers, history, future)
    return SplitModel(Embedding(plane, width), backbone, Head(plane, width, anchored))


def _to_taps(rows: Tensor) -> Tensor:
    """Return complex delay taps (B, t, K) of rows (B, t, K, 2); orthonormal, so power is kept."""
    return torch.fft.ifft(torch.view_as_complex(rows.contiguous()), norm="ortho")
