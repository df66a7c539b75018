"""Deploy the CloudFormation stacks in order, each as a change set that can be read before it is executed.

network (only with a VPC) -> core -> roles -> watching -> triggers (only when configured); outputs of one are
parameters of the next. Running it again changes nothing that is as the templates say. `configuration` turns
the outputs into what config/<env>.yaml holds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines import triggers
from pipelines.aws import Aws
from pipelines.errors import UserError, choose
from pipelines.settings import CONFIG, ROLES, Settings

UNCHANGED = ("didn't contain changes", "No updates are to be performed")
BROKEN = {
    "ROLLBACK_COMPLETE": "its creation failed: delete the stack, then run this again",
    "ROLLBACK_FAILED": "its creation failed: delete the stack, then run this again",
    "DELETE_FAILED": "delete it by hand, keeping what cannot be deleted, then run this again",
    "UPDATE_ROLLBACK_FAILED": "continue its rollback in the CloudFormation console, then run this again",
}
PERMISSIONS = "CAPABILITY_IAM"
NETWORK_PARAMETERS = ("VpcId", "SubnetIds", "RouteTableIds")
Show = Callable[[str], None]


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


def deploy(
    aws: Aws,
    settings: Settings,
    given: Mapping[str, str],
    show: Show,
    dry_run: bool = False,
    seconds: float = 5.0,
    folder: Path = CONFIG,
) -> dict[str, str]:
    """Bring all stacks up to date and give their outputs together.

    given: parameters of any of the templates. show: gets each line for a person.
    dry_run: make, show and delete the change sets; stops after a new stack, whose outputs the next one takes.
    seconds: between two looks at a stack. folder: of the templates.
    Raises UserError for an unknown parameter, a stack that must be repaired by hand, or a failed deployment.
    """
    _refuse_unknown(given, folder)
    outputs: dict[str, str] = {}
    for make in (_network, _core, _roles, _watching, _triggers):
        stack = make(settings, given, outputs, folder)
        if not stack.wanted and not _find(aws, stack.name):
            continue
        change = prepare(aws, stack)
        if not change.changes:
            show(f"keep   stack {stack.name}")
        else:
            show(f"{'create' if change.creates else 'update'} stack {stack.name}")
            for line in change.changes:
                show(f"       {line}")
            if dry_run:
                discard(aws, change)
                if change.creates:
                    show("       the stacks after it take its outputs; they are shown once it exists")
                    break
            else:
                for line in execute(aws, change, seconds):
                    show(f"       {line}")
        there = _find(aws, stack.name)
        outputs |= _pairs(there, "Output")
        # Given once, to the stack that takes them first; later stacks and later calls take them from there.
        keys = {_core: ("KmsKeyArn", "PermissionsBoundaryArn"), _roles: ("DatabricksSecretKeyArn",)}.get(
            make, ()
        )
        given = {
            **given,
            **{key: one for key, one in _pairs(there, "Parameter").items() if key in keys and one},
        }
    return outputs


def prefix(settings: Settings) -> str:
    """NamePrefix of the stack that gives the configured names. Raises UserError when none does."""
    name = settings.names.production_pipeline
    if not name.endswith("-production"):
        raise UserError(
            f"names.production_pipeline = '{name}' does not end in -production",
            f"config/{settings.environment}.yaml",
            "the stack's names begin with <prefix> in <prefix>-production",
        )
    return name.removesuffix("-production")


def configuration(outputs: Mapping[str, str]) -> dict[str, Any]:
    """The part of config/<env>.yaml that the stacks decide, from their outputs."""
    roles = {name: outputs[f"{name[0].upper()}{name[1:]}RoleArn"] for name in ROLES}
    network = {
        "subnets": outputs.get("SubnetIds", "").split(","),
        "security_group_ids": [outputs.get("SecurityGroupId", "")],
    }
    return {
        "bucket": outputs["Bucket"],
        "kms_key": outputs["KmsKeyArn"],
        "role": outputs["PipelineRoleArn"],
        "roles": roles,
        **({"network": network} if "SubnetIds" in outputs else {}),
        "images": {
            "job": f"{outputs['JobRepositoryUri']}:TAG",
            "serve": f"{outputs['ServeRepositoryUri']}:TAG",
        },
        "names": {
            "release_pipeline": outputs["ReleasePipelineName"],
            "production_pipeline": outputs["ProductionPipelineName"],
            "model_package_group": outputs["ModelPackageGroupName"],
            "approval_rule": outputs["ApprovalRuleName"],
        },
        "deployment": {"alarms": outputs["RollbackAlarms"].split(",")},
        "parameters": {
            "release": {"StagingEndpointName": outputs["StagingEndpointName"]},
            "production": {"ProductionEndpointName": outputs["ProductionEndpointName"]},
        },
    }


def prepare(aws: Aws, stack: Stack) -> ChangeSet:
    """Make the stack's change set and wait for it; one without changes is deleted at once."""
    there = _find(aws, stack.name)
    status = there.get("StackStatus", "")
    if status in BROKEN:
        raise UserError(f"stack is {status}", f"stack {stack.name}", BROKEN[status])
    if status.endswith("_IN_PROGRESS") and status != "REVIEW_IN_PROGRESS":
        raise UserError(f"stack is {status}", f"stack {stack.name}", "wait until it has ended")
    creates = not there or status == "REVIEW_IN_PROGRESS"
    kept = set() if creates else _pairs(there, "Parameter").keys() & declared(stack.template)
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
        stack = _find(aws, change.stack)
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


