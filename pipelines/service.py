"""What a person or CI does with deployed pipelines: start, watch, read, decide, invoke. boto3 only.

Plain functions that take an `Aws` and give dataclasses; nothing here knows whether AWS is the sandbox.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.aws import Aws, if_there, there
from pipelines.errors import UserError, choose
from pipelines.parameters import PIPELINES, Parameter, check_values

RUNNING = {"Executing", "Stopping"}
JOBS = "/aws/sagemaker/ProcessingJobs"
ENDPOINTS = "/aws/sagemaker/Endpoints"


@dataclass(frozen=True)
class Step:
    """One step of an execution; `resource` is the ARN of what it made, "" when there is none."""

    name: str
    status: str  # Starting | Executing | Succeeded | Failed | Stopping | Stopped
    started: datetime | None
    ended: datetime | None
    failure: str
    resource: str

    @property
    def seconds(self) -> float | None:
        """Duration, None while it runs."""
        return (self.ended - self.started).total_seconds() if self.started and self.ended else None


@dataclass(frozen=True)
class Execution:
    """An execution at one moment; steps in the order in which they started."""

    arn: str
    pipeline: str
    status: str  # Executing | Stopping | Stopped | Failed | Succeeded
    started: datetime
    ended: datetime | None
    failure: str
    steps: tuple[Step, ...]

    @property
    def id(self) -> str:
        """The last part of the ARN."""
        return self.arn.rsplit("/", 1)[-1]

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status not in RUNNING

    def step(self, name: str) -> Step:
        """A step by name. Raises UserError naming the steps there are."""
        for step in self.steps:
            if step.name == name:
                return step
        raise UserError(
            f"no step '{name}'", f"execution {self.id}", choose(name, [one.name for one in self.steps])
        )


def start(
    aws: Aws, pipeline: str, values: Mapping[str, str], name: str | None = None, token: str | None = None
) -> str:
    """Start a pipeline; gives the execution's ARN.

    name: shown for the execution. token: two starts with the same one are one execution.
    values: parameter name to text. Names, types and enums are checked against the stored definition first.
    """
    parameters = stored_parameters(aws, pipeline)
    check_values(parameters, values, f"pipeline {pipeline}")
    missing = [key for key, one in parameters.items() if one.required and key not in values]
    if missing:
        raise UserError(
            f"no value for {', '.join(missing)}", f"pipeline {pipeline}", f"add -p {missing[0]}=…"
        )
    request: dict[str, Any] = {"PipelineName": pipeline}
    if values:
        request["PipelineParameters"] = [{"Name": key, "Value": str(value)} for key, value in values.items()]
    if name:
        request["PipelineExecutionDisplayName"] = name
    if token:
        request["ClientRequestToken"] = token
    return aws.sagemaker.start_pipeline_execution(**request)["PipelineExecutionArn"]


def stored_parameters(aws: Aws, pipeline: str) -> dict[str, Parameter]:
    """The parameters of the definition that would run now."""
    none = UserError(f"no pipeline '{pipeline}'", aws.region, "run `mla-pipeline upsert` first")
    answer = there(aws.sagemaker.describe_pipeline, none, PipelineName=pipeline)
    listed = json.loads(answer["PipelineDefinition"]).get("Parameters", [])
    # Forms and least values are ours: a definition cannot hold them.
    ours = {one.name: one for table in PIPELINES.values() for one in table}
    return {
        one["Name"]: replace(
            ours.get(one["Name"], Parameter(one["Name"], one["Type"], "")),
            type=one["Type"],
            enum=tuple(one.get("EnumValues", ())),
            required="DefaultValue" not in one,
        )
        for one in listed
    }


def status(aws: Aws, arn: str) -> Execution:
    """An execution with its steps. Raises UserError when there is none of the ARN."""
    fix = "`mla-pipeline status` shows the latest, `status ENDPOINT` the last ones"
    none = UserError(f"no execution '{arn.rsplit('/', 1)[-1]}'", arn, fix)
    answer = there(aws.sagemaker.describe_pipeline_execution, none, PipelineExecutionArn=arn)
    pages = aws.sagemaker.get_paginator("list_pipeline_execution_steps").paginate(
        PipelineExecutionArn=arn, SortOrder="Ascending"
    )
    over = answer["PipelineExecutionStatus"] not in RUNNING
    return Execution(
        arn=arn,
        pipeline=answer["PipelineArn"].rsplit("/", 1)[-1],
        status=answer["PipelineExecutionStatus"],
        started=answer["CreationTime"],
        ended=answer.get("LastModifiedTime") if over else None,
        failure=answer.get("FailureReason", ""),
        steps=tuple(_step(one) for page in pages for one in page["PipelineExecutionSteps"]),
    )


def watch(aws: Aws, arn: str, seconds: float = 1.0, timeout: float | None = None) -> Iterator[Execution]:
    """The execution now and after each change, until it is over.

    seconds: between two looks. Raises UserError when it is not over after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout if timeout else None
    last = None
    while True:
        now = status(aws, arn)
        if now != last:
            yield now
        if now.over:
            return
        if deadline and time.monotonic() > deadline:
            raise UserError(
                f"still {now.status} after {timeout:.0f} s", f"execution {now.id}", "look at `logs`"
            )
        last = now
        time.sleep(seconds)


def wait(aws: Aws, arn: str, seconds: float = 1.0, timeout: float | None = None) -> Execution:
    """The execution once it is over."""
    *_, last = watch(aws, arn, seconds, timeout)
    return last


