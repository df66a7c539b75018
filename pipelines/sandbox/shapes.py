"""Check a request against the service's own model (botocore's), in the words of the service.

botocore's clients check types and required members only; the service also checks enums, lengths, ranges and
patterns. A pipeline step's arguments never pass through a client at all, so here everything is checked.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import botocore.session
from botocore.model import ServiceModel, Shape

UNKNOWN: Any = object()
"""Stands for a value that only a running pipeline knows; every check passes over it."""

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "boolean": (bool,),
    "timestamp": (int, float, str),
    "structure": (dict,),
    "list": (list,),
    "map": (dict,),
}


@functools.lru_cache(maxsize=1)
def service_model() -> ServiceModel:
    """SageMaker's model as botocore ships it (read once, about 0.3 s)."""
    return botocore.session.get_session().get_service_model("sagemaker")


def knows(action: str) -> bool:
    """Whether AWS has this action at all, emulated here or not."""
    return action in service_model().operation_names


def problems(action: str, params: dict[str, Any]) -> list[str]:
    """Everything in ``params`` that the service would refuse for ``action``, one sentence each."""
    shape = service_model().operation_model(action).input_shape
    return [] if shape is None else list(_walk(shape, params, ""))


def unknown_members(action: str, params: dict[str, Any]) -> list[str]:
    """Members that ``action`` does not have: the JSON protocol ignores them, a definition must not."""
    return [p for p in problems(action, params) if p.startswith("Unknown Argument member")]


def validation_message(found: list[str]) -> str:
    """The service's sentence for a list of problems."""
    return f"{len(found)} validation error{'s' if len(found) > 1 else ''} detected: " + "; ".join(found)


def _walk(shape: Shape, value: Any, path: str) -> Iterator[str]:
    if value is UNKNOWN or shape.type_name == "blob":
        return
    if not _is_of_type(shape, value):
        yield f"Value of type {type(value).__name__} at '{path}' is not a {shape.type_name}"
    elif shape.type_name == "structure":
        yield from _structure(shape, value, path)
    elif shape.type_name == "list":
        yield from _constraints(shape, value, path)
        for i, item in enumerate(value):
            yield from _walk(shape.member, item, f"{path}.{i + 1}.member")
    elif shape.type_name == "map":
        yield from _constraints(shape, value, path)
        for key, item in value.items():
            yield from _walk(shape.key, key, f"{path}.key")
            yield from _walk(shape.value, item, f"{path}.{key}")
    else:
        yield from _constraints(shape, value, path)


def _is_of_type(shape: Shape, value: Any) -> bool:
    expected = _PYTHON_TYPES[shape.type_name]
    return isinstance(value, expected) and (not isinstance(value, bool) or bool in expected)


def _structure(shape: Shape, value: dict[str, Any], path: str) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    for name in shape.required_members:
        if value.get(name) is None:
            where = f"{prefix}{_camel(name)}"
            yield f"Value null at '{where}' failed to satisfy constraint: Member must not be null"
    for name, item in value.items():
        if name not in shape.members:
            yield f"Unknown Argument member '{name}'" + (f" at '{path}'" if path else "")
        elif item is not None:
            yield from _walk(shape.members[name], item, f"{prefix}{_camel(name)}")


def _constraints(shape: Shape, value: Any, path: str) -> Iterator[str]:
    said = f"Value '{_short(value)}' at '{path}' failed to satisfy constraint: Member must"
    enum = getattr(shape, "enum", None)
    if enum and value not in enum:
        yield f"{said} satisfy enum value set: [{', '.join(enum)}]"
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    sized = shape.type_name in ("string", "list", "map")
    size = len(value) if sized else value
    what = "have length" if sized else "have value"
    if low is not None and size < low:
        yield f"{said} {what} greater than or equal to {low}"
    if high is not None and size > high:
        yield f"{said} {what} less than or equal to {high}"
    pattern = shape.metadata.get("pattern")
    if pattern and shape.type_name == "string" and not _matches(pattern, value):
        yield f"{said} satisfy regular expression pattern: {pattern}"


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern, re.DOTALL)
    except (
        re.error
    ):  # Java classes such as \p{L}, which Python's re lacks: those few patterns are not checked
        return None


def _matches(pattern: str, value: str) -> bool:
    compiled = _compiled(pattern)
    return compiled is None or compiled.fullmatch(value) is not None


def _camel(name: str) -> str:
    return name[:1].lower() + name[1:]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
