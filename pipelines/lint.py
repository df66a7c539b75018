"""Offline checks of a rendered pipeline definition: what the service would refuse, found before it is asked.

A check is a registered generator from a `Definition` to `Problem`s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipelines.definition import Definition, Problem, gets, walk
from pipelines.errors import UserError
from pipelines.lint_requests import check_request

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
    """Each step's arguments are a request that the service would take."""
    for step in definition.steps.values():
        yield from check_request(definition, step)
