"""Checks of a pipeline definition on create and update."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pipelines.sandbox import retries, shapes
from pipelines.sandbox.errors import invalid, not_emulated, unparsable
from pipelines.sandbox.expressions import CONDITION_TYPES, ExpressionError, Reference, references
from pipelines.sandbox.parameters import check_declarations

MAX_DEFINITION = 1_048_576  # characters, SageMaker's quota
STEP_ACTIONS = {
    "Processing": "CreateProcessingJob",
    "Model": "CreateModel",
    "RegisterModel": "CreateModelPackage",
    "EndpointConfig": "CreateEndpointConfig",
    "Endpoint": "CreateEndpoint",
}  # a step of this type makes this call with its Arguments
STEP_TYPES = (*STEP_ACTIONS, "Condition", "Fail")
EXECUTION_VARIABLES = (
    "PipelineName",
    "PipelineArn",
    "PipelineExecutionId",
    "PipelineExecutionArn",
    "StartDateTime",
    "CurrentDateTime",
)
TRIGGERS = ("Completed", "Failed", "Stopped", "Any")
_GIVEN_BY_SERVICE = {
    "ProcessingJobName",
    "ModelName",
    "EndpointConfigName",
}  # a definition may leave these out


@dataclass(frozen=True)
class Node:
    """One step of a definition and where it stands.

    Attributes:
        step: the step as the definition has it.
        depends: upstream step -> the outcome that lets this one run (``Completed``, ``Failed``, ``Stopped``,
            ``Any``).
        parent: the condition step that holds it, if any.
        branch: in which branch of the parent.
    """

    step: dict[str, Any]
    depends: dict[str, str]
    parent: str | None = None
    branch: bool | None = None

    @property
    def name(self) -> str:
        """The step's name."""
        return self.step["Name"]


def parse_definition(text: str) -> dict[str, Any]:
    """Parse and check a definition.

    Raises:
        ServiceError: ValidationException with the first fault found, or UnsupportedOperation naming a step
            type.
    """
    if len(text) > MAX_DEFINITION:
        raise invalid(
            f"Pipeline definition has {len(text)} characters, at most {MAX_DEFINITION} are allowed."
        )
    try:
        definition = json.loads(text)
    except json.JSONDecodeError as error:
        raise unparsable(f"It is not JSON: {error}") from None
    if not isinstance(definition, dict):
        raise unparsable("Expecting start of Json Object.")
    if definition.get("Version") != "2020-12-01":
        raise unparsable(f"Version must be '2020-12-01', not {definition.get('Version')!r}.")
    check_declarations(definition.get("Parameters") or [])
    steps = definition.get("Steps")
    if not isinstance(steps, list) or not steps:
        raise unparsable("Steps must be a non-empty array.")
    try:
        _check_graph(graph(definition), definition)
    except ExpressionError as error:
        raise unparsable(f"{error}.") from None
    return definition


def graph(definition: dict[str, Any]) -> dict[str, Node]:
    """Every step by name, those inside condition branches too, in the order of the definition.

    Raises:
        ServiceError: a name is missing, bad or used twice, or a step has no known type.
    """
    nodes: dict[str, Node] = {}

    def add(steps: list[Any], parent: str | None, branch: bool | None) -> None:
        for step in steps:
            name = _check_step(step)
            if name in nodes:
                raise unparsable(f"Step names must be unique. Duplicate step name: '{name}'.")
            depends = _dependencies(step)
            if parent:
                depends[parent] = "Completed"
            nodes[name] = Node(step, depends, parent, branch)
            if step["Type"] == "Condition":
                add(step["Arguments"].get("IfSteps") or [], name, True)
                add(step["Arguments"].get("ElseSteps") or [], name, False)

    add(definition["Steps"], None, None)
    return nodes


def _check_step(step: Any) -> str:
    if not isinstance(step, dict) or not isinstance(step.get("Name"), str):
        raise unparsable(f"Every step must be an object with a Name, not {json.dumps(step)[:80]}.")
    name, kind = step["Name"], step.get("Type")
    if not re.fullmatch(r"[A-Za-z0-9\-_]{1,64}", name):
        raise unparsable(f"Step name '{name}' must be 1 to 64 characters of [A-Za-z0-9-_].")
    if kind not in STEP_TYPES:
        hint = f"Step '{name}' has it; the sandbox runs: {', '.join(STEP_TYPES)}."
        raise not_emulated(f"pipeline steps of type '{kind}'", hint)
    if not isinstance(step.get("Arguments"), dict):
        raise unparsable(f"Step '{name}' has no Arguments object.")
    retries.check(step)
    return name


