"""The IAM evaluator, and the roles of the template against the calls their steps make."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.iam_walk import Call, Statement, decide, matches, statements, walk
from tests.config.recorded import calls
from tests.config.template import ACCOUNT, REGION, ROLES, Stack, load

SECRET = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:mla/databricks-AbCdEf"
BUCKET = f"mla-artifacts-{ACCOUNT}-{REGION}"
RUN = "mla-pipeline/executions/abc123def456"
ARN = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:"
PACKAGE = f"{ARN}model-package/mla-models/3"
ENDPOINT_ROLE = f"arn:aws:iam::{ACCOUNT}:role/EndpointRole"

SCALED = {
    "ServiceNamespace": "sagemaker",
    "ResourceId": "endpoint/mla-production/variant/AllTraffic",
    "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
}


@pytest.fixture(scope="module")
def stack() -> Stack:
    made = {"Bucket": BUCKET, "KmsKeyArn": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/made"}
    return Stack(load(ROLES), {**made, "DatabricksSecretArn": SECRET})


def statement(**changes: Any) -> Statement:
    fields: dict[str, Any] = {
        "role": "R",
        "sid": "S",
        "effect": "Allow",
        "actions": ("s3:GetObject",),
        "resources": ("arn:aws:s3:::b/*",),
        "conditions": {},
    }
    return Statement(**{**fields, **changes})


GET = Call("x", "s3", "GetObject", "arn:aws:s3:::b/k", {"aws:PrincipalTag/a": "b"})


def test_deny_wins() -> None:
    allowed, reason = decide(GET, [statement(), statement(effect="Deny", sid="No")])
    assert allowed is None
    assert "denies it in No" in reason


def test_reason_says_how_narrow_the_permission_is() -> None:
    allowed, reason = decide(GET, [statement(resources=("arn:aws:s3:::c/*",))])
    assert allowed is None
    assert "not on arn:aws:s3:::b/k: S on arn:aws:s3:::c/*" in reason


@pytest.mark.parametrize(
    ("operator", "block", "holds"),
    [
        ("StringEquals", {"aws:PrincipalTag/a": "b"}, True),
        ("StringEquals", {"aws:PrincipalTag/a": ["c", "b"]}, True),
        ("StringEquals", {"aws:PrincipalTag/a": "B"}, False),
        ("StringEquals", {"absent": "b"}, False),
        ("StringEqualsIfExists", {"absent": "b"}, True),
        ("StringLike", {"aws:PrincipalTag/a": "?"}, True),
        ("StringNotEquals", {"aws:PrincipalTag/a": "b"}, False),
        ("StringNotEquals", {"absent": "b"}, True),
        ("Null", {"absent": "true"}, True),
        ("Null", {"aws:PrincipalTag/a": "true"}, False),
        ("Bool", {"aws:PrincipalTag/a": "true"}, False),
    ],
)
def test_conditions(operator: str, block: dict[str, Any], holds: bool) -> None:
    assert statement(conditions={operator: block}).applies(GET) is holds


def test_an_unknown_operator_is_not_guessed() -> None:
    with pytest.raises(NotImplementedError, match="IpAddress"):
        statement(conditions={"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}).applies(GET)


@given(st.text("ab/*?", max_size=8), st.text("ab/", max_size=8))
def test_wildcards_agree_with_their_definition(pattern: str, text: str) -> None:
    def defined(p: str, t: str) -> bool:
        if not p:
            return not t
        if p[0] == "*":
            return defined(p[1:], t) or bool(t and defined(p, t[1:]))
        return bool(t) and p[0] in ("?", t[0]) and defined(p[1:], t[1:])

    assert matches(pattern, text) is defined(pattern, text)


RECORDED: list[tuple[str, str, str, dict[str, Any]]] = [
    ("PullModel", "secretsmanager", "GetSecretValue", {"SecretId": SECRET}),
    ("CompileKernel", "s3", "GetObject", {"Bucket": BUCKET, "Key": "mla-pipeline/kernel-sources/x.tar.gz"}),
    ("Evaluate", "sagemaker", "DescribeEndpoint", {"EndpointName": "mla-production"}),
    (
        "Evaluate",
        "sagemaker",
        "DescribeEndpointConfig",
        {"EndpointConfigName": "mla-models-v3-9876543210"},
    ),
    ("Evaluate", "sagemaker", "DescribeModel", {"ModelName": "mla-models-v3-0123456789"}),
    ("Evaluate", "sagemaker", "DescribeModelPackage", {"ModelPackageName": PACKAGE}),
    ("Evaluate", "s3", "ListObjectsV2", {"Bucket": BUCKET, "Prefix": f"{RUN}/PullModel/model/"}),
    ("Evaluate", "s3", "GetObject", {"Bucket": BUCKET, "Key": f"{RUN}/PullModel/model/MLmodel"}),
    ("SmokeTest", "sagemaker-runtime", "InvokeEndpoint", {"EndpointName": "mla-staging"}),
    ("SmokeTest", "sagemaker", "DescribeEndpoint", {"EndpointName": "mla-staging"}),
    ("RecordRelease", "secretsmanager", "GetSecretValue", {"SecretId": SECRET}),
    ("VerifyPackage", "sagemaker", "DescribeModelPackage", {"ModelPackageName": PACKAGE}),
    ("VerifyPackage", "s3", "ListObjectsV2", {"Bucket": BUCKET, "Prefix": f"{RUN}/PullModel/model/"}),
    ("VerifyPackage", "s3", "GetObject", {"Bucket": BUCKET, "Key": f"{RUN}/CompileKernel/kernel/index.json"}),
    ("DeployProduction", "sagemaker", "DescribeModelPackage", {"ModelPackageName": PACKAGE}),
    (
        "DeployProduction",
        "sagemaker",
        "CreateModel",
        {
            "ModelName": "mla-models-v3-0123456789",
            "ExecutionRoleArn": ENDPOINT_ROLE,
            "Containers": [{"ModelPackageName": PACKAGE}],
        },
    ),
    (
        "DeployProduction",
        "sagemaker",
        "CreateEndpointConfig",
        {"EndpointConfigName": "mla-models-v3-9876543210"},
    ),
    ("DeployProduction", "sagemaker", "DescribeEndpoint", {"EndpointName": "mla-production"}),
    *(
        (
            "DeployProduction",
            "sagemaker",
            operation,
            {"EndpointName": "mla-production", "EndpointConfigName": "mla-models-v3-9876543210"},
        )
        for operation in ("CreateEndpoint", "UpdateEndpoint")
    ),
    *(
        ("DeployProduction", "application-autoscaling", operation, SCALED)
        for operation in ("DeregisterScalableTarget", "RegisterScalableTarget", "PutScalingPolicy")
    ),
    ("RecordPromotion", "secretsmanager", "GetSecretValue", {"SecretId": SECRET}),
    ("events", "sagemaker", "StartPipelineExecution", {"PipelineName": "mla-production"}),
    ("events", "sagemaker", "StartPipelineExecution", {"PipelineName": "mla-release"}),
]


def test_the_calls_of_the_steps_are_allowed_and_nothing_else(stack: Stack) -> None:
    report = walk([call for one in RECORDED for call in calls(*one)], stack)
    assert report.denied == ()
    assert report.unused == ()


def test_an_endpoint_may_download_its_kernel(stack: Stack) -> None:
    """endpoint.kernel_delivery: download: the server itself asks for what is mounted otherwise."""
    folder = f"{RUN}/CompileKernel/kernel/"
    asked = [
        ("ListObjectsV2", {"Bucket": BUCKET, "Prefix": folder}),
        ("HeadObject", {"Bucket": BUCKET, "Key": f"{folder}index.json"}),
        ("GetObject", {"Bucket": BUCKET, "Key": f"{folder}cpu/libmla_decode.so"}),
    ]
    permissions = [call for operation, one in asked for call in calls("endpoint", "s3", operation, one)]
    assert walk(permissions, stack).denied == ()


@pytest.mark.parametrize(
    "call",
    [
        Call("Evaluate", "secretsmanager", "GetSecretValue", SECRET),
        Call("SmokeTest", "sagemaker-runtime", "InvokeEndpoint", f"{ARN}endpoint/mla-production"),
        Call("SmokeTest", "sagemaker", "UpdateEndpoint", f"{ARN}endpoint/mla-staging"),
        Call("VerifyPackage", "sagemaker", "UpdateModelPackage", PACKAGE),
        Call("DeployProduction", "sagemaker", "DeleteEndpoint", f"{ARN}endpoint/mla-production"),
        Call("DeployProduction", "sagemaker", "UpdateEndpoint", f"{ARN}endpoint/mla-staging"),
        Call(
            "DeployProduction", "iam", "PassRole", ENDPOINT_ROLE, {"iam:PassedToService": "ec2.amazonaws.com"}
        ),
        Call(
            "PullModel", "s3", "PutObject", f"arn:aws:s3:::{BUCKET}/{RUN}/Evaluate/evaluation/evaluation.json"
        ),
        Call("events", "sagemaker", "StartPipelineExecution", f"{ARN}pipeline/another"),
        Call("pipeline", "sagemaker", "UpdateModelPackage", PACKAGE),
        Call("operator", "sagemaker", "UpdateEndpoint", f"{ARN}endpoint/mla-production"),
        Call("operator", "sagemaker", "DeletePipeline", f"{ARN}pipeline/mla-production"),
        Call(
            "operator", "iam", "PassRole", ENDPOINT_ROLE, {"iam:PassedToService": "sagemaker.amazonaws.com"}
        ),
    ],
    ids=lambda call: f"{call.step} {call.operation}",
)
def test_what_a_step_must_not_do_is_denied(stack: Stack, call: Call) -> None:
    ((denied, reason),) = walk([call], stack).denied
    assert denied is call
    assert call.action in reason


def test_only_an_approver_decides_about_production(stack: Stack) -> None:
    production = f"{ARN}pipeline/mla-production"
    for call in (
        Call("x", "sagemaker", "UpdateModelPackage", PACKAGE),
        Call("x", "sagemaker", "StartPipelineExecution", production),
    ):
        assert decide(call, statements(stack, "OperatorPolicy"))[0] is None
        assert decide(call, statements(stack, "ApproverPolicy"))[0]


def test_a_step_without_a_role_is_denied(stack: Stack) -> None:
    ((_, reason),) = walk([Call("NewStep", "s3", "GetObject", "arn:aws:s3:::x/y")], stack).denied
    assert "no role for 'NewStep'" in reason


def test_an_unused_permission_is_reported(stack: Stack) -> None:
    report = walk(
        calls("VerifyPackage", "sagemaker", "DescribeModelPackage", {"ModelPackageName": PACKAGE}), stack
    )
    assert ("VerifyPackageRole", "ReadKernel", "s3:GetObject") in report.unused


def test_an_operation_nobody_described_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="sagemaker:CreateApp"):
        calls("Evaluate", "sagemaker", "CreateApp", {})
