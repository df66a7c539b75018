"""The SageMaker SDK v3, unmodified, against the sandbox: render, upsert twice, start, wait."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.pipelines.sandbox.conftest import BUCKET, Aws

SCRIPT = """
import sys

import boto3
from sagemaker.core.processing import Processor
from sagemaker.core.workflow.conditions import ConditionGreaterThanOrEqualTo
from sagemaker.core.workflow.functions import Join, JsonGet
from sagemaker.core.workflow.parameters import ParameterFloat
from sagemaker.core.workflow.pipeline_context import PipelineSession
from sagemaker.core.workflow.properties import PropertyFile
from sagemaker.core.workflow.execution_variables import ExecutionVariables
from sagemaker.core.processing import ProcessingOutput
from sagemaker.core.shapes import ProcessingS3Output
from sagemaker.mlops.workflow.condition_step import ConditionStep
from sagemaker.mlops.workflow.fail_step import FailStep
from sagemaker.mlops.workflow.pipeline import Pipeline
from sagemaker.mlops.workflow.steps import ProcessingStep

role, bucket = sys.argv[1:]
quiet = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
session = PipelineSession(boto_session=boto3.Session(), default_bucket=bucket, sagemaker_config=quiet)
limit = ParameterFloat("Limit", default_value=1.5)
code = "open('/opt/ml/processing/output/e/e.json', 'w').write('{\\"speedup\\": 2}')"
processor = Processor(
    role=role, image_uri="image", instance_count=1, instance_type="ml.m5.large",
    entrypoint=["python3", "-c", code], sagemaker_session=session,
)
place = Join(on="/", values=[f"s3://{bucket}", ExecutionVariables.PIPELINE_EXECUTION_ID, "e"])
output = ProcessingOutput(output_name="e", s3_output=ProcessingS3Output(
    s3_uri=place, local_path="/opt/ml/processing/output/e", s3_upload_mode="EndOfJob"))
file = PropertyFile(name="E", output_name="e", path="e.json")
evaluate = ProcessingStep(name="Evaluate", step_args=processor.run(outputs=[output]), property_files=[file])
speedup = JsonGet(step_name="Evaluate", property_file=file, json_path="speedup")
gate = ConditionStep(
    name="Gate", conditions=[ConditionGreaterThanOrEqualTo(left=speedup, right=limit)], if_steps=[],
    else_steps=[FailStep(name="Failed", error_message=Join(on=" ", values=["only", speedup]))],
)
pipeline = Pipeline(name="sdk", parameters=[limit], steps=[evaluate, gate], sagemaker_session=session)
pipeline.upsert(role_arn=role, tags=[{"Key": "a", "Value": "b"}])
pipeline.upsert(role_arn=role, tags=[{"Key": "a", "Value": "c"}])
good = pipeline.start()
good.wait(delay=1)
print([s["StepName"] for s in good.list_steps()])
bad = pipeline.start(parameters={"Limit": 3})
try:
    bad.wait(delay=1)
except Exception as error:
    print(type(error).__name__)
print(bad.list_steps()[0]["FailureReason"])
"""


@pytest.mark.slow
def test_the_sdk_upserts_starts_and_waits(aws: Aws) -> None:
    environment = {
        "AWS_ENDPOINT_URL": aws.sandbox.endpoint_url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, aws.role, BUCKET],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["['Gate', 'Evaluate']", "WaiterError", "only 2"]
    arn = aws.sagemaker.describe_pipeline(PipelineName="sdk")["PipelineArn"]
    assert aws.sagemaker.list_tags(ResourceArn=arn)["Tags"] == [{"Key": "a", "Value": "c"}]
