"""What is not emulated is refused by name; everything else reaches moto."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.pipelines.sandbox.conftest import BUCKET, Aws


@pytest.mark.parametrize(
    ("call", "arguments", "named"),
    [
        ("list_training_jobs", {}, "sagemaker:ListTrainingJobs"),
        ("create_experiment", {"ExperimentName": "x"}, "sagemaker:CreateExperiment"),
        ("search", {"Resource": "ModelPackage"}, "sagemaker:Search"),
        ("list_monitoring_schedules", {}, "sagemaker:ListMonitoringSchedules"),
    ],
)
def test_actions_not_emulated_are_refused_by_name(
    aws: Aws, call: str, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ClientError, match=f"does not emulate {named}") as error:
        getattr(aws.sagemaker, call)(**arguments)
    assert error.value.response["Error"]["Code"] == "UnsupportedOperation"


def test_features_not_emulated_are_refused_by_name(aws: Aws, name: str) -> None:
    runtime = aws.client("sagemaker-runtime")
    with pytest.raises(ClientError, match="InvokeEndpointAsync"):
        runtime.invoke_endpoint_async(EndpointName="x", InputLocation="s3://a/b")
    request = aws.script("x", "1")["Arguments"]
    request["ProcessingResources"]["ClusterConfig"]["InstanceCount"] = 2
    with pytest.raises(ClientError, match="more than one instance"):
        aws.sagemaker.create_processing_job(ProcessingJobName=name, **request)
    request = aws.script("x", "1")["Arguments"]
    del request["AppSpecification"]["ContainerEntrypoint"]
    with pytest.raises(ClientError, match="There is no image to take the entry point from"):
        aws.sagemaker.create_processing_job(ProcessingJobName=name, **request)


def test_constraints_that_no_client_checks_are_checked(aws: Aws, name: str) -> None:
    request = aws.script("x", "1")["Arguments"]
    request["ProcessingResources"]["ClusterConfig"]["InstanceType"] = "ml.huge"
    with pytest.raises(ClientError, match=r"Member must satisfy enum value set: \[ml"):
        aws.sagemaker.create_processing_job(ProcessingJobName=name, **request)
    with pytest.raises(ClientError, match="Member must satisfy regular expression pattern"):
        aws.sagemaker.create_processing_job(ProcessingJobName="a_b", **aws.script("x", "1")["Arguments"])


def test_other_services_are_motos(aws: Aws) -> None:
    assert aws.client("sts").get_caller_identity()["Account"] == "123456789012"
    secrets = aws.client("secretsmanager")
    secrets.create_secret(Name="s", SecretString="v")
    assert secrets.get_secret_value(SecretId="s")["SecretString"] == "v"
    large = b"x" * (3 << 20)
    aws.put("large", large)
    assert aws.get("large") == large
    assert aws.client("kms").list_keys()["Keys"] == []


def test_permissions_are_simulated_from_the_roles_own_policies(aws: Aws) -> None:
    iam = aws.client("iam")
    trust = {"Version": "2012-10-17", "Statement": []}
    arn = iam.create_role(RoleName="narrow", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    statements = [
        {"Effect": "Allow", "Action": ["s3:Get*"], "Resource": f"arn:aws:s3:::{BUCKET}/*"},
        {"Effect": "Deny", "Action": "s3:GetObjectAcl", "Resource": "*"},
    ]
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_role_policy(RoleName="narrow", PolicyName="p", PolicyDocument=document)
    found = iam.simulate_principal_policy(
        PolicySourceArn=arn,
        ActionNames=["s3:GetObject", "s3:PutObject", "s3:GetObjectAcl"],
        ResourceArns=[f"arn:aws:s3:::{BUCKET}/a"],
    )["EvaluationResults"]
    assert [f["EvalDecision"] for f in found] == ["allowed", "implicitDeny", "explicitDeny"]
    with pytest.raises(ClientError) as error:
        iam.simulate_principal_policy(PolicySourceArn=arn + "x", ActionNames=["s3:GetObject"])
    assert error.value.response["Error"]["Code"] == "NoSuchEntity"


def test_tags_follow_any_resource(aws: Aws, name: str) -> None:
    aws.create(name, [aws.script("A", "1")], Tags=[{"Key": "team", "Value": "ml"}])
    arn = aws.sagemaker.describe_pipeline(PipelineName=name)["PipelineArn"]
    aws.sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": "stage", "Value": "dev"}])
    aws.sagemaker.delete_tags(ResourceArn=arn, TagKeys=["team"])
    assert aws.sagemaker.list_tags(ResourceArn=arn)["Tags"] == [{"Key": "stage", "Value": "dev"}]


def test_lists_are_paged(aws: Aws, name: str) -> None:
    for i in range(3):
        aws.create(f"{name}-{i}", [aws.script("A", "1")])
    pages = aws.sagemaker.get_paginator("list_pipelines").paginate(
        PipelineNamePrefix=name, SortBy="Name", SortOrder="Ascending", PaginationConfig={"PageSize": 2}
    )
    found = [[p["PipelineName"] for p in page["PipelineSummaries"]] for page in pages]
    assert found == [[f"{name}-0", f"{name}-1"], [f"{name}-2"]]


def test_listens_on_loopback_only(aws: Aws) -> None:
    assert aws.sandbox.endpoint_url.startswith("http://127.0.0.1:")
    request = urllib.request.Request(
        aws.sandbox.endpoint_url, b"{}", {"X-Amz-Target": "SageMaker.ListPipelines"}
    )
    assert "PipelineSummaries" in json.load(urllib.request.urlopen(request)), "curl needs no signature"
