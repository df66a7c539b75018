"""The service functions against the sandbox, with pipelines that need no container."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines import service, versions
from pipelines.aws import Aws, explained
from pipelines.errors import UserError
from pipelines.local import CREDENTIALS

REGION = "us-east-1"
ROLE = "arn:aws:iam::123456789012:role/mla-pipeline-execution"
NAME = "tiny"


def definition(*messages: Any) -> str:
    """A pipeline of one Fail step, with a parameter of each type."""
    return json.dumps(
        {
            "Version": "2020-12-01",
            "Parameters": [
                {"Name": "Word", "Type": "String"},
                {"Name": "Kind", "Type": "String", "DefaultValue": "a", "EnumValues": ["a", "b"]},
                {"Name": "Count", "Type": "Integer", "DefaultValue": 1},
                {"Name": "Limit", "Type": "Float", "DefaultValue": 0.5},
            ],
            "Steps": [
                {
                    "Name": "Stop",
                    "Type": "Fail",
                    "Arguments": {"ErrorMessage": {"Std:Join": {"On": " ", "Values": list(messages)}}},
                }
            ],
        }
    )


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    from pipelines.sandbox import Sandbox
    from pipelines.sandbox.account import prepare_account

    with pytest.MonkeyPatch.context() as patch, Sandbox(tmp_path_factory.mktemp("sandbox")) as sandbox:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": sandbox.endpoint_url}.items():
            patch.setenv(name, value)
        prepare_account(
            sandbox.endpoint_url, bucket="bucket", role_name="mla-pipeline-execution", region=REGION
        )
        aws = Aws(REGION)
        text = definition("stopped by", {"Get": "Parameters.Word"}, {"Get": "Parameters.Count"})
        aws.sagemaker.create_pipeline(
            PipelineName=NAME, PipelineDefinition=text, RoleArn=ROLE, ClientRequestToken="t" * 32
        )
        yield aws


def test_an_execution_is_followed_to_its_end_and_says_why_it_failed(aws: Aws) -> None:
    arn = service.start(aws, NAME, {"Word": "design", "Count": "7"})
    seen = list(service.watch(aws, arn, seconds=0.05, timeout=20))
    last = seen[-1]
    assert (last.status, last.over, last.id) == ("Failed", True, arn.rsplit("/", 1)[-1])
    assert len(seen) == len({str(one) for one in seen})  # only changes are reported
    assert last.step("Stop").status == "Failed"
    assert "stopped by design 7" in service.reason(last)
    assert service.latest(aws, NAME) == arn


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"Word": "a", "Cout": "1"}, "unknown parameter 'Cout': pipeline tiny; did you mean 'Count'?"),
        ({"Word": "a", "Kind": "c"}, "Kind = 'c' is not allowed: pipeline tiny; known: a, b"),
        ({"Word": "a", "Count": "1.5"}, "Count = '1.5' is not a whole number"),
        ({"Word": "a", "Limit": "low"}, "Limit = 'low' is not a number"),
        ({"Word": "a", "Limit": "nan"}, "Limit = 'nan' is not a number"),
        ({}, "no value for Word: pipeline tiny; add -p Word=…"),
    ],
)
def test_wrong_parameters_start_nothing(aws: Aws, values: dict[str, str], words: str) -> None:
    before = len(aws.sagemaker.list_pipeline_executions(PipelineName=NAME)["PipelineExecutionSummaries"])
    with pytest.raises(UserError) as error:
        service.start(aws, NAME, values)
    assert words in str(error.value)
    after = len(aws.sagemaker.list_pipeline_executions(PipelineName=NAME)["PipelineExecutionSummaries"])
    assert after == before


def test_what_does_not_exist_is_named_with_the_remedy(aws: Aws) -> None:
    arn = service.start(aws, NAME, {"Word": "x"})
    service.wait(aws, arn, seconds=0.05, timeout=20)
    with pytest.raises(UserError, match=r"no pipeline 'tinny'.*mla-pipeline upsert"):
        service.start(aws, "tinny", {})
    with pytest.raises(UserError, match=r"no step 'Stopp'.*did you mean 'Stop'"):
        list(service.logs(aws, arn, "Stopp"))
    with pytest.raises(UserError, match=r"step Stop writes no log"):
        list(service.logs(aws, arn, "Stop"))
    with pytest.raises(UserError, match=r"no step 'Evaluate'"):
        service.report(aws, arn, Path("unused"))


def test_an_execution_that_outlasts_the_timeout_is_an_error(
    aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    arn = service.start(aws, NAME, {"Word": "x"})
    now = service.wait(aws, arn, seconds=0.05, timeout=20)
    running = service.Execution(**{**vars(now), "status": "Executing"})
    monkeypatch.setattr(service, "status", lambda aws, arn: running)
    with pytest.raises(UserError, match=r"still Executing after 0 s"):
        service.wait(aws, arn, seconds=0.01, timeout=0.05)


def test_a_version_beyond_the_first_page_is_found(aws: Aws) -> None:
    group = "many"
    aws.sagemaker.create_model_package_group(ModelPackageGroupName=group)
    specification = {
        "Containers": [{"Image": "i", "ModelDataUrl": "s3://bucket/m.tar.gz"}],
        "SupportedContentTypes": ["application/json"],
        "SupportedResponseMIMETypes": ["application/json"],
    }
    for number in range(103):
        aws.sagemaker.create_model_package(
            ModelPackageGroupName=group,
            InferenceSpecification=specification,
            ModelApprovalStatus="Rejected" if number else "PendingManualApproval",
        )
    assert versions.find_package(aws, group, "2").version == 2
    assert versions.find_package(aws, group, None).version == 1
    assert len(versions.packages(aws, group)) == 103
    with pytest.raises(UserError, match=r"no version 999: .*103 \(Rejected\), .* and 93 older$"):
        versions.find_package(aws, group, "999")


def test_an_execution_a_version_or_an_endpoint_that_is_not_there_is_said_with_the_remedy(aws: Aws) -> None:
    arn = f"arn:aws:sagemaker:{REGION}:123456789012"
    with pytest.raises(UserError, match=r"no execution 'nope': .*; `mla-pipeline status`"):
        service.status(aws, f"{arn}:pipeline/{NAME}/execution/nope")
    with pytest.raises(UserError, match=r"no version '.*/nope/9': us-east-1; its number"):
        versions.find_package(aws, "nope", f"{arn}:model-package/nope/9")
    with pytest.raises(UserError, match=r"no endpoint 'nope': us-east-1; staging comes with a release"):
        service.invoke(aws, "nope", "text", 1)
    with pytest.raises(UserError, match=r"no execution yet: pipeline nope; run `mla-pipeline upsert`"):
        service.latest(aws, "nope")


def test_a_log_goes_on_after_an_empty_page_and_over_all_streams(aws: Aws) -> None:
    """As CloudWatch Logs documents GetLogEvents; moto never gives such a page."""
    from botocore.stub import Stubber

    clients = Aws(REGION)
    job = service.Step("Job", "Failed", None, None, "", f"arn:aws:sagemaker:{REGION}:1:processing-job/j")
    with pytest.MonkeyPatch.context() as patch, Stubber(clients.logs) as logs:
        names = [{"logStreamName": "j/1"}, {"logStreamName": "j/2"}]
        logs.add_response("describe_log_streams", {"logStreams": names[:1], "nextToken": "n"})
        logs.add_response("describe_log_streams", {"logStreams": names[1:]})
        for token, *messages in [("a",), ("b", "one"), ("b",), ("c", "two"), ("c",)]:
            events = [{"message": f"{one}\n", "timestamp": 1} for one in messages]
            logs.add_response("get_log_events", {"events": events, "nextForwardToken": token})
        execution = service.Execution("arn", NAME, "Failed", datetime.now(UTC), None, "", (job,))
        patch.setattr(service, "status", lambda aws, arn: execution)
        assert list(service.logs(clients, "arn", "Job")) == ["one", "two"]


def test_service_errors_become_one_line(aws: Aws) -> None:
    with pytest.raises(UserError, match=r"ResourceNotFound: .*: DescribePipeline"), explained():
        aws.sagemaker.describe_pipeline(PipelineName="nothing")


def test_nobody_listening_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.local import free_port

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"AWS is not reachable.*mla-pipeline sandbox"), explained():
        Aws(REGION).sagemaker.list_pipelines()
