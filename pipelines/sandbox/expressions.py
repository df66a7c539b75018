"""The expressions of a pipeline definition: Get, Std:Join, Std:JsonGet and the conditions.

Schema version 2020-12-01,
https://aws-sagemaker-mlops.github.io/sagemaker-model-building-pipeline-definition-JSON-schema/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_SEGMENT = re.compile(r"\.?([^.\[\]'\"]+)|\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]")
_COMPARISONS = {
    "Equals": lambda a, b: a == b,
    "GreaterThan": lambda a, b: a > b,
    "GreaterThanOrEqualTo": lambda a, b: a >= b,
    "LessThan": lambda a, b: a < b,
    "LessThanOrEqualTo": lambda a, b: a <= b,
}


class ExpressionError(ValueError):
    """An expression that cannot be evaluated; says which one and why."""


class Scope(Protocol):
    """What expressions can see while a pipeline runs."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The values of the pipeline's parameters."""

    @property
    def execution(self) -> Mapping[str, Any]:
        """The execution variables."""

    def properties(self, step: str) -> Any:
        """The properties of a finished step (the Describe answer of what it made)."""

    def property_file(self, step: str, name: str) -> Any:
        """The parsed JSON of a step's property file."""

    def json_object(self, s3_uri: str) -> Any:
        """The parsed JSON of an S3 object."""


@dataclass(frozen=True)
class Reference:
    """One ``{"Get": ...}``: kind is ``Steps``, ``Parameters`` or ``Execution``; name its first segment."""

    kind: str
    name: str
    path: tuple[str | int, ...]
    text: str


def parse_path(text: str) -> tuple[str | int, ...]:
    """``$.a.b[0]['c d']`` -> ``("a", "b", 0, "c d")``; the leading ``$`` is optional.

    Raises:
        ExpressionError: the text is empty or no path.
    """
    rest = text.removeprefix("$")
    segments: list[str | int] = []
    while rest:
        match = _SEGMENT.match(rest)
        if not match:
            raise ExpressionError(f"'{text}' is not a path: cannot read '{rest}'")
        name, index, single, double = match.groups()
        segments.append(
            int(index) if index is not None else next(x for x in (name, single, double) if x is not None)
        )
        rest = rest[match.end() :]
    if not segments:
        raise ExpressionError(f"'{text}' is an empty path")
    return tuple(segments)


def lookup(value: Any, path: tuple[str | int, ...], text: str) -> Any:
    """Follow a path through dicts and lists; a string into a list selects the item of that name.

    ``Outputs['model']`` is such a selection: the item whose member ending in ``Name`` equals ``model``.
    """
    for i, segment in enumerate(path):
        found = _step_into(value, segment)
        if found is _MISSING:
            there = "".join(f"[{s!r}]" for s in path[:i]) or "the top level"
            have = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ExpressionError(f"'{text}': no {segment!r} at {there}, which has: {have}")
        value = found
    return value


_MISSING = object()


