"""Values as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def plain(value: object) -> object:
    """Turn NumPy values, tuples and paths into JSON's types, and what is not finite into null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def plain_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """Return named values as :func:`plain` has them."""
    return {name: plain(value) for name, value in fields.items()}
