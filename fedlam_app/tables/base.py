"""What every table of the configuration is made of: strict, frozen, kebab-case, and comma lists."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

SCENARIOS = ("uma-nlos", "uma-los", "umi-nlos", "umi-los", "rma-nlos", "rma-los")


def split(value: object) -> object:
    """Turn ``"1,2,5"`` into ``("1", "2", "5")``; a lone integer is a list of one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",")) if value.strip() else ()
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def split_integers(value: object) -> Any:
    """Turn ``"1,2,5"`` into ``(1, 2, 5)``; what is no integer stays as it is, to be refused."""
    parts = split(value)
    if not isinstance(parts, tuple):
        return parts
    return tuple(int(part) if isinstance(part, str) and part.isdecimal() else part for part in parts)


def known_scenarios(value: str) -> str:
    """Check a comma list of TR 38.901 scenarios."""
    names = split(value)
    assert isinstance(names, tuple)
    if not names or not set(names) <= set(SCENARIOS):
        raise ValueError(f"a comma list (not empty) of {', '.join(SCENARIOS)}")
    return ",".join(names)


Positive = Annotated[int, Field(ge=1)]
Speed = Annotated[float, Field(ge=0, le=500)]
Snr = Annotated[float, Field(ge=-50, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0)]


class Table(BaseModel):
    """A table: unknown keys, wrong types, NaN and infinities are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
