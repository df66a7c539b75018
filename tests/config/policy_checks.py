"""Our own linter of the templates' policies: small registered checks, each with one sentence of reason.

`findings(stack)` runs them all on a resolved stack; a finding names the resource, the statement, the problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tests.config.iam_walk import as_list
from tests.config.template import ACCOUNT, Stack

# The service has no resource level for these (a network interface's description spans the account).
NO_RESOURCE_LEVEL = {
    "cloudwatch:GetMetricStatistics",
    "cloudwatch:PutMetricData",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
    "ecr:GetAuthorizationToken",
    "servicequotas:ListServiceQuotas",
}
WITHOUT_SOURCE_ARN = {"lambda.amazonaws.com"}  # not documented to send it when it assumes a role
IDENTITY = ("AWS::IAM::Role", "AWS::IAM::ManagedPolicy")


@dataclass(frozen=True)
class Place:
    """A statement with where it stands. `kind`: identity, trust, key, or resource policy."""

    resource: str
    kind: str
    statement: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.resource}, {self.kind} policy, {self.statement.get('Sid', 'a statement without Sid')}"

    @property
    def allows(self) -> bool:
        return self.statement.get("Effect") == "Allow"

    @property
    def actions(self) -> list[str]:
        return as_list(self.statement.get("Action", []))

    @property
    def resources(self) -> list[str]:
        return as_list(self.statement.get("Resource", []))

    def services(self) -> list[str]:
        """Service principals of the statement."""
        principal = self.statement.get("Principal", {})
        return as_list(principal.get("Service", [])) if isinstance(principal, dict) else []

    def condition_values(self, key: str) -> list[str]:
        """Values of a condition key, whatever the operator."""
        blocks = self.statement.get("Condition", {}).values()
        return [str(one) for block in blocks if key in block for one in as_list(block[key])]


Check = Callable[[Stack, list[Place]], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def findings(stack: Stack) -> list[str]:
    """What the checks find, as `check: place: problem`."""
    every = list(places(stack))
    return [f"{name}: {found}" for name, one in CHECKS.items() for found in one(stack, every)]


def places(stack: Stack) -> Iterator[Place]:
    """Every statement of every policy in the stack."""
    for name, resource in stack.resources.items():
        properties = resource["Properties"]
        kind = resource["Type"]
        documents: list[tuple[str, Any]] = []
        if kind == "AWS::IAM::Role":
            documents.append(("trust", properties["AssumeRolePolicyDocument"]))
            documents += [("identity", one["PolicyDocument"]) for one in properties.get("Policies", [])]
        elif kind == "AWS::IAM::ManagedPolicy":
            documents.append(("identity", properties["PolicyDocument"]))
        elif kind == "AWS::KMS::Key":
            documents.append(("key", properties["KeyPolicy"]))
        elif kind == "AWS::Events::EventBusPolicy":
            statement = {**properties["Statement"], "Sid": properties["StatementId"]}
            documents.append(("resource", {"Statement": statement}))
        else:
            documents += [
                ("resource", properties[key])
                for key in ("PolicyDocument", "ModelPackageGroupPolicy", "RepositoryPolicyText")
                if key in properties
            ]
        for policy, document in documents:
            for statement in as_list(document["Statement"]):
                yield Place(name, policy, statement)


@check
def no_wildcard_action(stack: Stack, every: list[Place]) -> Iterator[str]:
    """A wildcard grants what AWS adds tomorrow. Denying by wildcard is fine."""
    for place in every:
        for action in place.actions:
            if place.allows and "*" in action:
                yield f"{place}: action {action}: list the actions"


@check
def no_wildcard_resource(stack: Stack, every: list[Place]) -> Iterator[str]:
    """Only actions without a resource level may name `*`; in a key's policy it means that key."""
    for place in every:
        if place.kind == "identity" and place.allows and "*" in place.resources:
            for action in sorted(set(place.actions) - NO_RESOURCE_LEVEL):
                yield f"{place}: {action} on every resource: name the resource"


@check
def account_and_region_are_named(stack: Stack, every: list[Place]) -> Iterator[str]:
    """An ARN whose service, region or account is a wildcard reaches beyond this stack."""
    for place in every:
        for arn in place.resources if place.allows else ():
            if arn.startswith("arn:") and any("*" in part for part in arn.split(":", 5)[1:5]):
                yield f"{place}: {arn}: name service, region and account"


@check
def actions_take_the_resource(stack: Stack, every: list[Place]) -> Iterator[str]:
    """An action whose resource is of another type than the statement names is denied, in silence."""
    for place in every:
        for action in place.actions if place.kind == "identity" and place.allows else ():
            formats = arn_formats(action)
            named = [arn for arn in place.resources if any(one.fullmatch(arn) for one in formats)]
            if formats and not named and "*" not in place.resources:
                yield f"{place}: {action} takes none of {', '.join(place.resources)}"
            if not formats and place.resources != ["*"]:
                yield f"{place}: {action} has no resource level: its Resource is *"


