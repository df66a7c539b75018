"""Walk recorded AWS calls against the template's roles: is each allowed, and is anything allowed unused?

Every call carries the step that made it; the template's `Metadata.MlaPipeline.Roles` names the step's role.
The evaluator knows what the template's identity policies use: Allow and Deny, actions, resources with
wildcards, and the condition operators below. Statements whose Sid begins with `Service` are used by the
service on the role's behalf (image pulls, uploads, logs): no recorder sees these, so they never count as
unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.config.template import Stack


@dataclass(frozen=True)
class Call:
    """One request: `service` and `operation` as botocore names them, `resource` the ARN or "*".

    context: condition keys of the request, e.g. {"iam:PassedToService": "sagemaker.amazonaws.com"}.
    """

    step: str
    service: str
    operation: str
    resource: str = "*"
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def action(self) -> str:
        """The IAM action that the operation needs."""
        prefix = _PREFIXES.get(self.service, self.service)
        return f"{prefix}:{_ACTIONS.get((self.service, self.operation), self.operation)}"


@dataclass(frozen=True)
class Statement:
    """A statement of a role's policy, scalars widened to tuples."""

    role: str
    sid: str
    effect: str
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: Mapping[str, Mapping[str, Any]]

    def applies(self, call: Call) -> bool:
        """Whether action, resource and conditions match the call."""
        return (
            any(matches(one, call.action, ignore_case=True) for one in self.actions)
            and any(matches(one, call.resource) for one in self.resources)
            and all(_holds(operator, block, call.context) for operator, block in self.conditions.items())
        )


@dataclass(frozen=True)
class Report:
    """Result of a walk. `denied`: a call and why; `unused`: (role, Sid, action) that no call needed."""

    denied: tuple[tuple[Call, str], ...]
    unused: tuple[tuple[str, str, str], ...]


def statements(stack: Stack, role: str) -> list[Statement]:
    """All statements of a role: inline, of attached policies, of those that name it; or of a policy alone."""
    if role in (policies := stack.of_type("AWS::IAM::ManagedPolicy")):
        return [_statement(role, one) for one in as_list(policies[role]["PolicyDocument"]["Statement"])]
    properties = stack.of_type("AWS::IAM::Role")[role]
    documents = [policy["PolicyDocument"] for policy in properties.get("Policies", [])]
    attached = properties.get("ManagedPolicyArns", [])
    for name, policy in stack.of_type("AWS::IAM::ManagedPolicy").items():
        if stack.resolve({"Ref": name}) in attached or role in policy.get("Roles", []):
            documents.append(policy["PolicyDocument"])
    return [_statement(role, one) for document in documents for one in as_list(document["Statement"])]


def decide(call: Call, allowed_by: Sequence[Statement]) -> tuple[Statement | None, str]:
    """The statement that allows the call, else None; and the reason. A Deny wins over every Allow."""
    if denying := next((one for one in allowed_by if one.effect == "Deny" and one.applies(call)), None):
        return None, f"{denying.role} denies it in {denying.sid}"
    allowing = next((one for one in allowed_by if one.effect == "Allow" and one.applies(call)), None)
    if allowing:
        return allowing, f"{allowing.role} allows it in {allowing.sid}"
    near = [one for one in allowed_by if any(matches(a, call.action, ignore_case=True) for a in one.actions)]
    if near:
        narrower = "; ".join(
            f"{one.sid} on {', '.join(one.resources)} {dict(one.conditions) or ''}" for one in near
        )
        return None, f"{call.action} is allowed, but not on {call.resource}: {narrower.strip()}"
    return None, f"no statement of the role allows {call.action}"


def walk(calls: Iterable[Call], stack: Stack) -> Report:
    """Check every call against its step's role and collect what the calling steps' roles allow unused."""
    by_step: dict[str, list[Statement]] = {}
    used: set[tuple[str, str, str]] = set()
    denied: list[tuple[Call, str]] = []
    for call in calls:
        if call.step not in stack.roles:
            denied.append((call, f"Metadata.MlaPipeline.Roles names no role for '{call.step}'"))
            continue
        if call.step not in by_step:
            by_step[call.step] = [one for role in stack.roles[call.step] for one in statements(stack, role)]
        statement, reason = decide(call, by_step[call.step])
        if statement is None:
            denied.append((call, reason))
        else:
            pattern = next(one for one in statement.actions if matches(one, call.action, ignore_case=True))
            used.add((statement.role, statement.sid, pattern))
    granted = {
        (one.role, one.sid, action)
        for own in by_step.values()
        for one in own
        for action in one.actions
        if one.effect == "Allow" and not one.sid.startswith("Service")
    }
    return Report(tuple(denied), tuple(sorted(granted - used)))


def matches(pattern: str, text: str, *, ignore_case: bool = False) -> bool:
    """IAM's wildcards: `*` any run of characters, slashes included; `?` one character."""
    return bool(_compiled(pattern, ignore_case).fullmatch(text))


@cache
def _compiled(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    parts = (".*" if one == "*" else "." if one == "?" else re.escape(one) for one in pattern)
    return re.compile("".join(parts), re.DOTALL | (re.IGNORECASE if ignore_case else 0))


def as_list(value: Any) -> list[Any]:
    """A policy's scalar-or-list as a list."""
    return value if isinstance(value, list) else [value]


def _statement(role: str, one: Mapping[str, Any]) -> Statement:
    return Statement(
        role=role,
        sid=one.get("Sid", ""),
        effect=one["Effect"],
        actions=tuple(as_list(one["Action"])),
        resources=tuple(as_list(one["Resource"])),
        conditions=one.get("Condition", {}),
    )


def _holds(operator: str, block: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    """A condition block: each key matches a value; an absent key fails unless the operator forgives it."""
    if operator == "Null":
        return all((key not in context) == (str(value).lower() == "true") for key, value in block.items())
    base = operator.removesuffix("IfExists")
    if base not in _OPERATORS:
        raise NotImplementedError(f"condition operator {operator}")
    for key, values in block.items():
        if key not in context:
            if base == operator and "Not" not in base:
                return False
            continue
        hit = any(_OPERATORS[base](str(value), context[key]) for value in as_list(values))
        if hit == ("Not" in base):
            return False
    return True


def _same(expected: str, actual: str) -> bool:
    return expected == actual


_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "ArnEquals": matches,
    "ArnLike": matches,
    "Bool": lambda expected, actual: expected.lower() == actual.lower(),
    "StringEquals": _same,
    "StringLike": matches,
    "StringNotEquals": _same,
}
_PREFIXES = {"sagemaker-runtime": "sagemaker", "service-quotas": "servicequotas"}
# Operations whose action has another name; everything else is service:Operation.
_ACTIONS = {
    ("s3", "ListObjects"): "ListBucket",
    ("s3", "ListObjectsV2"): "ListBucket",
    ("s3", "HeadBucket"): "ListBucket",
    ("s3", "HeadObject"): "GetObject",
    ("s3", "CopyObject"): "PutObject",
    ("s3", "CreateMultipartUpload"): "PutObject",
    ("s3", "UploadPart"): "PutObject",
    ("s3", "CompleteMultipartUpload"): "PutObject",
    ("s3", "DeleteObjects"): "DeleteObject",
}
