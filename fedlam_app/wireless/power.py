"""Transmit power, what it becomes at the receiver, and the energy that it takes.

    full         P = P_max
    fractional   P = min(P_max, P_0 + 10 lg M + 0.8 PL)  [dBm]     TS 38.213 7.1.1, open loop; M blocks
    gain         a = P g / N0  [Hz],  10 lg a = P - PL - N0        N0 = -174 + figure + interference  [dBm/Hz]
    energy       E = (P / eta_PA + P_circuit) t  [J]

a is the SNR times the band: the SNR is 0 dB over a band of a. PL is the loss between the antennas' ports:
path, shadowing and penetration less antenna gains. Powers are in dBm or W as their names say.

Assumptions of this project: P_0 = -85 dBm a block (networks use -80 to -90), eta_PA = 0.35 (0.3 to 0.4) and
P_circuit = 0.1 W. Departure: no closed loop; a block is 180 kHz, and less than one counts as one.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlam_app.config import WirelessConfig
from fedlam_app.wireless.rates import BLOCK_HZ

Real = TypeVar("Real", np.float32, np.float64)

THERMAL_DBM_HZ = -174.0  # k T at 290 K
TARGET_DBM = -85.0
COMPENSATED = 0.8  # of the path loss
AMPLIFIER = 0.35
CIRCUIT_W = 0.1


def watts(power_dbm: NDArray[Real]) -> NDArray[Real]:
    """Return a power [W], any shape, in the argument's type."""
    return np.exp(np.multiply(np.subtract(power_dbm, 30.0), math.log(10.0) / 10.0))


def dbm(power_w: NDArray[Real]) -> NDArray[Real]:
    """Return a power [dBm] of any shape; -inf where it is 0."""
    with np.errstate(divide="ignore"):
        return np.add(np.multiply(np.log(power_w), 10.0 / math.log(10.0)), 30.0)


def noise_dbm_hz(noise_figure_db: float, interference_db: float = 0.0) -> float:
    """Return N0 [dBm/Hz] of a receiver, with interference over thermal."""
    return THERMAL_DBM_HZ + noise_figure_db + interference_db


def gain_hz(power_dbm: NDArray[Real] | float, loss_db: NDArray[Real], noise: float) -> NDArray[Real]:
    """Return a = P g / N0 [Hz], shape and type of ``loss_db``; ``noise`` is N0 [dBm/Hz]."""
    level = np.subtract(power_dbm, np.add(loss_db, noise))
    return np.exp(np.multiply(level, math.log(10.0) / 10.0))


def transmit_power_dbm(
    config: WirelessConfig, loss_db: NDArray[Real], band_hz: NDArray[Real] | float
) -> NDArray[Real]:
    """Return a device's uplink power [dBm] against ``loss_db``, of its shape and type, over ``band_hz``."""
    if config.power_control == "full":
        return np.full_like(loss_db, config.tx_power_dbm)
    blocks_db = np.multiply(np.log(np.maximum(np.divide(band_hz, BLOCK_HZ), 1.0)), 10.0 / math.log(10.0))
    asked = np.add(np.add(np.multiply(loss_db, COMPENSATED), TARGET_DBM), blocks_db, dtype=loss_db.dtype)
    return np.minimum(asked, config.tx_power_dbm)


def radio_energy_j(power_w: NDArray[Real] | float, time_s: NDArray[Real]) -> NDArray[Real]:
    """Return the energy [J] of transmitting ``power_w`` for ``time_s``, of its shape."""
    return np.multiply(power_w / AMPLIFIER + CIRCUIT_W, time_s)
