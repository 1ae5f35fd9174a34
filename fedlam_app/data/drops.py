"""Drop users in a 3GPP cell and sample their channels: TR 38.901 v19.2 through Sionna (sionna-no-rt).

A batch of users is a pure function of ``(recipe.seed, recipe.split, scenario, number of the batch)``,
so batches can be made in any order by any number of processes. Sionna's draws depend on the size of
a batch, which therefore is part of the recipe.

Geometry after LLM4CP (arXiv 2406.14440, its data script): one base station at the origin, users 20-50 m
from a point 200 m away on its boresight, within +-60 degrees of the line back to the base station,
outdoors, 1.5 m high, walking or driving straight on in a random direction with the antenna facing forward.
Arrays: 4x4 dual-polarised (V, H) panel of 38.901 elements, half a wavelength apart; one V element
at the user. Base station heights: UMa 30 m (LLM4CP's; TR 38.901 calibrates at 25 m), UMi 10 m, RMa 35 m.

Each user is an independent drop (LLM4CP's ten users of one speed share theirs, and their large-scale
draws are forced to zero mean). Within the 10 ms of a sample only the Doppler phases move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedlam_app.base.keys import rng, seed_of
from fedlam_app.base.registry import pick
from fedlam_app.data.channel_set import ChannelSet

if TYPE_CHECKING:
    import torch

BS_HEIGHT_M = {"uma": 30.0, "umi": 10.0, "rma": 35.0}
"""Height of the base station in each environment [m]."""

SCENARIOS = {f"{cell}-{sight}": (cell, sight == "los") for cell in BS_HEIGHT_M for sight in ("nlos", "los")}
"""What ``data.scenario`` may name: the environment and whether there is line of sight."""

UT_HEIGHT_M = 1.5
RING_CENTRE_M = 200.0
RING_RADII_M = (20.0, 50.0)
RING_HALF_ANGLE_DEG = 60.0
ROWS = COLUMNS = 4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a generated channel set, apart from library versions.

    ``scenario`` is a name in :data:`SCENARIOS` or several joined by commas; in a mixture user ``i``
    is user ``i // S`` of scenario ``i % S``, so shares are equal and a smaller set is a prefix of a
    larger one. ``duplex`` decides the subcarriers of the future alone: those of the history (tdd) or
    the adjacent band above (fdd). Raises ``ValueError`` naming the configuration key.
    """

    scenario: str = "uma-nlos"
    users: int = 300
    seed: int = 2025
    duplex: str = "tdd"
    speed_min_kmh: float = 10.0
    speed_max_kmh: float = 100.0
    split: str = "train"
    spec_version: str = "19.2"
    carrier_hz: float = 2.4e9
    subcarriers: int = 48
    spacing_hz: float = 180e3
    history_slots: int = 16
    future_slots: int = 4
    slot_s: float = 0.5e-3
    batch: int = 16

    def __post_init__(self) -> None:
        names = self.scenarios
        for name in names:
            pick(SCENARIOS, name, "data.scenario")
        if len(set(names)) != len(names):
            raise ValueError(f"data.scenario must name each scenario once, got '{self.scenario}'")
        if self.duplex not in ("tdd", "fdd"):
            raise ValueError(f"data.duplex must be 'tdd' or 'fdd', got '{self.duplex}'")
        if self.users < 1:
            raise ValueError(f"data.users must be at least 1, got {self.users}")
        if not 0 <= self.speed_min_kmh <= self.speed_max_kmh < np.inf:
            raise ValueError(
                "data.speed-min-kmh and data.speed-max-kmh must satisfy 0 <= min <= max, "
                f"got {self.speed_min_kmh} and {self.speed_max_kmh}"
            )
        for field in ("subcarriers", "history_slots", "future_slots", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"a channel recipe needs {field} of at least 1, got {getattr(self, field)}")

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The scenarios of the mixture, in order."""
        return tuple(name.strip() for name in self.scenario.split(","))


def drop_batch(recipe: Recipe, scenario: str, number: int) -> ChannelSet:
    """Return batch ``number`` of the users of one scenario: ``recipe.batch`` users, always all of them.

    The caller's torch generators and thread count are as before on return.
    """
    with _single_threaded_torch():
        coefficients, delays_s, speed_kmh = impulse_responses(recipe, scenario, number)
        slots, band = recipe.history_slots, recipe.subcarriers
        above = band if recipe.duplex == "fdd" else 0
        # Two products, so that the history has the same bytes under tdd and fdd.
        history = frequency_responses(coefficients[..., :slots], delays_s, _band_hz(recipe, 0))
        future = frequency_responses(coefficients[..., slots:], delays_s, _band_hz(recipe, above))
        return ChannelSet.from_raw(history.numpy(), future.numpy(), speed_kmh, scenario)


def impulse_responses(
    recipe: Recipe, scenario: str, number: int
) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.float32]]:
    """Return path coefficients (B, A, P, T) complex64, delays (B, P) [s] and speeds (B,) [km/h].

    T counts history and future slots. Reseeds torch's global generator: call it as
    :func:`drop_batch` does, or in a process of its own.
    """
    import torch
    from sionna.phy import config

    cell, line_of_sight = pick(SCENARIOS, scenario, "data.scenario")
    key = (recipe.seed, "channels", recipe.split, scenario, number)
    position_m, heading_rad, speed_kmh = _users(recipe, rng(*key))
    forward = np.stack([np.cos(heading_rad), np.sin(heading_rad), np.zeros_like(heading_rad)], axis=1)
    velocity = forward * (speed_kmh / 3.6)[:, None]  # (B, 3) [m/s]
    orientation = np.stack([heading_rad, np.zeros_like(heading_rad), np.zeros_like(heading_rad)], axis=1)

    def one_user_each(values: npt.NDArray[np.float64]) -> torch.Tensor:
        """(B, 3) -> (B, 1, 3): every batch item is a cell with one user, hence independent."""
        return torch.as_tensor(values, dtype=torch.float32)[:, None]

    outdoors = torch.zeros(recipe.batch, 1, dtype=torch.bool)
    model = _model(cell, recipe.spec_version, recipe.carrier_hz)
    config.device = "cpu"
    config.seed = seed_of(*key, "fading")
    model.set_topology(
        ut_loc=one_user_each(position_m),
        bs_loc=one_user_each(np.tile([0.0, 0.0, BS_HEIGHT_M[cell]], (recipe.batch, 1))),
        ut_orientations=one_user_each(orientation),
        bs_orientations=torch.zeros(recipe.batch, 1, 3),
        ut_velocities=one_user_each(velocity),
        in_state=outdoors,
        los=line_of_sight,
        # Without it every outdoor RMa user would sit in a car.
        **({"in_car": outdoors} if cell == "rma" else {}),
    )
    with torch.no_grad():
        a, tau = model(recipe.history_slots + recipe.future_slots, 1 / recipe.slot_s)
    # a: (B, rx=1, rx antennas=1, tx=1, A, P, T), antennas in the order V then H, columns, rows.
    return a[:, 0, 0, 0], tau[:, 0, 0], speed_kmh.astype(np.float32)


def frequency_responses(
    coefficients: torch.Tensor, delays_s: torch.Tensor, frequencies_hz: torch.Tensor
) -> torch.Tensor:
    """Return H(f) = sum_p a_p exp(-j 2 pi f tau_p): (B, A, P, T), (B, P), (K,) -> (B, A, T, K).

    The same numbers as Sionna's ``cir_to_ofdm_channel`` at a tenth of the cost: all antennas share
    the delays, so the exponentials are taken once and the sum is one matrix product a batch.
    """
    import torch

    batch, antennas, paths, slots = coefficients.shape
    phase = -2 * torch.pi * delays_s[:, :, None] * frequencies_hz  # (B, P, K)
    steering = torch.polar(torch.ones_like(phase), phase)
    rows = coefficients.transpose(2, 3).reshape(batch, antennas * slots, paths)
    return torch.bmm(rows, steering).reshape(batch, antennas, slots, -1)


def _users(
    recipe: Recipe, generator: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return positions (B, 3) [m], headings (B,) [rad] and speeds (B,) [km/h] of one batch."""
    unit = generator.random((4, recipe.batch))
    radius_m = RING_RADII_M[0] + (RING_RADII_M[1] - RING_RADII_M[0]) * unit[0]
    angle_rad = np.deg2rad(RING_HALF_ANGLE_DEG) * (2 * unit[1] - 1)
    x_m = RING_CENTRE_M - radius_m * np.cos(angle_rad)
    y_m = radius_m * np.sin(angle_rad)
    position_m = np.stack([x_m, y_m, np.full_like(x_m, UT_HEIGHT_M)], axis=1)
    speed_kmh = recipe.speed_min_kmh + (recipe.speed_max_kmh - recipe.speed_min_kmh) * unit[3]
    return position_m, 2 * np.pi * unit[2], speed_kmh


