"""The lines of docs/runbook.md for the AWS CLI, in its order, where there is what they act on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.pipelines import aws_cli
from tests.pipelines.sandbox.conftest import Aws
from tests.pipelines.sandbox.test_endpoints import create, model

RUNBOOK = (Path(__file__).resolve().parents[3] / "docs" / "runbook.md").read_text(encoding="utf-8")
PREFIX = "book"  # NamePrefix here; the page says mla, which other tests of this sandbox use
STACKS = ("", "-roles", "-watching", "-triggers", "-network")
VARIANT = f"endpoint/{PREFIX}-production/variant/AllTraffic"
TEMPLATE = json.dumps({"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}})


def lines() -> list[str]:
    """Every line for the AWS CLI: in the text between backticks, in blocks of its own."""
    found = re.findall(r"`(aws [^`]+)`|^(aws .+)$", RUNBOOK, re.MULTILINE)
    return [re.sub(r"\bmla\b", PREFIX, " ".join((inline or block).split())) for inline, block in found]


@pytest.fixture(scope="module")
def account(aws: Aws, tmp_path_factory: pytest.TempPathFactory) -> tuple[Aws, Path]:
    """Pipelines, rules, endpoints, a scalable target and stacks by the names of the runbook."""
    for name in ("release", "production"):
        aws.create(f"{PREFIX}-{name}", [aws.script("Work", "pass")])
    for endpoint in (f"{PREFIX}-staging", f"{PREFIX}-production"):
        create(aws, endpoint, model(aws, f"{endpoint}-model"))
    events = aws.client("events")
    for rule, target in (
        (f"{PREFIX}-model-approved", "production-pipeline"),
        (f"{PREFIX}-release-schedule", "release-pipeline"),
    ):
        events.put_rule(Name=rule, ScheduleExpression="rate(7 days)")
        arn = aws.sagemaker.describe_pipeline(PipelineName=f"{PREFIX}-release")["PipelineArn"]
        events.put_targets(Rule=rule, Targets=[{"Id": target, "Arn": arn, "RoleArn": aws.role}])
    aws.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="sagemaker",
        ResourceId=VARIANT,
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        MinCapacity=1,
        MaxCapacity=2,
    )
    for stack in STACKS:
        aws.client("cloudformation").create_stack(StackName=f"{PREFIX}{stack}", TemplateBody=TEMPLATE)
    folder = tmp_path_factory.mktemp("operator")
    (folder / "secret.json").write_text('{"token": "new"}')
    return aws, folder


def test_every_line_for_the_aws_cli_runs_in_the_order_of_the_runbook(account: tuple[Aws, Path]) -> None:
    aws, folder = account
    ran = lines()
    assert len(ran) >= 14
    for line in ran:
        try:
            aws_cli.run(line, aws.client, folder)
        except ClientError as error:
            pytest.fail(f"{line}: {error}")
    secret = aws.client("secretsmanager").get_secret_value(SecretId=f"{PREFIX}/databricks")
    assert secret["SecretString"] == '{"token": "new"}'
    assert not left_over(aws)


def left_over(aws: Aws) -> list[str]:
    """What the runbook's last lines should have deleted and is still there."""
    lists: dict[str, Callable[[], list[Any]]] = {
        "endpoints": lambda: aws.sagemaker.list_endpoints(NameContains=f"{PREFIX}-")["Endpoints"],
        "pipelines": lambda: aws.sagemaker.list_pipelines(PipelineNamePrefix=PREFIX)["PipelineSummaries"],
        "rules": lambda: aws.client("events").list_rules(NamePrefix=PREFIX)["Rules"],
        "targets": lambda: aws.client("application-autoscaling").describe_scalable_targets(
            ServiceNamespace="sagemaker", ResourceIds=[VARIANT]
        )["ScalableTargets"],
        "stacks": lambda: [
            stack
            for stack in aws.client("cloudformation").describe_stacks()["Stacks"]
            if stack["StackName"].removeprefix(PREFIX) in STACKS
        ],
    }
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        left = [name for name, there in lists.items() if there()]
        if not left:
            return []
        time.sleep(0.1)
    return left


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("aws sagemaker delete-endpoints --endpoint-name x", "no 'delete-endpoints'"),
        ("aws sagemaker delete-endpoint --name x", "no 'name'"),
        ("mla-pipeline plan", "not a line for the AWS CLI"),
    ],
)
def test_a_wrong_line_is_found(aws: Aws, tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        aws_cli.run(line, aws.client, tmp_path)
