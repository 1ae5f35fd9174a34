"""Doppler spectra on a grid, and the linear predictor that is optimal for one.

A tap of a 3GPP channel is a sum of rays, each turning at its own Doppler shift nu [cycles/slot], so its
history d (T,) has the covariance R = sum_j p_j a_j a_j^H + n I with atoms a_j[t] = exp(2 pi i nu_j t):
p is its Doppler spectrum and n its noise. Everything here follows from (p, n) in closed form, in double
precision: R spans four orders of magnitude, and in single its inverse would carry the rounding of whatever
shared a batch with the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # keeps spectra positive in single precision


def atoms(grid: Tensor, first: int, slots: int) -> Tensor:
    """Return the atoms a_j[t], t = first .. first + slots - 1, of the shifts ``grid`` (J,): (slots, J)."""
    times = torch.arange(first, first + slots, dtype=torch.float64)[:, None]
    return torch.exp(2j * torch.pi * grid.double() * times)


def quadratic(matrix: Tensor, past: Tensor) -> Tensor:
    """Return a_j^H M a_j of Hermitian M (..., T, T) for every atom of ``past`` (T, J): (..., J), real."""
    return ((matrix @ past) * past.conj()).sum(-2).real.clamp_min(FLOOR)


def capon(covariance: Tensor, past: Tensor, loading: Tensor) -> Tensor:
    """Return the Capon spectrum 1 / (a_j^H (C + loading I)^-1 a_j): (..., T, T), (..., 1, 1) -> (..., J)."""
    return 1.0 / quadratic(torch.linalg.inv(covariance + loading * _identity(past)), past)


def model_covariance(spectrum: Tensor, noise: Tensor, past: Tensor) -> Tensor:
    """Return R = sum_j p_j a_j a_j^H + n I: (..., J), (...) -> (..., T, T)."""
    return (past * spectrum[..., None, :]) @ past.mH + noise[..., None, None] * _identity(past)


def likelier(spectrum: Tensor, noise: Tensor, covariance: Tensor, past: Tensor) -> Tensor:
    """Return the spectrum after one fixed-point step towards the likelihood of the sample covariance C.

        p_j <- p_j (a_j^H R^-1 C R^-1 a_j) / (a_j^H R^-1 a_j)

    The multiplicative form of Abeida et al., "Iterative Sparse Asymptotic Minimum Variance Based
    Approaches for Array Processing" (SAMV), IEEE TSP 61(4), 2013; it is stationary where R explains C.
    """
    inverse = torch.linalg.inv(model_covariance(spectrum, noise, past))
    return spectrum * quadratic(inverse @ covariance @ inverse, past) / quadratic(inverse, past)


def mmse_predictor(spectrum: Tensor, noise: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """Return W (..., F, T), the linear predictor of least mean square error: E[f d^H] R^-1.

    With E[f d^H] = sum_j p_j b_j a_j^H and b_j the atoms of the future slots (F, J).
    """
    cross = (future * spectrum[..., None, :]) @ past.mH  # (..., F, T)
    covariance = model_covariance(spectrum, noise, past)  # (..., T, T), Hermitian
    return torch.linalg.solve(covariance, cross.mH).mH


def _identity(past: Tensor) -> Tensor:
    """Return the T x T identity where the atoms (T, J) live."""
    return torch.eye(past.shape[0], dtype=past.dtype, device=past.device)
