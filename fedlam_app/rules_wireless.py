"""What a wireless fleet cannot do together with the rest of a configuration, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlam_app.config import RunConfig

WITHOUT_RADIO = ("local", "central")  # no sharing, and one that has everything
NO_TURNS = ("fedbuff",)  # waits for nobody
UNCODED = ("fp32", "fp64")  # a number is a symbol; fp64, for tests, takes the airtime of two
FILES = ("capacity", "behaviour", "speeds")


def has_fleet(config: RunConfig) -> bool:
    """Whether devices have radios and a virtual clock; the two bounds have neither."""
    return config.fleet.profiles != "none" and config.strategy not in WITHOUT_RADIO


def broken(config: RunConfig) -> Iterator[str]:
    """Yield what the tables ``fleet``, ``wireless`` and ``selection`` forbid each other, and other tables."""
    if config.fleet.profiles == "none":
        if config.job == "compare" and config.compare.policies:
            yield (
                f"'compare.policies' = '{','.join(config.compare.policies)}' needs a fleet to choose from;"
                " it must be empty with 'fleet.profiles' = 'none'"
            )
        return
    yield from _files(config)
    selection, wireless = config.selection, config.wireless
    mode = f"'selection.mode' = '{selection.mode}'"
    wanted = config.train.wanted
    if config.job == "case-study":
        yield (
            f"'fleet.profiles' = '{config.fleet.profiles}' is not allowed with 'job' = 'case-study', whose"
            " servers have wires; it must be 'none', or the job 'train' or 'compare'"
        )
    if wireless.transport == "air" and selection.mode == "asynchronous":
        yield (
            f"'wireless.transport' = 'air' is not allowed with {mode}, whose devices do not send together; it"
            " must be 'ofdma', or the mode 'synchronous'"
        )
    if wireless.transport == "air" and selection.mode == "over-selection":
        yield (
            f"'wireless.transport' = 'air' is not allowed with {mode}, which would add up the late ones too;"
            " it must be 'ofdma', or the mode 'synchronous' or 'deadline'"
        )
    if wireless.transport == "analog" and (selection.mode == "asynchronous" or config.strategy in NO_TURNS):
        culprit = mode if selection.mode == "asynchronous" else f"'strategy' = '{config.strategy}'"
        yield (
            f"'wireless.transport' = 'analog' is not allowed with {culprit}, where nobody knows any more how"
            " a device was heard when its result enters a step; it must be 'ofdma', or the mode 'synchronous'"
            " and the strategy one that waits"
        )
    for name in ("capacity", "speeds"):
        if wireless.transport != "ofdma" and getattr(config.fleet, name):
            yield (
                f"'wireless.transport' = '{wireless.transport}' is not allowed with 'fleet.{name}', whose"
                " links are rates and no channels; it must be 'ofdma', or the file none"
            )
    if selection.mode == "asynchronous" and config.fedbuff.buffer > wanted:
        yield (
            f"'fedbuff.buffer' = {config.fedbuff.buffer} could never fill: {wanted} devices are at work; it"
            f" must be 1 to {wanted}"
        )
    if wireless.scenario == "indoor" and wireless.indoor_share > 0.0:
        yield (
            f"'wireless.indoor-share' = {wireless.indoor_share:g} is not allowed with 'wireless.scenario' ="
            " 'indoor', whose base stations are inside too; it must be 0"
        )


def with_space(config: RunConfig, space: str) -> Iterator[str]:
    """Yield what a fleet's transport and a strategy of that family forbid each other."""
    code = config.wire.jacobian
    uncoded = has_fleet(config) and config.wireless.transport == "analog"
    if uncoded and space == "gradient" and code not in UNCODED:
        yield (
            f"'wireless.transport' = 'analog' is not allowed with 'wire.jacobian' = '{code}', which is a code"
            f" and not the numbers themselves; it must be '{UNCODED[0]}'"
        )


def _files(config: RunConfig) -> Iterator[str]:
    for name in FILES:
        value = getattr(config.fleet, name)
        if value and not Path(value).is_absolute():
            yield f"'fleet.{name}' = '{value}' is not allowed: it must be an absolute path"
        elif value and not Path(value).is_file():
            yield f"'fleet.{name}' = '{value}' does not exist; it must name a file that does"
