"""The sandbox logs every call with its caller, as IAM would see it."""

from __future__ import annotations

import io
from typing import Any

import pytest

from pipelines.sandbox.calls import MAX_DISTINCT, USER, CallLog, RecordedCall
from tests.pipelines.sandbox.conftest import BUCKET, Aws

ASK = """
import boto3
boto3.client("s3").list_objects_v2(Bucket="artifacts", Prefix="calls/")
boto3.client("sagemaker").list_endpoints()
boto3.client("secretsmanager").list_secrets()
boto3.client("iam").list_roles()
boto3.client("cloudwatch").describe_alarms()
open("/opt/ml/processing/output/out/x.txt", "w").write("x")
"""


def seen(aws: Aws, caller: str) -> set[tuple[str, str]]:
    return {(one.service, one.operation) for one in aws.sandbox.calls.all() if one.step == caller}


def test_a_jobs_calls_and_transfers_are_its_own(aws: Aws, name: str) -> None:
    source = aws.put("calls/in/a.txt", b"a").removesuffix("a.txt")
    step = aws.script("Asker", ASK, inputs={"in": source}, outputs=("out",))
    described, steps = aws.run(aws.create(name, [step]))
    assert described["PipelineExecutionStatus"] == "Succeeded", steps
    assert seen(aws, "Asker") == {
        ("s3", "GetObject"),
        ("s3", "ListObjectsV2"),
        ("s3", "PutObject"),
        ("sagemaker", "ListEndpoints"),
        ("secretsmanager", "ListSecrets"),
        ("iam", "ListRoles"),
        ("cloudwatch", "DescribeAlarms"),
    }
    keys = {
        (one.operation, one.parameters.get("Key")) for one in aws.sandbox.calls.all() if one.step == "Asker"
    }
    execution = described["PipelineExecutionArn"].rsplit("/", 1)[-1]
    assert ("GetObject", "calls/in/a.txt") in keys
    assert ("PutObject", f"{execution}/Asker/out/x.txt") in keys
    assert ("sagemaker", "CreateProcessingJob") in seen(aws, "pipeline")


def request(method: str, path: str, query: str = "", **headers: str) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "HTTP_AUTHORIZATION": "AWS4-HMAC-SHA256 Credential=sandbox/20260101/us-east-1/s3/aws4_request",
        "wsgi.input": io.BytesIO(b""),
        **headers,
    }


@pytest.mark.parametrize(
    ("environ", "operation"),
    [
        (request("GET", f"/{BUCKET}", "list-type=2&prefix=a%2F"), "ListObjectsV2"),
        (request("GET", f"/{BUCKET}/", "prefix=a"), "ListObjects"),
        (request("GET", f"/{BUCKET}", "location"), "GetBucketLocation"),
        (request("HEAD", f"/{BUCKET}"), "HeadBucket"),
        (request("PUT", f"/{BUCKET}"), "CreateBucket"),
        (request("GET", f"/{BUCKET}/a/b"), "GetObject"),
        (request("HEAD", f"/{BUCKET}/a/b"), "HeadObject"),
        (request("PUT", f"/{BUCKET}/a/b"), "PutObject"),
        (request("PUT", f"/{BUCKET}/a/b", HTTP_X_AMZ_COPY_SOURCE="x/y"), "CopyObject"),
        (request("PUT", f"/{BUCKET}/a/b", "partNumber=1&uploadId=u"), "UploadPart"),
        (request("POST", f"/{BUCKET}/a/b", "uploads"), "CreateMultipartUpload"),
        (request("POST", f"/{BUCKET}/a/b", "uploadId=u"), "CompleteMultipartUpload"),
        (request("DELETE", f"/{BUCKET}/a/b", "uploadId=u"), "AbortMultipartUpload"),
        (request("DELETE", f"/{BUCKET}/a/b"), "DeleteObject"),
        (request("POST", f"/{BUCKET}", "delete"), "DeleteObjects"),
        (request("PUT", f"/{BUCKET}", "versioning"), "PUT versioning"),
    ],
)
def test_s3_requests_are_told_apart(environ: dict[str, Any], operation: str) -> None:
    log = CallLog()
    log.see(environ)
    (call,) = log.all()
    assert (call.caller, call.service, call.operation) == (USER, "s3", operation)
    assert call.parameters["Bucket"] == BUCKET
    assert call.parameters.get("Key") == ("a/b" if environ["PATH_INFO"].endswith("/a/b") else None)


def test_a_prefix_is_what_a_listing_is_allowed_by() -> None:
    log = CallLog()
    log.see(request("GET", f"/{BUCKET}", "list-type=2&prefix=a%2Fb"))
    assert log.all()[0].parameters["Prefix"] == "a/b"


def test_a_repeated_call_is_kept_once_and_the_log_is_bounded() -> None:
    log = CallLog()
    for number in range(MAX_DISTINCT + 5):
        log.add("x", "s3", "GetObject", {"Key": str(number)})
        log.add("x", "s3", "GetObject", {"Key": str(number)})
    kept = log.all()
    assert len(kept) == MAX_DISTINCT
    assert kept[0].parameters == {"Key": "5"}


@pytest.mark.parametrize(
    ("caller", "step"),
    [
        ("pipelines-abc123def456-PullModel-XyZ0123456", "PullModel"),
        ("pipeline", "pipeline"),
        ("my-job", "my-job"),
    ],
)
def test_the_step_is_in_the_name_that_the_service_gives_a_job(caller: str, step: str) -> None:
    assert RecordedCall(caller, "s3", "GetObject", {}).step == step
