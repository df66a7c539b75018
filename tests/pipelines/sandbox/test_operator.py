"""Every command of an operator and an approver, walked against the policies that the account has for them.

The commands run for real against the sandbox, with an access key of their own; toy steps stand in for the
pipelines' own once these have been made.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines import endpoint, service, upsert
from pipelines.aws import Aws as Clients
from pipelines.cli import app
from pipelines.sandbox.account import prepare_account
from pipelines.settings import Settings
from tests.config.iam_walk import Report, walk
from tests.config.recorded import calls
from tests.config.template import ROLES, Stack, load
from tests.pipelines.sandbox.conftest import REGION, Aws
from tests.pipelines.sandbox.test_operations import AT_ONCE, DEPLOY, MEASURED, register

OPERATOR = "operator"  # access key of these commands, and their caller in the sandbox's log
EVALUATE = """
from pathlib import Path
for name in ("evaluation.json", "report.html"):
    Path("/opt/ml/processing/output/evaluation", name).write_text("{}")
"""


class Desk:
    """Where the operator sits: an account as the stacks leave it, and the commands."""

    def __init__(self, aws: Aws, settings: Settings) -> None:
        self.aws, self.settings, self.clients = aws, settings, Clients(REGION)

    def run(self, command: str) -> str:
        """A command; its output. It must succeed."""
        ended = CliRunner().invoke(app, command.split())
        assert ended.exit_code == 0, f"{command}: {ended.output}"
        return ended.output

    def upsert(self, changes: dict[str, object]) -> None:
        """The command's work for another configuration."""
        changed = Settings.load("local", changes)
        upsert.execute(upsert.plan(self.clients, changed, upsert.render(self.settings)))

    def replace(self, pipeline: str, step: dict[str, Any], *parameters: str) -> None:
        """Give a pipeline a toy step, as somebody else."""
        declared = [{"Name": name, "Type": "String"} for name in parameters]
        text = json.dumps({"Version": "2020-12-01", "Parameters": declared, "Steps": [step]})
        self.aws.sagemaker.update_pipeline(PipelineName=pipeline, PipelineDefinition=text)

    def evaluate(self) -> dict[str, Any]:
        """A toy Evaluate that writes where the real one does."""
        step = self.aws.script("Evaluate", EVALUATE, outputs=("evaluation",))
        place = [
            f"s3://{self.settings.bucket}/{self.settings.prefix}/executions",
            {"Get": "Execution.PipelineExecutionId"},
            "Evaluate/evaluation",
        ]
        output = step["Arguments"]["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]
        output["S3Uri"] = {"Std:Join": {"On": "/", "Values": place}}
        return step

    def promoted(self, arn: str) -> None:
        """Wait until the approval of a version has brought it to production."""
        name = self.settings.names.production_pipeline
        ended = service.wait(self.clients, service.started_for(self.clients, name, arn, 30), 0.1, 90)
        assert ended.status == "Succeeded", service.reason(ended)


def work(desk: Desk) -> None:
    """A first day: set up, release, approve twice, look around, roll back."""
    names, production = desk.settings.names, desk.settings.parameters.production["ProductionEndpointName"]
    desk.run("plan")
    assert f"create pipeline {names.release_pipeline}" in desk.run("upsert")
    desk.upsert({"triggers.schedule": "rate(1 day)"})
    desk.upsert({})

    desk.replace(names.release_pipeline, desk.evaluate())
    desk.run("start --wait")
    desk.run("status")
    desk.run("logs Evaluate")
    assert "report.html" in desk.run("report --to report")
    assert f"update pipeline {names.release_pipeline}" in desk.run("upsert")

    aws = desk.aws
    key = f"{desk.settings.prefix}/executions/e/Evaluate/evaluation/evaluation.json"
    aws.s3.upload_fileobj(io.BytesIO(json.dumps(MEASURED).encode()), desk.settings.bucket, key)
    versions = register(aws, names.model_package_group, f"s3://{desk.settings.bucket}/{key}")
    version = {"Get": "Parameters.ModelPackageArn"}
    deploy = aws.script("Deploy", DEPLOY, version, str(production), aws.role, AT_ONCE)
    desk.replace(names.production_pipeline, deploy, "ModelPackageArn")
    for number, arn in enumerate(versions[:2], 1):
        desk.run(f"approve {number}")
        desk.promoted(arn)
    desk.run("status production")
    assert "version     2 (Approved)" in desk.run(f"status {production}")
    endpoint.status(
        desk.clients, Settings.load("local", {"deployment.alarms": ["mla-production-5xx"]}), str(production)
    )
    service.invoke(desk.clients, str(production), "x", 1)
    assert "it goes back to version 1" in desk.run("rollback --yes --wait")
    desk.run("reject 2 --note worse")


@pytest.fixture(scope="module")
def report(aws: Aws, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The walk of everything that the commands asked for."""
    settings = Settings.load("local")
    url = aws.sandbox.endpoint_url
    prepare_account(url, bucket=settings.bucket, role_name=settings.role_name, region=REGION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        patch.setenv("AWS_ACCESS_KEY_ID", OPERATOR)
        patch.chdir(tmp_path_factory.mktemp("desk"))
        work(Desk(aws, settings))
    template = load(ROLES)
    roles = [name for name, one in template["Resources"].items() if one["Type"] == "AWS::IAM::Role"]
    account = settings.role.split(":")[4]
    stack = Stack(
        template,
        {"Bucket": settings.bucket, "ArtifactPrefix": settings.prefix},
        account=account,
        names=dict.fromkeys(roles, settings.role_name),
    )
    recorded = [one for one in aws.sandbox.calls.all() if one.caller == OPERATOR]
    return walk(
        (
            permission
            for one in recorded
            for permission in calls(OPERATOR, one.service, one.operation, one.parameters, REGION, account)
        ),
        stack,
    )


def test_every_call_is_allowed_by_the_two_policies(report: Report) -> None:
    assert report.denied == (), "\n".join(
        f"{call.action} {call.resource}: {why}" for call, why in report.denied
    )


def test_the_policies_allow_nothing_that_no_command_needed(report: Report) -> None:
    assert report.unused == ()