def _dependencies(step: dict[str, Any]) -> dict[str, str]:
    depends = {}
    for entry in step.get("DependsOn") or []:
        upstream, trigger = (
            (entry.get("Step"), entry.get("Trigger")) if isinstance(entry, dict) else (entry, "Completed")
        )
        if not isinstance(upstream, str) or trigger not in TRIGGERS:
            raise unparsable(
                f"Step '{step['Name']}' has a DependsOn entry that is none: {json.dumps(entry)}."
            )
        depends[upstream] = str(trigger)
    for reference in references(_own_arguments(step)):
        if reference.kind == "Steps":
            depends.setdefault(reference.name, "Completed")
    return depends


def _own_arguments(step: dict[str, Any]) -> Any:
    return step["Arguments"].get("Conditions") if step["Type"] == "Condition" else step["Arguments"]


def _check_graph(nodes: dict[str, Node], definition: dict[str, Any]) -> None:
    parameters = {p["Name"] for p in definition.get("Parameters") or []}
    for node in nodes.values():
        for upstream in node.depends:
            if upstream not in nodes:
                raise unparsable(f"Step '{node.name}' depends on step '{upstream}', which is undefined.")
        for reference in references(_own_arguments(node.step)):
            _check_reference(reference, node, nodes, parameters)
        if node.step["Type"] == "Condition":
            _check_conditions(node.step["Arguments"].get("Conditions"), node.name)
        elif node.step["Type"] == "Fail":
            if "ErrorMessage" not in node.step["Arguments"]:
                raise unparsable(f"Fail step '{node.name}' has no ErrorMessage.")
        else:
            _check_arguments(node)
    _check_cycles(nodes)


def _check_reference(reference: Reference, node: Node, nodes: dict[str, Node], parameters: set[str]) -> None:
    where = f"Step '{node.name}' refers to '{reference.text}'"
    if reference.kind == "Parameters" and reference.name not in parameters:
        raise unparsable(
            f"{where}, but there is no such parameter; there are: {', '.join(sorted(parameters))}."
        )
    if reference.kind == "Execution" and reference.name not in EXECUTION_VARIABLES:
        raise unparsable(f"{where}, but there is no such execution variable.")
    if reference.kind == "Steps" and reference.path[:1] == ("PropertyFiles",):
        step = nodes[reference.name].step
        files = [f.get("PropertyFileName") for f in step.get("PropertyFiles") or []]
        if len(reference.path) != 2 or reference.path[1] not in files:
            raise unparsable(f"{where}, but step '{reference.name}' has the property files {files}.")


def _check_conditions(conditions: Any, step: str) -> None:
    if not isinstance(conditions, list) or not conditions:
        raise unparsable(f"Condition step '{step}' has no Conditions.")
    for condition in conditions:
        kind = condition.get("Type") if isinstance(condition, dict) else None
        if kind not in CONDITION_TYPES:
            raise unparsable(f"Condition step '{step}' has a condition of unknown type '{kind}'.")
        if kind in ("Or", "And"):
            _check_conditions(condition.get("Conditions"), step)
        elif kind == "Not":
            _check_conditions([condition.get("Condition", condition.get("Expression"))], step)
        else:
            needs = ("QueryValue", "Values") if kind == "In" else ("LeftValue", "RightValue")
            missing = [n for n in needs if n not in condition]
            if missing:
                raise unparsable(
                    f"Condition step '{step}': a condition {kind} lacks {' and '.join(missing)}."
                )


def _check_arguments(node: Node) -> None:
    action = STEP_ACTIONS[node.step["Type"]]
    for problem in shapes.problems(action, _expressions_unknown(node.step["Arguments"])):
        if not _given_by_service(problem):
            raise unparsable(f"{problem}, in step '{node.name}'.")


def _given_by_service(problem: str) -> bool:
    member = problem.split("'")[1]
    return "Member must not be null" in problem and member[:1].upper() + member[1:] in _GIVEN_BY_SERVICE


def _expressions_unknown(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and next(iter(value)) in ("Get", "Std:Join", "Std:JsonGet"):
            return shapes.UNKNOWN
        return {k: _expressions_unknown(v) for k, v in value.items()}
    return [_expressions_unknown(v) for v in value] if isinstance(value, list) else value


def _check_cycles(nodes: dict[str, Node]) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise unparsable(
                f"Steps depend on each other in a cycle: {' -> '.join((*trail[trail.index(name) :], name))}."
            )
        if name not in done:
            for upstream in nodes[name].depends:
                visit(upstream, (*trail, name))
            done.add(name)

    for name in nodes:
        visit(name, ())
