"""Laws of the learned baselines: shapes, gradients, rows that do not meet, and that they can learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedlam_app.models.convolutional import Convolutional
from fedlam_app.models.recurrent import Recurrent, gru, lstm, rnn, row_scale
from fedlam_app.models.transformer import Transformer, sinusoids

Build = Callable[..., nn.Module]
BASELINES: dict[str, Build] = {
    "rnn": rnn,
    "lstm": lstm,
    "gru": gru,
    "cnn": Convolutional,
    "transformer": Transformer,
}
every_baseline = pytest.mark.parametrize("build", BASELINES.values(), ids=BASELINES.keys())


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tones(count: int, slots: int, subcarriers: int) -> Tensor:
    """Rows with one Doppler shift and one delay, random phases, (count, slots, subcarriers, 2)."""
    phase = 6.28 * torch.rand(count, 1, 1, generator=torch.Generator().manual_seed(5))
    time, tone = torch.arange(slots)[None, :, None], torch.arange(subcarriers)[None, None, :]
    return torch.view_as_real(torch.exp(1j * (phase + 0.4 * time - 0.3 * tone)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(2025)


@every_baseline
@pytest.mark.parametrize(("subcarriers", "history", "future"), [(48, 16, 4), (5, 8, 3)])
def test_rows_in_rows_out(build: Build, subcarriers: int, history: int, future: int) -> None:
    model = build(subcarriers=subcarriers, history=history, future=future)
    assert model(rows(2, history, subcarriers, 2)).shape == (2, future, subcarriers, 2)


@every_baseline
def test_every_parameter_gets_a_gradient(build: Build) -> None:
    model = build(subcarriers=6)
    model(rows(3, 16, 6, 2)).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Softmax is blind to a constant added to all scores, so a key bias never has a gradient; torch keeps
    # it packed with the query's and the value's, which do.
    assert dead == []


@every_baseline
def test_a_row_does_not_depend_on_its_batch_mates(build: Build) -> None:
    model = build().eval()
    batch = rows(8, 16, 48, 2)
    louder = torch.cat([batch[:1], 100.0 * batch[1:]])
    with torch.no_grad():
        alone, quiet, loud = model(batch[:1]), model(batch)[:1], model(louder)[:1]
    assert (quiet - alone).norm() <= 1e-5 * alone.norm()
    assert (loud - alone).norm() <= 1e-5 * alone.norm()


@every_baseline
def test_a_row_scales_with_its_history(build: Build) -> None:
    model = build().eval()
    batch = rows(2, 16, 48, 2)
    with torch.no_grad():
        assert torch.allclose(model(1e-3 * batch), 1e-3 * model(batch), rtol=1e-4, atol=1e-8)
        assert torch.isfinite(model(torch.zeros(1, 16, 48, 2))).all()


@every_baseline
def test_the_seed_alone_decides_the_weights(build: Build) -> None:
    torch.manual_seed(7)
    first = nn.utils.parameters_to_vector(build().parameters())
    torch.manual_seed(7)
    assert torch.equal(first, nn.utils.parameters_to_vector(build().parameters()))


@every_baseline
def test_learns_a_single_tone(build: Build) -> None:
    channel = tones(64, 20, 8)
    x, y = channel[:, :16], channel[:, 16:]
    model = build(subcarriers=8)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss = (model(x) - y).square().sum() / y.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.05


def test_the_recurrent_forecast_feeds_on_itself() -> None:
    """Forecasting F + 1 slots extends the forecast of F slots, since each step sees only what came before."""
    model = gru(future=3).eval()
    x = rows(2, 16, 48, 2)
    with torch.no_grad():
        short = model(x)
        model.future = 4
        assert torch.equal(model(x)[:, :3], short)


def test_row_scale_is_the_root_mean_square_amplitude() -> None:
    assert row_scale(2.0 * tones(3, 16, 8)).flatten().tolist() == pytest.approx([2.0] * 3)


def test_positions_turn_at_known_rates() -> None:
    table = sinusoids(5, 4)
    place = torch.arange(5.0)
    expected = torch.stack(
        [place.sin(), place.cos(), (place / 100).sin(), (place / 100).cos()], dim=1
    )  # 10000 ** (-2 / 4) = 1 / 100
    assert torch.allclose(table, expected, atol=1e-6)


def test_an_unknown_cell_is_named() -> None:
    with pytest.raises(ValueError, match=r"'gur'.*rnn, lstm, gru"):
        Recurrent("gur")  # type: ignore[arg-type]


def test_the_image_keeps_two_channels() -> None:
    with pytest.raises(ValueError, match="first and the last must be 2"):
        Convolutional(channels=(2, 8, 4))