def _step_into(value: Any, segment: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(segment if isinstance(segment, str) else str(segment), _MISSING)
    if isinstance(value, list) and isinstance(segment, int):
        return value[segment] if segment < len(value) else _MISSING
    if isinstance(value, list):
        named = (
            v for v in value if isinstance(v, dict) and segment in [v[k] for k in v if k.endswith("Name")]
        )
        return next(named, _MISSING)
    return _MISSING


def parse_reference(text: str) -> Reference:
    """Parse the text of a ``Get``.

    Raises:
        ExpressionError: neither ``Steps.*``, ``Parameters.*`` nor ``Execution.*``.
    """
    kind, _, rest = text.partition(".")
    if kind not in ("Steps", "Parameters", "Execution") or not rest:
        raise ExpressionError(
            f"'{text}' is not a reference: it must start with Steps., Parameters. or Execution."
        )
    path = parse_path(rest)
    return Reference(kind, str(path[0]), path[1:], text)


def references(value: Any) -> Iterator[Reference]:
    """Every ``Get`` anywhere in a part of a definition."""
    if isinstance(value, dict):
        if set(value) == {"Get"} and isinstance(value["Get"], str):
            yield parse_reference(value["Get"])
        else:
            for item in value.values():
                yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def resolve(value: Any, scope: Scope) -> Any:
    """A copy of ``value`` with every expression replaced by what it stands for.

    Raises:
        ExpressionError: a reference leads nowhere, or a JSON file lacks the path.
    """
    if isinstance(value, list):
        return [resolve(item, scope) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"Get"}:
        return _get(parse_reference(value["Get"]), scope)
    if set(value) == {"Std:Join"}:
        join = value["Std:Join"]
        return str(join["On"]).join(as_text(resolve(item, scope)) for item in join["Values"])
    if set(value) == {"Std:JsonGet"}:
        return _json_get(value["Std:JsonGet"], scope)
    return {key: resolve(item, scope) for key, item in value.items()}


def _get(reference: Reference, scope: Scope) -> Any:
    if reference.kind == "Steps":
        return lookup(scope.properties(reference.name), reference.path, reference.text)
    table = scope.parameters if reference.kind == "Parameters" else scope.execution
    if reference.name not in table or reference.path:
        raise ExpressionError(f"'{reference.text}' does not exist; there are: {', '.join(table)}")
    return table[reference.name]


def _json_get(arguments: dict[str, Any], scope: Scope) -> Any:
    path = arguments["Path"]
    if "S3Uri" in arguments:
        return lookup(scope.json_object(resolve(arguments["S3Uri"], scope)), parse_path(path), path)
    reference = parse_reference(arguments["PropertyFile"]["Get"])
    if reference.kind != "Steps" or len(reference.path) != 2 or reference.path[0] != "PropertyFiles":
        raise ExpressionError(
            f"'{reference.text}' is no property file: write Steps.<step>.PropertyFiles.<name>"
        )
    found = lookup(scope.property_file(reference.name, str(reference.path[1])), parse_path(path), path)
    if isinstance(found, dict | list):
        raise ExpressionError(
            f"'{path}' in {reference.text} is a JSON {type(found).__name__}, not a single value"
        )
    return found


def as_text(value: Any) -> str:
    """A primitive value as Std:Join writes it.

    Raises:
        ExpressionError: objects and lists cannot be joined.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise ExpressionError(
        f"Std:Join takes strings, numbers and booleans, not {type(value).__name__}: {value!r}"
    )


def evaluate(condition: dict[str, Any], scope: Scope) -> bool:
    """The truth of one condition.

    Raises:
        ExpressionError: an unknown condition type, or values of different kinds are compared.
    """
    kind = condition.get("Type")
    if kind in _COMPARISONS:
        left, right = resolve(condition["LeftValue"], scope), resolve(condition["RightValue"], scope)
        return _compare(str(kind), left, right)
    if kind == "In":
        query = resolve(condition["QueryValue"], scope)
        return any(_kind(v) == _kind(query) and v == query for v in resolve(condition["Values"], scope))
    if kind == "Not":
        return not evaluate(condition.get("Condition", condition.get("Expression", {})), scope)
    if kind == "Or":
        return any(evaluate(c, scope) for c in condition["Conditions"])
    if kind == "And":
        return all(evaluate(c, scope) for c in condition["Conditions"])
    raise ExpressionError(f"unknown condition type '{kind}'; there are: {', '.join(CONDITION_TYPES)}")


CONDITION_TYPES = (*_COMPARISONS, "In", "Not", "Or", "And")


def _compare(kind: str, left: Any, right: Any) -> bool:
    if _kind(left) != _kind(right):
        raise ExpressionError(
            f"{kind} compares a {_kind(left)} ({left!r}) with a {_kind(right)} ({right!r}); "
            "both must be of one kind"
        )
    if kind != "Equals" and _kind(left) == "boolean":
        raise ExpressionError(f"{kind} cannot order booleans ({left!r}, {right!r})")
    return bool(_COMPARISONS[kind](left, right))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else type(value).__name__
