"""A map of a fleet: where the devices stood when the first cell was last saved, and who came.

Counts are in the cell's saved state (``fleet.history.count``). Of positions it has those of who moves; the
others, and all homes, come back from the seed, by dropping the same fleet again. Links that somebody
measured (``fleet.capacity``, ``fleet.speeds``) stand nowhere, and so have no map. Matplotlib is imported
inside (it costs a second). Units: m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlam_app.experiments.fleet_table import fleet_cells
from fedlam_app.experiments.lookup import label_of
from fedlam_app.experiments.track import RunFolder
from fedlam_app.experiments.views import Record
from fedlam_app.tables.wireless import FleetConfig, WirelessConfig
from fedlam_app.wireless.fleet import Fleet
from fedlam_app.wireless.radio import Radio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNT, LINKS = "fleet.history.count", "fleet.world.links."
NEVER = "#c3cad2"  # the colour of devices that never took part


def map_figure(folder: RunFolder, config: Mapping[str, Any], records: Sequence[Record]) -> Figure | None:
    """Where the devices of the first cell stood at last, coloured by how often they took part."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Circle
    from matplotlib.ticker import MaxNLocator

    cell = fleet_cells(records)[0]
    first = next(record for record in records if record["cell"] == cell)
    state = folder.load_state(str(first["key"]))
    if state is None or config["fleet.capacity"] or config["fleet.speeds"]:
        return None
    count = state[0][COUNT]
    places, sites, radius_m = positions_m(config, int(first["seed"]), state[0])
    figure, axes = plt.subplots(figsize=(7.6, 6.4), layout="constrained")
    for site in sites:
        axes.add_patch(Circle(tuple(site), radius_m, fill=False, color=NEVER, linewidth=1.0, linestyle="--"))
    never = count == 0
    if never.any():
        x, y = places[never].T
        axes.scatter(x, y, _dot(len(count)) / 2, color=NEVER, linewidths=0, zorder=2)
        axes.scatter([], [], 20.0, color=NEVER, linewidths=0, label="never took part")
    chosen = np.flatnonzero(~never)
    chosen = chosen[np.argsort(count[chosen], kind="stable")]  # who came often lies on top
    if len(chosen):
        shades = LinearSegmentedColormap.from_list("taking part", ["#8fd0c0", "#2a7fba", "#3b0f5c"])
        look = {"cmap": shades, "vmin": 1, "vmax": max(int(count.max()), 2), "linewidths": 0}
        x, y = places[chosen].T
        dots = axes.scatter(x, y, _dot(len(chosen)), count[chosen], zorder=3, **look)  # type: ignore[arg-type]
        ticks = MaxNLocator(integer=True)
        words = "rounds in which a device took part"
        bar = figure.colorbar(dots, ax=axes, shrink=0.75, pad=0.02, ticks=ticks, label=words)
        bar.outline.set_visible(False)
    stations = "base station" if len(sites) == 1 else "base stations"
    axes.plot(
        *sites.T, "^", color="#D55E00", markersize=11, markeredgecolor="white", label=stations, zorder=5
    )
    label = label_of(records, cell)
    axes.set(title=f"The devices of {label}, seed {first['seed']}", xlabel="east (m)", ylabel="north (m)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def positions_m(
    config: Mapping[str, Any], seed: int, state: Mapping[str, NDArray[np.generic]]
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Return devices (N, 2) and base stations (C, 2) [m] of a saved state, and the radius of a cell [m].

    Sessions play no part in where a device is: a behaviour file need not be there any more.
    """
    tables: dict[str, dict[str, object]] = {"fleet": {}, "wireless": {}}
    for key, value in config.items():
        table, _, leaf = key.partition(".")
        if table in tables:
            tables[table][leaf] = value
    fleet = FleetConfig.model_validate({**tables["fleet"], "behaviour": ""})
    wireless = WirelessConfig.model_validate(tables["wireless"])
    devices = len(state[COUNT])
    links = Fleet(fleet, wireless, devices, seed, np.ones(devices)).links
    assert isinstance(links, Radio)
    links.load({name.removeprefix(LINKS): a for name, a in state.items() if name.startswith(LINKS)})
    return links.positions_m(), links.sites, wireless.radius_m


def _dot(many: int) -> float:
    """Return the area [points^2] of one of so many dots."""
    return float(np.clip(2e4 / many, 2.0, 42.0))
