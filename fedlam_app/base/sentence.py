"""One sentence for one bad value: pydantic's errors told in the words of whoever set the key.

A message names the key as it is spelled in the configuration, the value that was given, what is allowed
and, for a word, the nearest spelling: ``'model.tuning' = 'lorra' is not allowed: it must be 'lora' or 'ln';
did you mean 'lora'?``
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_LIMITS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def field_of(model: type[BaseModel], key: str) -> FieldInfo:
    """Return the field at a dotted kebab-case ``key`` of nested models."""
    *tables, leaf = key.replace("-", "_").split(".")
    for table in tables:
        inner = model.model_fields[table].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return model.model_fields[leaf]


def allowed(annotation: object, limits: Sequence[object] = ()) -> str:
    """Say what a field takes: ``an integer of at least 1``, ``'tdd' or 'fdd'``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        annotation, *marks = get_args(annotation)
        return allowed(annotation, [limit for mark in marks for limit in getattr(mark, "metadata", [mark])])
    if origin is tuple:
        size = " (not empty)" if any(hasattr(limit, "min_length") for limit in limits) else ""
        return f"a comma list{size} of {_plural(allowed(get_args(annotation)[0]))}"
    if origin is Literal:
        *most, last = (f"'{choice}'" for choice in get_args(annotation))
        return f"{', '.join(most)} or {last}" if most else last
    if annotation is str:
        return "text that is not empty" if any(hasattr(limit, "min_length") for limit in limits) else "text"
    word = _WORDS[annotation]  # type: ignore[index]
    bounds = [
        f"{phrase} {getattr(limit, name)}"
        for limit in limits
        for name, phrase in _LIMITS.items()
        if hasattr(limit, name)
    ]
    return f"{word} {' and '.join(bounds)}" if bounds else word


def sentence(error: ValidationError, model: type[BaseModel], flat: Mapping[str, object]) -> str:
    """Turn the first error of validating ``flat`` (dotted kebab-case keys) as ``model`` into one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    if key not in flat:
        # A combination refused by the model itself: it has written its own sentence.
        return first["msg"].removeprefix("Value error, ")
    field = field_of(model, key)
    near = ""
    if first["type"] == "literal_error":
        matches = difflib.get_close_matches(str(first["input"]), _choices(field.annotation), n=1)
        near = f"; did you mean '{matches[0]}'?" if matches else ""
    # A validator of one field raises what the value must be; the rest follows from the annotation.
    custom = first["type"] == "value_error"
    right = str(first["ctx"]["error"]) if custom else allowed(field.annotation, field.metadata)
    return f"'{key}' = {flat[key]!r} is not allowed: it must be {right}{near}"


def _choices(annotation: object) -> list[str]:
    while get_origin(annotation) in (tuple, Annotated):
        annotation = get_args(annotation)[0]
    return [str(choice) for choice in get_args(annotation)]


def _plural(what: str) -> str:
    return what.replace("an integer", "integers", 1)
