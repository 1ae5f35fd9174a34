"""The contract of a selection policy: who takes part in a round, from what an edge server can know.

    state  = what is known of the M devices that can be reached now (struct of arrays)
    asked  = policy.candidates(state, draw)     whom to poll first; only where the policy polls at all
    choice = policy.select(state, draw)         over the polled devices alone, if there was a poll
    policy.feedback(outcome)                    what became of the round

A policy is arithmetic on arrays: it knows no Flower, no torch, no clock and no radio, and draws from the
generator that it is given. It names *places* in the state (0 <= place < M), never ids, so that it can be as
fast as its sort. Whatever it remembers is in ``state()``, for a resumed run must choose as the first one
would.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.tables.wireless import SelectionConfig

Places = NDArray[np.intp]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """The M devices that can be reached now; every array is (M,), read-only, and in the order of ``ids``."""

    number: int  # of the round, 1-based
    now_s: float  # virtual seconds since the run began
    devices: int  # N, reachable or not
    wanted: int  # K, how many shall take part
    band_hz: float  # the uplink band that they will share
    sharers: int = 0  # by how many the band is shared; 0: by those that are wanted
    ids: NDArray[np.int64]  # ascending
    gain_hz: Floats  # a = P g / N0 [Hz]: the SNR over a band b is a / b
    fixed_s: Floats  # download, computation, and what else does not depend on the uplink band
    upload_s: Floats  # upload at an equal share of the band
    bits: Floats  # to upload
    energy_j: Floats  # computation, and radio at the equal share
    examples: Floats  # training examples of a device
    loss: Floats  # as last reported, or as polled; +inf where it never was
    norm: Floats  # of the last update; +inf where there was none
    last: NDArray[np.int32]  # the last round that it took part in; 0: none
    count: NDArray[np.int32]  # rounds that it took part in

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def places(self) -> int:
        """By how many the band is shared, for ``upload_s``."""
        return max(self.sharers or self.wanted, 1)

    @property
    def time_s(self) -> Floats:
        """Seconds (M,) until a device's update is in, at an equal share of the band."""
        return self.fixed_s + self.upload_s

    @property
    def age(self) -> NDArray[np.int32]:
        """Rounds (M,) since a device took part; the round's number where it never did."""
        return self.number - self.last

    def at(self, places: Places) -> RoundState:
        """Return the state of these places alone."""
        arrays = {
            field.name: getattr(self, field.name)[places]
            for field in fields(self)
            if isinstance(getattr(self, field.name), np.ndarray)
        }
        return replace(self, **arrays)


@dataclass(frozen=True, slots=True)
class Choice:
    """Who takes part: k places in the state, each once, and what each counts beside its examples."""

    places: Places  # (k,)
    weights: NDArray[np.float64] | None = None  # (k,) 1 / (N p_k), where the policy draws by p_k; None: ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a round: k chosen devices, and who of them came in."""

    number: int
    ids: NDArray[np.int64]  # (k,) chosen
    arrived: NDArray[np.bool_]  # (k,) whether the update came in time, and whole
    time_s: NDArray[np.float64]  # (k,) when it came, or would have come, after the round began
    energy_j: NDArray[np.float64]  # (k,) that it spent
    loss: NDArray[np.float64]  # (k,) mean loss of its steps; NaN where nothing arrived
    norm: NDArray[np.float64]  # (k,) of its update; NaN where nothing arrived
    examples: NDArray[np.float64]  # (k,)
    round_s: float  # how long the round took


class Policy:
    """Who takes part. A policy overrides :meth:`select`, and what else it needs."""

    unbiased: ClassVar[bool] = False  # its choices have weights, by which the mean over rounds is everyone's
    polls: ClassVar[str] = ""  # what its candidates are asked first: 'status' or 'loss'; '' is nothing

    def __init__(self, config: SelectionConfig, devices: int, seed: int) -> None:
        self.config, self.devices, self.seed = config, devices, seed
        self.a_turn = 0  # devices that a turn is made of; 0: as many as are wanted

    def candidates(self, state: RoundState, draw: np.random.Generator) -> Places:
        """Return whom to poll; called only where ``polls`` names something."""
        raise NotImplementedError

    def select(self, state: RoundState, draw: np.random.Generator) -> Choice:
        """Return at most ``state.wanted`` places; all of them where fewer can be reached."""
        raise NotImplementedError

    def feedback(self, outcome: Outcome) -> None:
        """Learn from a round; by default nothing."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from."""
        return {}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state`."""