def _network(settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path) -> Stack:
    template = folder / "infrastructure" / "network.yaml"
    missing = [name for name in NETWORK_PARAMETERS if name not in given]
    if missing and "SubnetIds" in given:
        raise UserError(f"no value for {', '.join(missing)}", str(template), f"add -p {missing[0]}=…")
    parameters = {} if missing else _own(template, given)
    return Stack(f"{prefix(settings)}-network", template, parameters, wanted=not missing)


def _core(settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path) -> Stack:
    template = folder / "infrastructure.yaml"
    return Stack(prefix(settings), template, _own(template, {**_common(settings), **given}))


def _common(settings: Settings) -> dict[str, str]:
    """Parameters of core and roles that the configuration decides; two accounts know each other by it."""
    derived = {"NamePrefix": prefix(settings), "ArtifactPrefix": settings.prefix}
    if not settings.deploys:
        derived["ProductionAccountId"] = str(settings.production_account)
    if not settings.releases:
        derived["ReleaseAccountId"] = settings.group_account
        derived["ReleaseNamePrefix"] = settings.group_name.removesuffix("-models")
    return derived


def _roles(settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path) -> Stack:
    template = folder / "infrastructure" / "roles.yaml"
    derived = _common(settings)
    if settings.mlflow.secret_arn:
        derived["DatabricksSecretArn"] = settings.mlflow.secret_arn
    if "SecurityGroupId" in outputs:
        derived["SecurityGroupId"] = outputs["SecurityGroupId"]
    made = {key: outputs[key] for key in ("Bucket", "KmsKeyArn")}
    return Stack(f"{prefix(settings)}-roles", template, _own(template, {**derived, **given, **made}))


def _watching(
    settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path
) -> Stack:
    template = folder / "infrastructure" / "watching.yaml"
    derived = {"NamePrefix": prefix(settings)}
    if not given.get("KmsKeyArn"):  # the policy of a key that was brought may not know CloudWatch Logs
        derived["KmsKeyArn"] = outputs["KmsKeyArn"]
    own = {key: one for key, one in given.items() if key != "KmsKeyArn"}
    return Stack(f"{prefix(settings)}-watching", template, _own(template, {**derived, **own}))


def _triggers(
    settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path
) -> Stack:
    """Both triggers off in a stack that is there: it stays, without rule, address and secrets."""
    template, name = folder / "infrastructure" / "triggers.yaml", f"{prefix(settings)}-triggers"
    poll, webhook = settings.triggers.poll or "", settings.triggers.webhook
    derived = {
        "NamePrefix": prefix(settings),
        "PollSchedule": poll,
        "WebhookEnabled": str(webhook).lower(),
        "NotificationTopicArn": outputs.get("NotificationTopicArn", ""),
    }
    if poll or webhook:
        derived["ModelName"], derived["ModelAlias"] = triggers.alias_of(settings)
    if poll:
        derived["RegistryHost"] = triggers.host_of(settings)
        unity = settings.mlflow.registry_uri.startswith("databricks-uc")
        derived["RegistryKind"] = "unity-catalog" if unity else "mlflow"
        derived["DatabricksSecretArn"] = settings.mlflow.secret_arn or ""
    return Stack(name, template, _own(template, {**derived, **given}), wanted=bool(poll or webhook))


def declared(template: Path) -> set[str]:
    """Names of a template's parameters, without understanding its short tags."""
    block = re.search(
        r"^Parameters:\n(.*?)^\S", template.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return set(yaml.safe_load(block.group(1))) if block else set()


def _own(template: Path, values: Mapping[str, str]) -> dict[str, str]:
    return {key: one for key, one in values.items() if key in declared(template)}


def _refuse_unknown(given: Mapping[str, str], folder: Path) -> None:
    templates = [folder / "infrastructure.yaml", *sorted((folder / "infrastructure").glob("*.yaml"))]
    known = sorted(set().union(*map(declared, templates)))
    for name in given:
        if name not in known:
            raise UserError(f"no template has a parameter '{name}'", "-p", choose(name, known))


def _find(aws: Aws, name: str) -> dict[str, Any]:
    """The stack as described, {} when there is none."""
    from botocore.exceptions import ClientError

    try:
        return aws.cloudformation.describe_stacks(StackName=name)["Stacks"][0]
    except ClientError as error:
        if "does not exist" in error.response["Error"]["Message"]:
            return {}
        raise


def _pairs(stack: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Parameters or outputs of a described stack."""
    return {one[f"{kind}Key"]: one[f"{kind}Value"] for one in stack.get(f"{kind}s", [])}


def _events(aws: Aws, name: str) -> list[dict[str, Any]]:
    """Newest first."""
    if not _find(aws, name):
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
