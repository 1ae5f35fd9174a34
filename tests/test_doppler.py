"""The Doppler algebra against its definitions, in float64."""

from __future__ import annotations

import math

import torch

from fedlam_app.models import doppler

PAST = doppler.atoms(torch.linspace(-0.15, 0.15, 32), 0, 16)  # (T, J)
FUTURE = doppler.atoms(torch.linspace(-0.15, 0.15, 32), 16, 4)  # (F, J)
GENERATOR = torch.Generator().manual_seed(0)


def _spectra() -> tuple[torch.Tensor, torch.Tensor]:
    spectrum = torch.rand(5, 32, generator=GENERATOR, dtype=torch.float64)
    return spectrum / spectrum.sum(-1, keepdim=True), torch.full((5,), 0.03, dtype=torch.float64)


def test_the_atoms_of_the_future_continue_those_of_the_past() -> None:
    whole = doppler.atoms(torch.linspace(-0.15, 0.15, 32), 0, 20)
    torch.testing.assert_close(torch.cat([PAST, FUTURE]), whole, rtol=0, atol=0)


def test_the_covariance_is_the_sum_over_atoms() -> None:
    spectrum, noise = _spectra()
    expected = noise[0] * torch.eye(16, dtype=torch.complex128)
    for j in range(32):
        expected = expected + spectrum[0, j] * torch.outer(PAST[:, j], PAST[:, j].conj())
    torch.testing.assert_close(doppler.model_covariance(spectrum, noise, PAST)[0], expected)


def test_the_predictor_has_the_least_error_of_its_neighbours() -> None:
    """E|f - W d|^2 as a function of W is quadratic: any step away from the optimum raises it."""
    spectrum, noise = _spectra()
    covariance = doppler.model_covariance(spectrum, noise, PAST)
    cross = (FUTURE * spectrum[:, None]) @ PAST.mH

    def error(weights: torch.Tensor) -> torch.Tensor:
        return (
            (weights @ covariance @ weights.mH - 2 * weights @ cross.mH).diagonal(dim1=1, dim2=2).real.sum(1)
        )

    best = doppler.mmse_predictor(spectrum, noise, PAST, FUTURE)
    for _ in range(10):
        step = 1e-2 * torch.randn(best.shape, generator=GENERATOR, dtype=best.dtype)
        assert (error(best + step) > error(best)).all()


def test_one_ray_without_noise_is_predicted_exactly() -> None:
    spectrum = torch.zeros(1, 32, dtype=torch.float64)
    spectrum[0, 20] = 1.0
    weights = doppler.mmse_predictor(spectrum, torch.tensor([1e-9], dtype=torch.float64), PAST, FUTURE)
    torch.testing.assert_close(weights[0] @ PAST[:, 20], FUTURE[:, 20], rtol=0, atol=1e-6)


def test_a_likelihood_step_stays_where_the_model_is_true_and_climbs_elsewhere() -> None:
    spectrum, noise = _spectra()
    covariance = doppler.model_covariance(spectrum, noise, PAST)
    torch.testing.assert_close(doppler.likelier(spectrum, noise, covariance, PAST), spectrum)

    def likelihood(p: torch.Tensor) -> torch.Tensor:
        model = doppler.model_covariance(p, noise, PAST)
        fit = torch.linalg.solve(model, covariance).diagonal(dim1=1, dim2=2).real.sum(1)
        return -torch.linalg.slogdet(model).logabsdet - fit

    start = torch.full_like(spectrum, 1 / 32)
    step = doppler.likelier(start, noise, covariance, PAST)
    assert (likelihood(step) > likelihood(start)).all()


def test_capon_finds_a_ray_at_its_doppler() -> None:
    ray = PAST[:, 7:8] @ PAST[:, 7:8].mH
    found = doppler.capon(ray[None], PAST, torch.tensor([[[0.01]]], dtype=torch.float64))
    assert int(found.argmax()) == 7
    assert math.isclose(float(found.max()), 1.0, rel_tol=1e-2)
