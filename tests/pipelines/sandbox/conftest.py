"""One sandbox, for this folder alone: a process holds one at a time. Small clients, and toy definitions."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from pipelines.sandbox import Sandbox
from pipelines.sandbox.account import prepare_account

REGION = "us-east-1"
BUCKET = "artifacts"
_count = itertools.count(1)
SERVER = Path(__file__).with_name("toy_server.py")


class Aws:
    """Clients of one sandbox, and the few calls that nearly every test makes."""

    def __init__(self, sandbox: Sandbox, role: str, scripts: Path) -> None:
        self.sandbox, self.role, self.scripts = sandbox, role, scripts
        self.sagemaker = self.client("sagemaker")
        self.s3 = self.client("s3")

    def client(self, service: str) -> Any:
        """A plain boto3 client that retries nothing."""
        return boto3.client(
            service,
            endpoint_url=self.sandbox.endpoint_url,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(retries={"max_attempts": 0}, read_timeout=60),
        )

    def put(self, key: str, content: Any) -> str:
        """Store an object (JSON unless bytes); returns its S3 URI."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=body)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        """Read an object."""
        return self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def script(
        self,
        name: str,
        code: str,
        *arguments: Any,
        inputs: dict[str, Any] | None = None,
        outputs: tuple[str, ...] = (),
        **step: Any,
    ) -> dict[str, Any]:
        """A Processing step that runs Python code; outputs go to <execution>/<step>/<output>/."""
        request: dict[str, Any] = {
            "ProcessingResources": {
                "ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 1}
            },
            "AppSpecification": {"ImageUri": "image", "ContainerEntrypoint": self._entrypoint(code)},
            "RoleArn": self.role,
        }
        if arguments:
            request["AppSpecification"]["ContainerArguments"] = list(arguments)
        if inputs:
            request["ProcessingInputs"] = [
                {
                    "InputName": n,
                    "S3Input": {
                        "S3Uri": u,
                        "LocalPath": f"/opt/ml/processing/input/{n}",
                        "S3DataType": "S3Prefix",
                        "S3InputMode": "File",
                    },
                }
                for n, u in inputs.items()
            ]
        if outputs:
            request["ProcessingOutputConfig"] = {
                "Outputs": [
                    {
                        "OutputName": n,
                        "S3Output": {
                            "S3Uri": output_uri(name, n),
                            "LocalPath": f"/opt/ml/processing/output/{n}",
                            "S3UploadMode": "EndOfJob",
                        },
                    }
                    for n in outputs
                ]
            }
        return {"Name": name, "Type": "Processing", "Arguments": request, **step}

    def _entrypoint(self, code: str) -> list[str]:
        if len(code) <= 256:  # the service's limit of one element
            return ["python3", "-c", code]
        path = self.scripts / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.py"
        path.write_text(code)
        return ["python3", str(path)]

    def create(
        self,
        name: str,
        steps: list[dict[str, Any]],
        parameters: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """Create a pipeline; returns its name."""
        text = json.dumps({"Version": "2020-12-01", "Parameters": parameters or [], "Steps": steps})
        self.sagemaker.create_pipeline(PipelineName=name, PipelineDefinition=text, RoleArn=self.role, **more)
        return name

    def start(self, name: str, **parameters: str) -> str:
        """Start an execution; returns its ARN."""
        given = [{"Name": k, "Value": v} for k, v in parameters.items()]
        return self.sagemaker.start_pipeline_execution(PipelineName=name, PipelineParameters=given)[
            "PipelineExecutionArn"
        ]

    def wait(self, execution: str, timeout_s: float = 60) -> dict[str, Any]:
        """Wait for an execution to end; its description."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.sagemaker.describe_pipeline_execution(PipelineExecutionArn=execution)
            if found["PipelineExecutionStatus"] not in ("Executing", "Stopping"):
                return found
            time.sleep(0.05)
        raise TimeoutError(f"{execution} is {found['PipelineExecutionStatus']}: {self.steps(execution)}")

    def run(self, name: str, **parameters: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Start, wait; the description and the steps by name."""
        execution = self.start(name, **parameters)
        return self.wait(execution), self.steps(execution)

    def steps(self, execution: str) -> dict[str, dict[str, Any]]:
        """The steps of an execution by name, oldest first."""
        answer = self.sagemaker.list_pipeline_execution_steps(
            PipelineExecutionArn=execution, SortOrder="Ascending"
        )
        return {s["StepName"]: s for s in answer["PipelineExecutionSteps"]}


def output_uri(step: str, output: str) -> dict[str, Any]:
    """Where a toy step writes: s3://artifacts/<execution>/<step>/<output>."""
    parts = [f"s3://{BUCKET}", {"Get": "Execution.PipelineExecutionId"}, step, output]
    return {"Std:Join": {"On": "/", "Values": parts}}


@pytest.fixture(scope="package")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(
        tmp_path_factory.mktemp("sandbox"),
        serve_command=[sys.executable, str(SERVER)],
        grace_s=2.0,
        startup_s=4.0,
        retry_scale=0.001,
    ) as running:
        yield running


@pytest.fixture(scope="package")
def aws(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Aws:
    role = prepare_account(sandbox.endpoint_url, bucket=BUCKET, role_name="runner", region=REGION)
    return Aws(sandbox, role, tmp_path_factory.mktemp("scripts"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A pipeline, job or endpoint name of this test's own."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name.removeprefix("test_"))[:24].strip("-")
    return f"{words}-{next(_count)}"
