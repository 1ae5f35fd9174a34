"""The fleet: N unlike devices as arrays, the world that moves on around them, and what a round costs each.

    advance   sessions, positions, losses, batteries, to virtual time t; keyed by (seed, "fleet", step)
    look      of those that can be reached: gains, times, energies of round n; keyed by (seed, "look", n)
    spend     energy drawn from batteries

    t_down = bits_down / rate      t_cmp = roofline at throughput exp(jitter z)      E_cmp = P_active t_cmp

Who can be reached is on (``availability.py``), charges or has enough in its battery (``battery.py``), and is
not in outage either way: its SNR over an equal share of the band, B / wanted, is at least the link's floor. A
download is unicast on such a share, or broadcast over the whole band, at each device's own rate.

A struct of arrays in float32 (float64 for when sessions end), under 200 bytes a device; only what changes is
brought up: the losses of who moves, the sessions that end, and of a round those that can be reached, in
blocks of 8,192 devices, which fit the cache. Where ``fleet.capacity`` is given, its devices are dealt to
ours: one sample takes three times its inference time (FedScale), if ``fleet.flops-per-sample`` is known, and
else throughputs are as unlike as the file's around ``fleet.gflops``; and its bandwidths replace the radio,
unless ``fleet.speeds`` does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fedlam_app.base.keys import seed_of
from fedlam_app.tables.wireless import FleetConfig, WirelessConfig
from fedlam_app.wireless.availability import ZONES_H, Always, Diurnal, Law, Sessions
from fedlam_app.wireless.battery import BLOCK, Batteries
from fedlam_app.wireless.compute import compute_s
from fedlam_app.wireless.measured import MeasuredLinks, Recorded
from fedlam_app.wireless.power import watts
from fedlam_app.wireless.profiles import Devices, draw_devices
from fedlam_app.wireless.radio import Radio
from fedlam_app.wireless.rates import BLOCK_HZ, Link
from fedlam_app.wireless.traces import deal, read_behaviour, read_capacity, read_speeds

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Each = float | NDArray[np.floating]  # one number for all devices, or (N,)

TRAINING = 3.0  # inference times of one training sample: forward, and twice that backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The work of one device in a round."""

    flops: Each
    bits_up: Each
    bits_down: Each
    bytes_moved: Each = 0.0  # between a device's memory and its processor
    server_s: float = 0.0  # the server's own part of a device's round
    broadcast: bool = False  # the downlink carries one payload for all


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The M devices that can be reached, (M,) each."""

    ids: Ids  # ascending
    gain_hz: Floats  # a = P g / N0 of the uplink: the SNR over a band b is a / b
    down_s: Floats  # download
    compute_s: Floats
    session_s: Floats  # how long it can be reached yet; infinite: always
    power_w: Floats  # transmitted
    compute_j: Floats

    def at(self, places: NDArray[np.intp]) -> View:
        """Return these places alone."""
        return View(**{field.name: getattr(self, field.name)[places] for field in fields(self)})


class Fleet:
    """N devices at virtual time ``now_s``."""

    def __init__(
        self,
        fleet: FleetConfig,
        wireless: WirelessConfig,
        devices: int,
        seed: int,
        examples: NDArray[np.floating],
    ) -> None:
        """``examples`` (N,) are the devices' training examples. ValueError for bad files and sizes."""
        if examples.shape != (devices,):
            raise ValueError(f"examples has shape {examples.shape}; a fleet of {devices} needs ({devices},)")
        self.config, self.wireless, self.seed = fleet, wireless, seed
        self.examples = examples.astype(np.float32)
        self.now_s, self.step = 0.0, 0
        self.devices = draw_devices(fleet, devices, self._draw("profiles"))
        zone_h = np.array(ZONES_H, np.uint8)[self._draw("zones").integers(len(ZONES_H), size=devices)]
        self.batteries = Batteries(self.devices.capacity_j, zone_h, self._draw("batteries"))
        self.sessions = Sessions(self._law(zone_h), self._draw("sessions"))
        self.links = self._links(devices)

    @property
    def link(self) -> Link:
        """How a gain becomes a rate on the uplink: the radio's, or of measured rates the plain logarithm."""
        return self.links.link

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays over devices."""
        parts: list[object] = [self.batteries, self.sessions, self.sessions.law, self.links]
        parts += [self.links.movers] if isinstance(self.links, Radio) else []
        owned = [value for part in parts for value in vars(part).values()]
        owned += [getattr(self.devices, field.name) for field in fields(Devices)] + [self.examples]
        arrays = {id(value): value for value in owned if isinstance(value, np.ndarray)}
        return sum(array.nbytes for array in arrays.values())

    def advance(self, to_s: float) -> None:
        """Move the world on to virtual time ``to_s``; ValueError where that lies in the past."""
        if not self.now_s <= to_s < np.inf:
            raise ValueError(f"to_s = {to_s} must be finite, and not before the fleet's {self.now_s} s")
        if to_s == self.now_s:
            return
        draw = self._draw("fleet", self.step)
        self.links.advance(to_s - self.now_s, draw)
        self.sessions.advance(to_s, draw)
        self.batteries.advance(self.now_s, to_s)
        self.now_s, self.step = to_s, self.step + 1

    def look(self, number: int, wanted: int, load: Load) -> View:
        """Return the devices that can be reached in round ``number``, of which ``wanted`` share the band."""
        draw = self._draw("look", number)
        band_hz = self.wireless.band_mhz * 1e6
        share_hz = band_hz / max(wanted, 1)
        down_hz = band_hz if load.broadcast else share_hz
        floor_hz = np.float32(self.link.floor * max(share_hz, BLOCK_HZ))
        ready = self.batteries.ready(self.now_s, self.config.battery_floor)
        candidates = np.flatnonzero(self.sessions.on & ready)
        ids = np.empty(len(candidates), np.int64)
        columns = np.empty((6, len(candidates)), np.float32)
        end = 0
        for start in range(0, len(candidates), BLOCK):
            here = candidates[start : start + BLOCK]
            gain, down_bps, power_w = self.links.look(here, share_hz, down_hz, draw)
            reached = np.flatnonzero((gain >= floor_hz) & (down_bps > 0.0))
            here, first, end = here[reached], end, end + len(reached)
            ids[first:end] = here
            columns[0, first:end] = gain[reached]
            columns[1, first:end] = _of(load.bits_down, here) / down_bps[reached]
            columns[2, first:end] = self._compute_s(here, load, draw)
            columns[3, first:end] = self.sessions.until_s[here] - self.now_s
            columns[4, first:end] = power_w[reached]
            columns[5, first:end] = columns[2, first:end] * self.devices.power_w[here]
        gain, down_s, work_s, session_s, power_w, work_j = columns[:, :end]
        return View(
            ids=ids[:end],
            gain_hz=gain,
            down_s=down_s,
            compute_s=work_s,
            session_s=session_s,
            power_w=power_w,
            compute_j=work_j,
        )

    def spend(self, ids: Ids, energy_j: NDArray[np.floating]) -> None:
        """Take ``energy_j`` (k,) [J] from the batteries of ``ids``, each named once."""
        self.batteries.spend(ids, energy_j)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays that a resumed run continues from, bit for bit."""
        own: dict[str, NDArray[np.generic]] = {"now_s": np.array(self.now_s), "step": np.array(self.step)}
        for room, part in self._parts().items():
            own |= {f"{room}.{name}": array for name, array in part.state().items()}
        return own

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from :meth:`state` of a fleet of the same configuration, size and seed."""
        self.now_s, self.step = float(state["now_s"]), int(state["step"])
        for room, part in self._parts().items():
            head = f"{room}."
            part.load({name[len(head) :]: a for name, a in state.items() if name.startswith(head)})

    def _parts(self) -> dict[str, Batteries | Sessions | Radio | MeasuredLinks]:
        return {"batteries": self.batteries, "sessions": self.sessions, "links": self.links}

    def _draw(self, purpose: str, *number: int) -> np.random.Generator:
        """Return the generator of a purpose: SFC64, whose normals are the fastest of NumPy's."""
        return np.random.Generator(np.random.SFC64(seed_of(self.seed, purpose, *number)))

    def _law(self, zone_h: NDArray[np.uint8]) -> Law:
        config, devices = self.config, len(zone_h)
        if config.behaviour:
            behaviour = read_behaviour(config.behaviour)
            return Recorded(behaviour, deal(devices, len(behaviour.finish_s), self._draw("behaviour")))
        return Diurnal(config, zone_h) if config.on_share < 1.0 else Always(devices)

    def _links(self, devices: int) -> Radio | MeasuredLinks:
        """Return the links; with a capacity file, make the devices' throughputs its own, too."""
        config, wireless = self.config, self.wireless
        power_w = float(watts(np.array([wireless.tx_power_dbm]))[0])
        links: Radio | MeasuredLinks | None = None
        if config.capacity:
            ms, kbps = read_capacity(config.capacity)
            dealt = deal(devices, len(ms), self._draw("capacity"))
            per_second = config.flops_per_sample * 1e3 / TRAINING or config.gflops * 1e9 * np.median(ms)
            self.devices.throughput[:] = (per_second / ms)[dealt]
            rates = np.stack([kbps, kbps], axis=1)[dealt] * 1e3
            links = MeasuredLinks(rates, np.zeros_like(rates), power_w)
        if config.speeds:
            mean, std = read_speeds(config.speeds)
            dealt = deal(devices, len(mean), self._draw("speeds"))
            links = MeasuredLinks(mean[dealt], std[dealt], power_w)
        return links or Radio(wireless, devices, config.moving, self._draw("radio"))

    def _compute_s(self, ids: Ids, load: Load, draw: np.random.Generator) -> Floats:
        throughput = self.devices.throughput[ids]
        if self.config.jitter > 0.0:
            jitter = draw.standard_normal(len(ids), dtype=np.float32)
            jitter *= np.float32(self.config.jitter)
            throughput *= np.exp(jitter, out=jitter)
        work, moved = _of(load.flops, ids), _of(load.bytes_moved, ids)
        return compute_s(work, moved, throughput, self.devices.memory[ids])


def _of(value: Each, ids: Ids) -> np.floating | Floats:
    """Return one number, or the numbers of ``ids``, in float32."""
    return (
        value[ids].astype(np.float32) if isinstance(value, np.ndarray) and value.ndim else np.float32(value)
    )
