"""A step's arguments as the request that the service makes of them, against botocore's own shapes.

Whatever is known only at run time is a typed stand-in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pipelines.definition import Definition, Problem

REQUESTS = {  # step type -> operation, and the name that the service fills in
    "Processing": ("CreateProcessingJob", "ProcessingJobName"),
    "RegisterModel": ("CreateModelPackage", None),
    "Model": ("CreateModel", "ModelName"),
    "EndpointConfig": ("CreateEndpointConfig", "EndpointConfigName"),
    "Endpoint": ("CreateEndpoint", None),
}
SCALARS = {
    "string": ("String",),
    "integer": ("Integer",),
    "long": ("Integer",),
    "float": ("Float", "Integer"),
    "double": ("Float", "Integer"),
    "boolean": ("Boolean",),
}


def check_request(definition: Definition, step: Mapping[str, Any]) -> Iterator[Problem]:
    """What botocore does not know in a step's arguments: fields, types, lengths, patterns, enums."""
    where = f"step {step['Name']}"
    if step["Type"] not in REQUESTS:
        if step["Type"] not in ("Condition", "Fail"):
            yield Problem(where, f"step type {step['Type']} is not checked by this linter")
        return
    operation, filled_in = REQUESTS[step["Type"]]
    problems: list[Problem] = []
    shape = _model().operation_model(operation).input_shape
    request = _stand_in(definition, step["Arguments"], shape, where, problems)
    if filled_in:
        request.setdefault(filled_in, "x")
    yield from problems
    yield from _validate(request, shape, where)


@cache
def _model() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("sagemaker")


def _validate(request: Mapping[str, Any], shape: Any, where: str) -> Iterator[Problem]:
    from botocore.validate import ParamValidator

    report = ParamValidator().validate(request, shape)
    for line in report.generate_report().splitlines():
        yield Problem(where, line)


def _stand_in(definition: Definition, value: Any, shape: Any, where: str, problems: list[Problem]) -> Any:
    """`value` with every run-time expression replaced by a value of the expected type.

    Literals are checked on the way; problems are appended.
    """
    if isinstance(value, dict) and ("Get" in value or any(key.startswith("Std:") for key in value)):
        return _expression(definition, value, shape, where, problems)
    if shape.type_name == "structure" and isinstance(value, dict):
        known = {key: shape.members[key] for key in value if key in shape.members}
        return value | {
            key: _stand_in(definition, value[key], member, f"{where}, {key}", problems)
            for key, member in known.items()
        }
    if shape.type_name == "map" and isinstance(value, dict):
        return {
            key: _stand_in(definition, one, shape.value, f"{where}, {key}", problems)
            for key, one in value.items()
        }
    if shape.type_name == "list" and isinstance(value, list):
        if len(value) > shape.metadata.get("max", len(value)):
            problems.append(Problem(where, f"{len(value)} entries, {shape.metadata['max']} are allowed"))
        return [_stand_in(definition, one, shape.member, where, problems) for one in value]
    problems += [Problem(where, words) for words in _literal(value, shape)]
    return value


def _expression(
    definition: Definition, value: dict[str, Any], shape: Any, where: str, problems: list[Problem]
) -> Any:
    get = value.get("Get", "")
    parameter = (
        definition.parameters.get(get.removeprefix("Parameters.")) if get.startswith("Parameters.") else None
    )
    if parameter:
        if parameter["Type"] not in SCALARS.get(shape.type_name, ()):
            problems.append(
                Problem(
                    where,
                    f"parameter {parameter['Name']} is {parameter['Type']}, {shape.type_name} is wanted",
                )
            )
        values = parameter.get("EnumValues") or [parameter.get("DefaultValue")]
        for one in values:
            if one is not None:
                problems += [
                    Problem(f"parameter {parameter['Name']}", words) for words in _literal(one, shape)
                ]
    elif "Std:Join" in value and shape.type_name != "string":
        problems.append(Problem(where, f"a joined text where {shape.type_name} is wanted"))
    low = shape.metadata.get("min", 0)
    return {
        "string": "x" * max(1, int(low)),
        "boolean": True,
        "float": 1.0,
        "double": 1.0,
        "list": [],
        "map": {},
    }.get(shape.type_name, max(1, int(low)))


def _literal(value: Any, shape: Any) -> Iterator[str]:
    limits = shape.metadata
    if isinstance(value, str) and shape.type_name == "string":
        if getattr(shape, "enum", None) and value not in shape.enum:
            yield f"'{value}' is no {shape.name} of this botocore"
        if len(value) > limits.get("max", len(value)):
            yield f"{len(value)} characters, {limits['max']} are allowed: {value[:40]}…"
        # \p{…} is Java's; Python's re has no such classes
        pattern = limits.get("pattern", "")
        if pattern and r"\p" not in pattern and not re.fullmatch(pattern, value):
            yield f"'{value}' does not match {pattern}"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if value > limits.get("max", value):
            yield f"{value} is above the limit {limits['max']}"
        if value < limits.get("min", value):
            yield f"{value} is below the limit {limits['min']}"
