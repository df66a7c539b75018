"""Bring an account to what the configuration says, in two stages: `plan` only reads, `execute` changes.

Resources of an account that releases: the model package group, the release pipeline, and the rule that starts
it on a schedule, if there is one. Of one that deploys: the production pipeline, and the rule that starts it
when a version of the group is approved. The bucket and the roles are infrastructure and must be there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines import lint
from pipelines.aws import Aws, if_there
from pipelines.errors import UserError
from pipelines.settings import Settings

TARGET = "production-pipeline"
SCHEDULED = "release-pipeline"
# CreatePipeline's words in aws/sagemaker-python-sdk issue 4994; the same field of CreateModel is documented.
NO_DATA_SOURCES = "Unknown Argument member 'AdditionalModelDataSources'"


@dataclass(frozen=True)
class Change:
    """One resource: what it is, what to do with it; for a pipeline also the old and the new definition."""

    kind: str
    name: str
    action: Literal["create", "update", "keep", "delete"]
    apply: Callable[[], None] = field(repr=False, compare=False)
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)


def render(settings: Settings) -> dict[str, Any]:
    """The account's SDK pipelines by name, each checked by lint. Imports the SDK, which takes seconds."""
    from pipelines import production, release

    built = [release.get_pipeline(settings)] if settings.releases else []
    built += [production.get_pipeline(settings)] if settings.deploys else []
    for one in built:
        lint.require_clean(one.name, one.definition())
    return {one.name: one for one in built}


def plan(aws: Aws, settings: Settings, pipelines: Mapping[str, Any]) -> list[Change]:
    """What `execute` would do, in order. Reads only."""
    _require_bucket(aws, settings)
    group = [_plan_group(aws, settings.group_name)] if settings.releases else []
    changes = [_plan_pipeline(aws, settings, one) for one in pipelines.values()]
    rule = [_plan_rule(aws, settings)] if settings.deploys else []
    return [*group, *changes, *rule, *(_plan_schedule(aws, settings) if settings.releases else [])]


def execute(changes: list[Change]) -> None:
    """Apply the changes in order."""
    for change in changes:
        if change.action != "keep":
            change.apply()


def event_pattern(settings: Settings) -> dict[str, Any]:
    """Approvals of this group only, of the account that has it: lifecycle changes share the detail type."""
    return {
        "source": ["aws.sagemaker"],
        "account": [settings.group_account],
        "detail-type": ["SageMaker Model Package State Change"],
        "detail": {
            "ModelPackageGroupName": [settings.group_name],
            "ModelApprovalStatus": ["Approved"],
        },
    }


def _require_bucket(aws: Aws, settings: Settings) -> None:
    if if_there(aws.s3.head_bucket, Bucket=settings.bucket) is None:
        where = f"config/{settings.environment}.yaml, bucket"
        raise UserError(f"bucket '{settings.bucket}' does not exist", where, "create it or name yours")


def _plan_group(aws: Aws, name: str) -> Change:
    there = if_there(aws.sagemaker.describe_model_package_group, ModelPackageGroupName=name)
    return Change(
        "model package group",
        name,
        "keep" if there else "create",
        lambda: aws.sagemaker.create_model_package_group(
            ModelPackageGroupName=name, ModelPackageGroupDescription="Released MLA models with their kernels"
        ),
    )


def _plan_pipeline(aws: Aws, settings: Settings, pipeline: Any) -> Change:
    there = if_there(aws.sagemaker.describe_pipeline, PipelineName=pipeline.name)
    before, after = there["PipelineDefinition"] if there else "", pipeline.definition()
    same = there and json.loads(before) == json.loads(after)
    action: Literal["create", "update", "keep"] = "create" if not there else "update"
    if same and there["RoleArn"] == settings.role:
        action = "keep"
    return Change(
        "pipeline",
        pipeline.name,
        action,
        lambda: _put(pipeline, settings),
        before,
        after,
    )


def _put(pipeline: Any, settings: Settings) -> None:
    from botocore.exceptions import ClientError

    try:
        pipeline.upsert(role_arn=settings.role)
    except ClientError as error:
        if NO_DATA_SOURCES not in str(error):
            raise
        where = f"pipeline {pipeline.name}"
        fix = f"set endpoint.kernel_delivery: download in config/{settings.environment}.yaml and upsert again"
        raise UserError(error.response["Error"]["Message"], where, fix) from error


def _plan_rule(aws: Aws, settings: Settings) -> Change:
    name = settings.names.approval_rule
    rule = if_there(aws.events.describe_rule, Name=name)
    target = {
        "Id": TARGET,
        "RoleArn": settings.role_of("events"),
        "SageMakerPipelineParameters": {
            "PipelineParameterList": [{"Name": "ModelPackageArn", "Value": "$.detail.ModelPackageArn"}]
        },
    }

    def apply() -> None:
        arn = aws.sagemaker.describe_pipeline(PipelineName=settings.names.production_pipeline)["PipelineArn"]
        pattern = json.dumps(event_pattern(settings))
        words = "An approved model package starts the production pipeline"
        aws.events.put_rule(Name=name, EventPattern=pattern, State="ENABLED", Description=words)
        _put_target(aws, name, {**target, "Arn": arn})

    if not rule:
        return Change("rule", name, "create", apply)
    targets = aws.events.list_targets_by_rule(Rule=name)["Targets"]
    set_up = [{key: one.get(key) for key in target} for one in targets if one["Id"] == TARGET]
    same = json.loads(rule["EventPattern"]) == event_pattern(settings) and rule.get("State") == "ENABLED"
    return Change("rule", name, "keep" if same and set_up == [target] else "update", apply)


def schedule_rule(settings: Settings) -> str:
    """Name of the rule of `triggers.schedule`; the stack's events role may be used by it."""
    return f"{settings.names.release_pipeline}-schedule"


def _plan_schedule(aws: Aws, settings: Settings) -> list[Change]:
    """The scheduled rule; nothing when there is none and shall be none."""
    name, wanted = schedule_rule(settings), settings.triggers.schedule
    rule = if_there(aws.events.describe_rule, Name=name)
    target = {"Id": SCHEDULED, "RoleArn": settings.role_of("events")}

    def apply() -> None:
        arn = aws.sagemaker.describe_pipeline(PipelineName=settings.names.release_pipeline)["PipelineArn"]
        words = "Starts a release; triggers.schedule of the configuration"
        aws.events.put_rule(Name=name, ScheduleExpression=wanted, State="ENABLED", Description=words)
        _put_target(aws, name, {**target, "Arn": arn})

    def remove() -> None:
        aws.events.remove_targets(Rule=name, Ids=[SCHEDULED])
        aws.events.delete_rule(Name=name)

    if not wanted:
        return [Change("schedule", name, "delete", remove)] if rule else []
    what = f"{name}, {wanted}"
    if not rule:
        return [Change("schedule", what, "create", apply)]
    targets = aws.events.list_targets_by_rule(Rule=name)["Targets"]
    set_up = [{key: one.get(key) for key in target} for one in targets if one["Id"] == SCHEDULED]
    same = (rule.get("ScheduleExpression"), rule.get("State")) == (wanted, "ENABLED") and set_up == [target]
    return [Change("schedule", what, "keep" if same else "update", apply)]


def _put_target(aws: Aws, rule: str, target: dict[str, Any]) -> None:
    answer = aws.events.put_targets(Rule=rule, Targets=[target])
    if answer.get("FailedEntryCount"):
        raise UserError(f"target refused: {answer['FailedEntries'][0]['ErrorMessage']}", f"rule {rule}")