def arn_formats(action: str) -> list[re.Pattern[str]]:
    """ARNs that the action takes, by cfn-lint's copy of AWS's Service Authorization Reference."""
    service, _, name = action.partition(":")
    known = _reference()[service]
    types = {key.lower(): one for key, one in known["Actions"].items()}.get(name.lower(), {})
    found = {key.lower().replace("-", ""): one for key, one in known["Resources"].items()}
    kinds = [kind.lower().replace("-", "") for kind in types.get("Resources", [])]
    formats = [one for kind in kinds for one in found[kind]["ARNFormats"]]
    return [re.compile(re.sub(r"\$\{\w+\}", "[^:]*", one)) for one in formats]


@cache
def _reference() -> dict[str, Any]:
    path = resources.files("cfnlint") / "data" / "AdditionalSpecs" / "Policies.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@check
def policies_fit(stack: Stack, every: list[Place]) -> Iterator[str]:
    """IAM's quotas in characters without white space: a managed policy, and a role's inline ones together."""
    for name, policy in stack.of_type("AWS::IAM::ManagedPolicy").items():
        if _characters(policy["PolicyDocument"]) > 6144:
            yield f"{name}: more than 6,144 characters"
    for name, role in stack.of_type("AWS::IAM::Role").items():
        if sum(_characters(one["PolicyDocument"]) for one in role.get("Policies", [])) > 10_240:
            yield f"{name}: more than 10,240 characters"


def _characters(document: Any) -> int:
    return len(json.dumps(document, separators=(",", ":")))


@check
def no_negations(stack: Stack, every: list[Place]) -> Iterator[str]:
    """NotAction and its kin allow everything else, also what does not exist yet."""
    for place in every:
        for key in ("NotAction", "NotResource", "NotPrincipal"):
            if key in place.statement:
                yield f"{place}: {key}: list what is meant"


@check
def statements_have_names(stack: Stack, every: list[Place]) -> Iterator[str]:
    """A Sid is what a denial and the walk of recorded calls can point to, so it must be unique there."""
    seen: set[tuple[str, str, str]] = set()
    for place in every:
        key = (place.resource, place.kind, place.statement.get("Sid", ""))
        if place.kind != "trust" and (not key[2] or key in seen):
            yield f"{place}: give it a Sid of its own"
        seen.add(key)


@check
def roles_honour_the_boundary(stack: Stack, every: list[Place]) -> Iterator[str]:
    """Accounts that demand a permissions boundary refuse a role without it."""
    boundary = stack.parameters.get("PermissionsBoundaryArn")
    for name, role in stack.of_type("AWS::IAM::Role").items():
        if boundary and role.get("PermissionsBoundary") != boundary:
            yield f"{name}: PermissionsBoundary is not PermissionsBoundaryArn"


@check
def trust_names_the_source(stack: Stack, every: list[Place]) -> Iterator[str]:
    """Confused deputy: a service may use the role only for this account's own resources."""
    for place in every:
        if place.kind == "trust":
            sources = place.condition_values("aws:SourceArn")
            if not place.services() or place.condition_values("aws:SourceAccount") != [ACCOUNT]:
                yield f"{place}: trust one service, with aws:SourceAccount"
            if set(place.services()) <= WITHOUT_SOURCE_ARN:
                continue
            if not sources or any(arn.split(":")[4] != ACCOUNT for arn in sources):
                yield f"{place}: name this account's resource in aws:SourceArn"


@check
def services_name_the_source(stack: Stack, every: list[Place]) -> Iterator[str]:
    """Confused deputy again, for keys and topics that a service uses."""
    for place in every:
        if place.allows and place.kind in ("key", "resource") and place.services():
            narrowed = place.condition_values("aws:SourceAccount") + place.condition_values(
                "kms:EncryptionContext:aws:logs:arn"
            )
            if not any(ACCOUNT in one for one in narrowed):
                yield f"{place}: restrict the service to this account"


@check
def roles_are_passed_by_name(stack: Stack, every: list[Place]) -> Iterator[str]:
    """PassRole hands all of a role's rights on: named roles, to a named service."""
    for place in every:
        if place.allows and "iam:PassRole" in place.actions:
            if any("*" in arn for arn in place.resources):
                yield f"{place}: name the roles"
            if not place.condition_values("iam:PassedToService"):
                yield f"{place}: restrict iam:PassedToService"


@check
def nobody_is_everybody(stack: Stack, every: list[Place]) -> Iterator[str]:
    """Allowing Principal `*` is public; other accounts come in only by their parameter."""
    known = {ACCOUNT, stack.parameters.get("ProductionAccountId"), stack.parameters.get("ReleaseAccountId")}
    for place in every:
        principal = place.statement.get("Principal", {})
        for who in [principal] if isinstance(principal, str) else as_list(principal.get("AWS", [])):
            if place.allows and (who == "*" or who.split(":")[4] not in known):
                yield f"{place}: principal {who}"
