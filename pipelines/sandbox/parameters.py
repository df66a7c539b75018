"""The parameters of a pipeline: their declarations, and the values an execution is started with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.sandbox.errors import invalid, unparsable

MAX_PARAMETERS = 200


def check_declarations(parameters: Any) -> None:
    """Check the ``Parameters`` of a definition.

    Raises:
        ServiceError: ValidationException: a name used twice, an unknown type, a default of the wrong type or
            outside its enum.
    """
    if not isinstance(parameters, list) or len(parameters) > MAX_PARAMETERS:
        raise unparsable(f"Parameters must be an array of at most {MAX_PARAMETERS}.")
    names = [p.get("Name") if isinstance(p, dict) else None for p in parameters]
    for parameter, name in zip(parameters, names, strict=True):
        if not isinstance(name, str) or names.count(name) > 1:
            raise unparsable(f"Parameter names must be given and unique; '{name}' is not.")
        if parameter.get("Type") not in _TYPES:
            raise unparsable(
                f"Parameter '{name}' has the type {parameter.get('Type')!r}; types: {', '.join(_TYPES)}."
            )
        if "DefaultValue" in parameter:
            default = parameter["DefaultValue"]
            text = ("true" if default else "false") if isinstance(default, bool) else str(default)
            for problem in _value_problems(parameter, text):
                raise unparsable(f"Default of parameter '{name}': {problem}.")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", text):
        raise ValueError(text)
    return int(text)


_TYPES: dict[str, Callable[[str], Any]] = {
    "String": str,
    "Integer": _integer,
    "Float": float,
    "Boolean": _boolean,
}


def _value_problems(parameter: dict[str, Any], text: str) -> Iterator[str]:
    kind = parameter["Type"]
    if text == "":
        yield 'string "" is too short (length: 0, required minimum: 1)'
        return
    try:
        _TYPES[kind](text)
    except ValueError:
        allowed = {"Float": '["integer","number"]'}.get(kind, f'["{kind.lower()}"]')
        yield f'instance value ("{text}") does not match any allowed primitive type (allowed: {allowed})'
        return
    enum = parameter.get("EnumValues")
    if enum and text not in [str(e) for e in enum]:
        values = json.dumps(enum, separators=(",", ":"))
        yield f'instance value ("{text}") not found in enum (possible values: {values})'


def start_parameters(
    definition: dict[str, Any], given: list[dict[str, str]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters of an execution: typed values for expressions, and their texts as the API lists them.

    Raises:
        ServiceError: ValidationException naming the parameter that is unknown, mistyped, outside its enum or
            missing.
    """
    declared = {p["Name"]: p for p in definition.get("Parameters") or []}
    texts = {g["Name"]: g["Value"] for g in given}
    unknown = sorted(set(texts) - set(declared))
    if unknown:
        raise invalid(
            f"object instance has properties which are not allowed by the schema: {json.dumps(unknown)}. "
            f"The pipeline's parameters are: {', '.join(declared) or 'none'}."
        )
    values: dict[str, Any] = {}
    for name, parameter in declared.items():
        if name not in texts:
            if "DefaultValue" not in parameter:
                raise invalid(
                    f'object has missing required properties (["{name}"]): the parameter has no default.'
                )
            default = parameter["DefaultValue"]
            texts[name] = ("true" if default else "false") if isinstance(default, bool) else str(default)
        for problem in _value_problems(parameter, texts[name]):
            raise invalid(f"Parameter '{name}': [{problem}]")
        values[name] = _TYPES[parameter["Type"]](texts[name])
    return values, {name: texts[name] for name in declared}
