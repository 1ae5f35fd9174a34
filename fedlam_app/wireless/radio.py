"""What the radio of a fleet is like: mean losses that follow the devices, and the gains of one round.

    L_c = PL(d_c, LOS) + wall + sigma S_c - antenna gains        LOS iff u_c < P_LOS(d_c)        [dB]
    up      a = P g |h|^2 / N0,  g = 10^(-min_c L_c / 10)        P by the power control, N0 with interference
    down    SINR = P_b g |h|^2 / (N0 B + P_b sum_{other c} g_c)          rate of the link over the band given

TR 38.901 (``tr38901.py``, ``shadowing.py``), TS 38.213 (``power.py``). u_c is one uniform draw for each
device and cell, S_c moves on with the way gone. A device joins the cell of least loss. |h|^2 is 1 where
fading is averaged (``fading.py``), or one draw a round for both directions, as under time division. The base
station spreads its power over its whole band, so that the downlink's SINR does not depend on the share; with
one cell, interference over thermal counts in both directions.

Only what moves is brought up: devices that stand keep their loss. Departures: no hysteresis at the change of
cells; the other cells' power is their mean, without fading; indoors and in cars P_LOS is that of the street.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlam_app.tables.wireless import WirelessConfig
from fedlam_app.wireless.fading import block_fading
from fedlam_app.wireless.geometry import drop_m, sites_m
from fedlam_app.wireless.mobility import BLOCK, Movers
from fedlam_app.wireless.power import gain_hz, noise_dbm_hz, transmit_power_dbm, watts
from fedlam_app.wireless.rates import link_of, rate_bps
from fedlam_app.wireless.shadowing import correlation_m, evolve, std_db
from fedlam_app.wireless.tr38901 import (
    indoor_depth_m,
    los_probability,
    pathloss_db,
    penetration_db,
    scenario_of,
)

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Arrays = dict[str, NDArray[np.generic]]


class Radio:
    """Losses (N,) [dB] of all devices, and what they come from for those that move."""

    def __init__(
        self, wireless: WirelessConfig, devices: int, moving: float, draw: np.random.Generator
    ) -> None:
        """Drop ``devices``, of which the share ``moving`` moves."""
        self.config = wireless
        self.scenario = scenario_of(wireless.scenario)
        self.link = link_of(wireless)
        self.downlink = link_of(wireless, "downlink")
        self.sites = sites_m(wireless.cells, wireless.radius_m)  # (C, 2)
        self.home = draw.integers(wireless.cells, size=devices, dtype=np.uint8)
        self.x, self.y = drop_m(devices, wireless.radius_m, draw)  # from home; of movers, where they began
        self.loss_db = np.empty(devices, np.float32)
        self.others = np.zeros(
            devices if wireless.cells > 1 else 0, np.float32
        )  # gains of other cells, summed
        wall = self._walls_db(devices, draw)
        chosen = draw.permutation(devices)[: round(moving * devices)]
        self.movers = Movers(chosen, self.x[chosen], self.y[chosen], wireless.radius_m)
        self.movers.begin(draw)
        ids = self.movers.ids
        self.wall_db = wall[ids]  # of movers (m,)
        self.sight = draw.random((wireless.cells, len(ids)), dtype=np.float32)
        self.shadow = draw.standard_normal((wireless.cells, len(ids)), dtype=np.float32)
        for part, _ in self.movers.blocks():
            self._place(part, 0.0, draw)
        still = np.setdiff1d(np.arange(devices), ids, assume_unique=True)
        for start in range(0, len(still), BLOCK):
            here = still[start : start + BLOCK]
            sight = draw.random((wireless.cells, len(here)), dtype=np.float32)
            shadow = draw.standard_normal(sight.shape, dtype=np.float32)
            self._measure(here, self.x[here], self.y[here], wall[here], sight, shadow, 0.0, draw)

    def positions_m(self) -> Floats:
        """Return where the devices are now (N, 2) [m], for a map; the middle base station is at 0."""
        places = np.stack([self.x, self.y], axis=1)
        places[self.movers.ids, 0], places[self.movers.ids, 1] = self.movers.x, self.movers.y
        return places + self.sites[self.home]

    def advance(self, dt_s: float, draw: np.random.Generator) -> None:
        """Move on by ``dt_s``."""
        for part, speed in self.movers.blocks():
            self.movers.move(part, speed, dt_s, draw)
            self._place(part, speed * dt_s, draw)

    def look(
        self, ids: Ids, share_hz: float, down_hz: float, draw: np.random.Generator
    ) -> tuple[Floats, Floats, Floats]:
        """Return uplink gain a [Hz], downlink rate [b/s] over ``down_hz``, and transmit power [W]: (k,) each.

        The power is that of a device over ``share_hz``; gains are to be seen on any band.
        """
        config = self.config
        loss = self.loss_db[ids]
        power = transmit_power_dbm(config, loss, share_hz)
        up = gain_hz(power, loss, noise_dbm_hz(config.bs_noise_db, config.interference_db))
        over_thermal = config.interference_db if config.cells == 1 else 0.0
        noise = noise_dbm_hz(config.ue_noise_db, over_thermal)
        snr = gain_hz(config.bs_power_dbm, loss, noise)
        snr /= np.float32(config.band_mhz * 1e6)
        if config.fading == "block":
            fading = block_fading(len(ids), draw)
            up *= fading
            snr *= fading
        if config.cells > 1:
            density = gain_hz(config.bs_power_dbm, np.zeros(1, np.float32), noise) / (config.band_mhz * 1e6)
            snr /= 1.0 + self.others[ids] * density.astype(np.float32)
        return up, rate_bps(self.downlink, snr * np.float32(down_hz), down_hz), watts(power)

    def state(self) -> Arrays:
        """Return the arrays that a resumed run continues from."""
        own = {name: getattr(self, name).copy() for name in ("loss_db", "others", "shadow")}
        return own | self.movers.state()

    def load(self, state: Arrays) -> None:
        """Continue from :meth:`state`."""
        for name in ("loss_db", "others", "shadow"):
            setattr(self, name, np.array(state[name], np.float32))
        self.movers.load(state)

    def _walls_db(self, devices: int, draw: np.random.Generator) -> Floats:
        """Return the loss (N,) [dB] of walls: of the share of devices that is inside a building."""
        config = self.config
        inside = draw.random(devices, dtype=np.float32) < config.indoor_share
        depth = indoor_depth_m(self.scenario, devices, draw)
        normal = draw.standard_normal(devices, dtype=np.float32)
        return inside * penetration_db(self.scenario, config.penetration, config.carrier_ghz, depth, normal)

    def _place(self, part: slice, moved_m: float, draw: np.random.Generator) -> None:
        """Bring up the losses of one block of movers, each of which has moved ``moved_m``."""
        movers = self.movers
        sight, shadow = self.sight[:, part], self.shadow[:, part]
        ids, wall = movers.ids[part], self.wall_db[part]
        self._measure(ids, movers.x[part], movers.y[part], wall, sight, shadow, moved_m, draw)

    def _measure(
        self,
        ids: Ids,
        x: Floats,
        y: Floats,
        wall_db: Floats,
        sight: Floats,
        shadow: Floats,
        moved_m: float,
        draw: np.random.Generator,
    ) -> None:
        """Write the losses of ``ids`` (k,), at x and y (k,) from home; sight and shadow are (C, k)."""
        config, scenario = self.config, self.scenario
        best, total = np.full(0, 0.0, np.float32), np.zeros(len(ids), np.float32)
        for cell in range(config.cells):
            dx, dy = x, y
            if config.cells > 1:
                away = (self.sites - self.sites[cell])[self.home[ids]]  # (k, 2)
                dx, dy = x + away[:, 0], y + away[:, 1]
            distance = np.sqrt(dx * dx + dy * dy)
            los = sight[cell] < los_probability(scenario, distance)
            if moved_m > 0.0:
                evolve(shadow[cell], moved_m, correlation_m(scenario, los), draw)
            loss = pathloss_db(scenario, distance, config.carrier_ghz, los)
            loss += wall_db
            loss += std_db(scenario, distance, config.carrier_ghz, los) * shadow[cell]
            loss -= np.float32(config.antenna_gain_db)
            best = np.minimum(best, loss) if cell else loss
            if config.cells > 1:
                total += _ratio(loss)
        self.loss_db[ids] = best
        if config.cells > 1:
            self.others[ids] = np.maximum(total - _ratio(best), 0.0)


def _ratio(loss_db: Floats) -> Floats:
    """Return 10^(-loss / 10)."""
    return np.exp(loss_db * np.float32(-math.log(10.0) / 10.0))