def reason(execution: Execution) -> str:
    """Why it failed: the failed steps' own words where the execution only says that a step failed."""
    failed = [
        f"{one.name}: {one.failure}" for one in execution.steps if one.status == "Failed" and one.failure
    ]
    return "; ".join(failed) or execution.failure


def latest(aws: Aws, pipeline: str) -> str:
    """ARN of the execution that started last."""
    found = newest(aws, pipeline, 1)
    if not found:
        fix = "run `mla-pipeline upsert`, then `mla-pipeline start`"
        raise UserError("no execution yet", f"pipeline {pipeline}", fix)
    return found[0]["PipelineExecutionArn"]


def newest(aws: Aws, pipeline: str, count: int) -> list[dict[str, Any]]:
    """Summaries of the executions that started last, newest first; none of a pipeline that is not there."""
    answer = if_there(
        aws.sagemaker.list_pipeline_executions,
        PipelineName=pipeline,
        SortBy="CreationTime",
        SortOrder="Descending",
        MaxResults=count,
    )
    return answer["PipelineExecutionSummaries"] if answer else []


def started_for(aws: Aws, pipeline: str, package: str, timeout: float) -> str:
    """ARN of the execution that the approval of `package` started. Raises UserError when none starts."""
    deadline = time.monotonic() + timeout
    while True:
        found = aws.sagemaker.list_pipeline_executions(
            PipelineName=pipeline, SortBy="CreationTime", SortOrder="Descending"
        )["PipelineExecutionSummaries"]
        for one in found:
            arn = one["PipelineExecutionArn"]
            answer = aws.sagemaker.list_pipeline_parameters_for_execution(PipelineExecutionArn=arn)
            if {"Name": "ModelPackageArn", "Value": package} in answer["PipelineParameters"]:
                return arn
        if time.monotonic() > deadline:
            raise UserError(
                f"the approval started nothing within {timeout:.0f} s",
                f"pipeline {pipeline}",
                "run `mla-pipeline upsert`: it sets the event rule",
            )
        time.sleep(0.5)


def logs(aws: Aws, arn: str, step: str) -> Iterator[str]:
    """The log lines of a step's job or endpoint."""
    resource = status(aws, arn).step(step).resource
    kind, _, name = resource.rpartition(":")[2].partition("/")
    if kind == "processing-job":
        yield from _log_lines(aws, JOBS, f"{name}/")
    elif kind == "endpoint":
        yield from _log_lines(aws, f"{ENDPOINTS}/{name}", "")
    else:
        raise UserError(
            f"step {step} writes no log", resource or "it runs no container", "see `mla-pipeline status`"
        )


def invoke(aws: Aws, endpoint: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """The endpoint's answer to a prompt, as OpenAI's completions form it. UserError for no such endpoint."""
    answer = there(
        aws.runtime.invoke_endpoint,
        no_endpoint(aws, endpoint),
        EndpointName=endpoint,
        ContentType="application/json",
        Accept="application/json",
        Body=json.dumps({"prompt": prompt, "max_tokens": max_tokens}),
    )
    return json.loads(answer["Body"].read())


def no_endpoint(aws: Aws, name: str) -> UserError:
    """There is no endpoint of the name."""
    fix = "staging comes with a release, production with its approval"
    return UserError(f"no endpoint '{name}'", aws.region, fix)


def report(aws: Aws, arn: str, folder: Path) -> list[Path]:
    """Download what Evaluate wrote (evaluation.json, report.html) into `folder`."""
    resource = status(aws, arn).step("Evaluate").resource
    if not resource:
        raise UserError(
            "Evaluate has not run", f"execution {arn.rsplit('/', 1)[-1]}", "see `mla-pipeline status`"
        )
    job = aws.sagemaker.describe_processing_job(ProcessingJobName=resource.rsplit("/", 1)[-1])
    uri = job["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"]
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    listed = aws.s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/").get("Contents", [])
    if not listed:
        raise UserError(
            "no evaluation was written",
            uri,
            f"see `mla-pipeline logs Evaluate`: job {job['ProcessingJobStatus']}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for one in listed:
        target = folder / Path(one["Key"]).name
        aws.s3.download_file(bucket, one["Key"], str(target))
        files.append(target)
    return files


def _step(answer: Mapping[str, Any]) -> Step:
    resources = [
        one["Arn"] for one in answer.get("Metadata", {}).values() if isinstance(one, dict) and one.get("Arn")
    ]
    return Step(
        name=answer["StepName"],
        status=answer["StepStatus"],
        started=answer.get("StartTime"),
        ended=answer.get("EndTime"),
        failure=answer.get("FailureReason", ""),
        resource=resources[0] if resources else "",
    )


def _log_lines(aws: Aws, group: str, prefix: str) -> Iterator[str]:
    options = {"logStreamNamePrefix": prefix} if prefix else {}
    pages = aws.logs.get_paginator("describe_log_streams").paginate(logGroupName=group, **options)
    none = UserError("no log yet", group, "wait until the container has started")
    for stream in there(lambda: [one for page in pages for one in page["logStreams"]], none):
        token: dict[str, str] = {}
        while True:
            page = aws.logs.get_log_events(
                logGroupName=group, logStreamName=stream["logStreamName"], startFromHead=True, **token
            )
            yield from (event["message"].rstrip("\n") for event in page["events"])
            # A page may be empty although more follow; only the same token again is the end.
            if page["nextForwardToken"] == token.get("nextToken"):
                break
            token = {"nextToken": page["nextForwardToken"]}
