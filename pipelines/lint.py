"""Offline checks of a rendered pipeline definition: what the service would refuse, found before it is asked.

A check is a registered generator from a `Definition` to `Problem`s. Requests are checked against botocore's
own shapes, with a typed stand-in wherever the value is known only at run time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipelines.errors import UserError

REQUESTS = {  # step type -> operation, and the name that the service fills in
    "Processing": ("CreateProcessingJob", "ProcessingJobName"),
    "RegisterModel": ("CreateModelPackage", None),
    "Model": ("CreateModel", "ModelName"),
    "EndpointConfig": ("CreateEndpointConfig", "EndpointConfigName"),
    "Endpoint": ("CreateEndpoint", None),
}
EXECUTION = {
    "PipelineName",
    "PipelineArn",
    "PipelineExecutionId",
    "PipelineExecutionArn",
    "StartDateTime",
    "CurrentDateTime",
}
KERNEL_WAYS = ("AdditionalModelDataSources", "MLA_KERNEL_S3_URI")
STEP_NAME = re.compile(r"[A-Za-z0-9\-_]{1,64}")
MESSAGE_LIMIT = 1024
NUMBER_LENGTH = 24  # the longest text of a float64
DEFINITION_LIMIT = 1_048_576
SCALARS = {
    "string": ("String",),
    "integer": ("Integer",),
    "long": ("Integer",),
    "float": ("Float", "Integer"),
    "double": ("Float", "Integer"),
    "boolean": ("Boolean",),
}


@dataclass(frozen=True)
class Problem:
    """What is wrong and where in the definition."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Definition:
    """A parsed definition with the lookups that checks need."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.document: dict[str, Any] = json.loads(text)

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Parameters by name."""
        return {parameter["Name"]: parameter for parameter in self.document.get("Parameters", [])}

    @cached_property
    def steps(self) -> dict[str, dict[str, Any]]:
        """All steps by name, those inside conditions too."""
        return {step["Name"]: step for step, _ in walk(self.document["Steps"])}

    def needs(self, step: dict[str, Any]) -> set[str]:
        """Names of the steps that a step names: by DependsOn or by a reference in its own arguments."""
        arguments = {
            key: value for key, value in step["Arguments"].items() if key not in ("IfSteps", "ElseSteps")
        }
        named = {match.group(1) for get in gets(arguments) if (match := re.match(r"Steps\.([^.\[]+)", get))}
        return named | {one if isinstance(one, str) else one["Step"] for one in step.get("DependsOn", [])}