def _band_hz(recipe: Recipe, first: int) -> torch.Tensor:
    """Return the frequencies (K,) [Hz] of the band that starts at subcarrier ``first``."""
    import torch

    return torch.arange(first, first + recipe.subcarriers, dtype=torch.float32) * recipe.spacing_hz


def _model(cell: str, spec_version: str, carrier_hz: float) -> Any:
    """Return a new channel model of Sionna's for an environment.

    New for each batch (3 % of its cost): a model keeps some of the draws of its first topology, so
    a batch from a used model would depend on what it was used for.
    """
    from sionna.phy import config
    from sionna.phy.channel.tr38901 import PanelArray, RMa, UMa, UMi

    config.device = "cpu"
    element = {"antenna_pattern": "38.901", "carrier_frequency": carrier_hz}
    base_station = PanelArray(
        num_rows_per_panel=ROWS,
        num_cols_per_panel=COLUMNS,
        polarization="dual",
        polarization_type="VH",
        **element,
    )
    user = PanelArray(
        num_rows_per_panel=1, num_cols_per_panel=1, polarization="single", polarization_type="V", **element
    )
    arguments = {
        "carrier_frequency": carrier_hz,
        "ut_array": user,
        "bs_array": base_station,
        "direction": "downlink",
        "spec_version": spec_version,
    }
    if cell == "rma":
        return RMa(**arguments)
    return {"uma": UMa, "umi": UMi}[cell](o2i_model="low", **arguments)


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Keep torch as the caller left it, and sums in one order whatever the number of cores.

    Importing Sionna and seeding it both reseed torch's global generators.
    """
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
