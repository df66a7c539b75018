"""One CloudFormation stack: a change set made, shown, executed or thrown away."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.aws import Aws
from pipelines.errors import UserError

UNCHANGED = ("didn't contain changes", "No updates are to be performed")
BROKEN = {
    "ROLLBACK_COMPLETE": "its creation failed: delete the stack, then run this again",
    "ROLLBACK_FAILED": "its creation failed: delete the stack, then run this again",
    "DELETE_FAILED": "delete it by hand, keeping what cannot be deleted, then run this again",
    "UPDATE_ROLLBACK_FAILED": "continue its rollback in the CloudFormation console, then run this again",
}
PERMISSIONS = "CAPABILITY_IAM"


@dataclass(frozen=True)
class Stack:
    """A stack to be: its name, template and the parameters that are given; others keep value or default.

    wanted: whether to make it; one that is there is brought up to date in any case.
    """

    name: str
    template: Path
    parameters: Mapping[str, str]
    wanted: bool = True


@dataclass(frozen=True)
class ChangeSet:
    """What CloudFormation would do to one stack. `changes`: lines for a person; none when nothing changes."""

    stack: str
    arn: str
    creates: bool
    changes: tuple[str, ...]


def prepare(aws: Aws, stack: Stack) -> ChangeSet:
    """Make the stack's change set and wait for it; one without changes is deleted at once."""
    there = find(aws, stack.name)
    status = there.get("StackStatus", "")
    if status in BROKEN:
        raise UserError(f"stack is {status}", f"stack {stack.name}", BROKEN[status])
    if status.endswith("_IN_PROGRESS") and status != "REVIEW_IN_PROGRESS":
        raise UserError(f"stack is {status}", f"stack {stack.name}", "wait until it has ended")
    creates = not there or status == "REVIEW_IN_PROGRESS"
    kept = set() if creates else pairs(there, "Parameter").keys() & declared(stack.template)
    parameters: list[dict[str, Any]] = [
        {"ParameterKey": key, "ParameterValue": one} for key, one in stack.parameters.items()
    ]
    parameters += [
        {"ParameterKey": key, "UsePreviousValue": True} for key in sorted(kept - stack.parameters.keys())
    ]
    arn = aws.cloudformation.create_change_set(
        StackName=stack.name,
        ChangeSetName=f"mla-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
        ChangeSetType="CREATE" if creates else "UPDATE",
        TemplateBody=stack.template.read_text(encoding="utf-8"),
        Parameters=parameters,
        Capabilities=[PERMISSIONS],
    )["Id"]
    found = _wait_for_change_set(aws, arn)
    change = ChangeSet(stack.name, arn, creates, tuple(_change_line(one) for one in found["Changes"]))
    if found["Status"] == "FAILED":
        reason = found.get("StatusReason", "no reason given")
        discard(aws, change)
        if not any(words in reason for words in UNCHANGED):
            raise UserError(f"change set failed: {reason}", f"stack {stack.name}", "correct the parameters")
        return ChangeSet(stack.name, arn, creates, ())
    return change


def discard(aws: Aws, change: ChangeSet) -> None:
    """Delete a change set, and the empty stack that a first one leaves behind."""
    aws.cloudformation.delete_change_set(ChangeSetName=change.arn, StackName=change.stack)
    if change.creates:
        aws.cloudformation.delete_stack(StackName=change.stack)


def execute(aws: Aws, change: ChangeSet, seconds: float = 5.0) -> Iterator[str]:
    """Execute a change set and yield the stack's events until it has ended; UserError if it failed."""
    seen = {one["EventId"] for one in _events(aws, change.stack)}
    aws.cloudformation.execute_change_set(ChangeSetName=change.arn, StackName=change.stack)
    failure = ""
    while True:
        stack = find(aws, change.stack)
        for event in reversed(_events(aws, change.stack)):
            if event["EventId"] not in seen:
                seen.add(event["EventId"])
                reason = event.get("ResourceStatusReason", "")
                if event["ResourceStatus"].endswith("_FAILED") and not failure:
                    failure = f"{event['LogicalResourceId']}: {reason}"
                yield f"{event['ResourceStatus']:<20} {event['LogicalResourceId']} {reason}".rstrip()
        status = stack["StackStatus"] if stack else "DELETE_COMPLETE"
        if not status.endswith("_IN_PROGRESS"):
            break
        time.sleep(seconds)
    if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        fix = BROKEN.get(status, "correct it, then run this again")
        raise UserError(f"{status}: {failure or 'no reason given'}", f"stack {change.stack}", fix)


def declared(template: Path) -> set[str]:
    """Names of a template's parameters, without understanding its short tags."""
    block = re.search(
        r"^Parameters:\n(.*?)^\S", template.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return set(yaml.safe_load(block.group(1))) if block else set()


def find(aws: Aws, name: str) -> dict[str, Any]:
    """The stack as described, {} when there is none."""
    from botocore.exceptions import ClientError

    try:
        return aws.cloudformation.describe_stacks(StackName=name)["Stacks"][0]
    except ClientError as error:
        if "does not exist" in error.response["Error"]["Message"]:
            return {}
        raise


def pairs(stack: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Parameters or outputs of a described stack."""
    return {one[f"{kind}Key"]: one[f"{kind}Value"] for one in stack.get(f"{kind}s", [])}


def _events(aws: Aws, name: str) -> list[dict[str, Any]]:
    """Newest first."""
    if not find(aws, name):
        return []
    pages = aws.cloudformation.get_paginator("describe_stack_events").paginate(StackName=name)
    return [event for page in pages for event in page["StackEvents"]]


def _wait_for_change_set(aws: Aws, arn: str) -> dict[str, Any]:
    while True:
        pages = aws.cloudformation.get_paginator("describe_change_set").paginate(ChangeSetName=arn)
        found: dict[str, Any] = {"Changes": []}
        for page in pages:
            found = {**page, "Changes": [*found["Changes"], *page.get("Changes", [])]}
        if found["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
            return found
        time.sleep(1.0)


def _change_line(change: Mapping[str, Any]) -> str:
    one = change["ResourceChange"]
    replaced = {"True": ", REPLACED", "Conditional": ", maybe replaced"}.get(one.get("Replacement", ""), "")
    return f"{one['Action'].lower()} {one['LogicalResourceId']} ({one['ResourceType']}{replaced})"