Check = Callable[[Definition], Iterator[Problem]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS.append(function)
    return function


def lint(definition: str) -> list[Problem]:
    """All problems of a definition given as JSON; empty when the service should accept it."""
    parsed = Definition(definition)
    return [problem for one in CHECKS for problem in one(parsed)]


def require_clean(name: str, definition: str) -> None:
    """Raise UserError with the first problem, and how many more there are."""
    if problems := lint(definition):
        more = f" (and {len(problems) - 1} more: mla-pipeline render --check)" if len(problems) > 1 else ""
        raise UserError(
            f"{problems[0].what}{more}", f"pipeline {name}, {problems[0].where}", "correct the definition"
        )


def walk(
    steps: list[dict[str, Any]], parent: str | None = None
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Every step with the name of the condition step around it."""
    for step in steps:
        yield step, parent
        for branch in ("IfSteps", "ElseSteps"):
            yield from walk(step["Arguments"].get(branch, []), step["Name"])


def gets(value: Any) -> Iterator[str]:
    """Every {"Get": ...} in a value."""
    if isinstance(value, dict):
        if isinstance(value.get("Get"), str):
            yield value["Get"]
        for one in value.values():
            yield from gets(one)
    elif isinstance(value, list):
        for one in value:
            yield from gets(one)


@check
def size(definition: Definition) -> Iterator[Problem]:
    """The service's limit on the whole text."""
    if len(definition.text) > DEFINITION_LIMIT:
        yield Problem("definition", f"{len(definition.text)} characters, {DEFINITION_LIMIT} are allowed")


@check
def names(definition: Definition) -> Iterator[Problem]:
    """Step and parameter names: form and uniqueness."""
    seen: set[str] = set()
    for step, _ in walk(definition.document["Steps"]):
        if not STEP_NAME.fullmatch(step["Name"]):
            yield Problem(f"step {step['Name']}", "a step name has 1 to 64 of A-Z a-z 0-9 - _")
        if step["Name"] in seen:
            yield Problem(f"step {step['Name']}", "two steps have this name")
        seen.add(step["Name"])
    if len(definition.parameters) < len(definition.document.get("Parameters", [])):
        yield Problem("parameters", "two parameters have one name")


@check
def defaults(definition: Definition) -> Iterator[Problem]:
    """A default lies within its enum."""
    for name, parameter in definition.parameters.items():
        enum, default = parameter.get("EnumValues"), parameter.get("DefaultValue")
        if enum and default is not None and default not in enum:
            yield Problem(f"parameter {name}", f"default {default!r} is none of {', '.join(enum)}")


@check
def references(definition: Definition) -> Iterator[Problem]:
    """Whatever is referred to exists: parameters, steps, outputs, property files."""
    for step, _ in walk(definition.document["Steps"]):
        where = f"step {step['Name']}"
        for needed in sorted(definition.needs(step) - set(definition.steps)):
            yield Problem(where, f"refers to step '{needed}', which does not exist")
        own = {key: value for key, value in step["Arguments"].items() if key not in ("IfSteps", "ElseSteps")}
        for get in gets(own):
            yield from _reference(definition, where, get)


def _reference(definition: Definition, where: str, get: str) -> Iterator[Problem]:
    kind, _, rest = get.partition(".")
    if kind == "Parameters" and rest not in definition.parameters:
        yield Problem(where, f"refers to parameter '{rest}', which does not exist")
    elif kind == "Execution" and rest not in EXECUTION:
        yield Problem(where, f"refers to execution variable '{rest}', which does not exist")
    elif kind == "Steps":
        step = definition.steps.get(re.split(r"[.\[]", rest)[0], {})
        outputs = {
            one["OutputName"]
            for one in step.get("Arguments", {}).get("ProcessingOutputConfig", {}).get("Outputs", [])
        }
        if (output := re.search(r"Outputs\['([^']+)'\]", rest)) and output.group(1) not in outputs:
            yield Problem(
                where, f"refers to output '{output.group(1)}', which {step.get('Name')} does not write"
            )
        files = {one["PropertyFileName"]: one["OutputName"] for one in step.get("PropertyFiles", [])}
        if file := re.search(r"\.PropertyFiles\.(.+)$", rest):
            if file.group(1) not in files:
                yield Problem(where, f"reads property file '{file.group(1)}', which {step.get('Name')} lacks")
            elif files[file.group(1)] not in outputs:
                yield Problem(where, f"property file '{file.group(1)}' is of no output of {step.get('Name')}")
    elif kind not in ("Parameters", "Execution"):
        yield Problem(where, f"'{get}' refers to neither Parameters, Execution nor Steps")


@check
def cycles(definition: Definition) -> Iterator[Problem]:
    """No step waits for itself; a step inside a condition waits for the condition."""
    graph = {
        step["Name"]: (definition.needs(step) | ({parent} if parent else set())) & set(definition.steps)
        for step, parent in walk(definition.document["Steps"])
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield Problem(f"step {error.args[1][0]}", f"waits for itself: {' <- '.join(error.args[1])}")


@check
def messages(definition: Definition) -> Iterator[Problem]:
    """A Fail step's message fits the service's limit even when every number has its longest form."""
    for step in definition.steps.values():
        if step["Type"] == "Fail":
            length = _longest(step["Arguments"].get("ErrorMessage", ""))
            if length > MESSAGE_LIMIT:
                yield Problem(
                    f"step {step['Name']}",
                    f"message of up to {length} characters, {MESSAGE_LIMIT} are allowed",
                )


def _longest(value: Any) -> int:
    if isinstance(value, dict) and "Std:Join" in value:
        parts = value["Std:Join"]["Values"]
        return sum(map(_longest, parts)) + len(value["Std:Join"]["On"]) * max(0, len(parts) - 1)
    return NUMBER_LENGTH if isinstance(value, dict) else len(str(value))


@check
def kernels(definition: Definition) -> Iterator[Problem]:
    """Each container gets its kernel in exactly one way, the registered one as staging does."""
    ways: dict[str, str] = {}
    for name, step in definition.steps.items():
        for container in _containers(step["Arguments"]):
            mounted = any(one.get("ChannelName") == "kernel" for one in _mounts(container))
            named = "MLA_KERNEL_S3_URI" in container.get("Environment", {})
            if mounted == named:
                both = "in both" if mounted else "in none"
                yield Problem(
                    f"step {name}", f"the container has its kernel {both} of {' and '.join(KERNEL_WAYS)}"
                )
            else:
                ways[name] = KERNEL_WAYS[named]
    if len(set(ways.values())) > 1:
        each = ", ".join(f"{name} {way}" for name, way in ways.items())
        yield Problem("definition", f"the kernel reaches containers in different ways: {each}")


def _containers(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    specification = arguments.get("InferenceSpecification", arguments)
    primary = [arguments["PrimaryContainer"]] if "PrimaryContainer" in arguments else []
    return [*primary, *specification.get("Containers", [])]


def _mounts(container: Mapping[str, Any]) -> list[dict[str, Any]]:
    return container.get("AdditionalModelDataSources", [])


@check
def requests(definition: Definition) -> Iterator[Problem]:
    """Each step's arguments are a request that botocore knows: fields, types, lengths, patterns, enums."""
    for step in definition.steps.values():
        if step["Type"] not in REQUESTS:
            if step["Type"] not in ("Condition", "Fail"):
                yield Problem(
                    f"step {step['Name']}", f"step type {step['Type']} is not checked by this linter"
                )
            continue
        operation, filled_in = REQUESTS[step["Type"]]
        problems: list[Problem] = []
        shape = _model().operation_model(operation).input_shape
        request = _stand_in(definition, step["Arguments"], shape, f"step {step['Name']}", problems)
        if filled_in:
            request.setdefault(filled_in, "x")
        yield from problems
        yield from _validate(request, shape, f"step {step['Name']}")


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
