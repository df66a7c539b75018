"""The model registry keeps every field; approval is an event, and an event starts a pipeline."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.pipelines.sandbox.conftest import BUCKET, Aws


def package(aws: Aws, group: str, **more: Any) -> str:
    if not aws.sagemaker.list_model_package_groups(NameContains=group)["ModelPackageGroupSummaryList"]:
        aws.sagemaker.create_model_package_group(ModelPackageGroupName=group)
    aws.put(f"{group}/model/answer.txt", b"packaged")
    data = {"S3Uri": f"s3://{BUCKET}/{group}/model/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    container = {
        "Image": "image:1",
        "ModelDataSource": {"S3DataSource": data},
        "AdditionalModelDataSources": [{"ChannelName": "kernel", "S3DataSource": data}],
        "Environment": {"MLA_KERNEL_BACKEND": "cpu"},
    }
    request = {
        "ModelPackageGroupName": group,
        "InferenceSpecification": {
            "Containers": [container],
            "SupportedContentTypes": ["application/json"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
        "CustomerMetadataProperties": {"KernelSha256": "abc"},
        "ModelMetrics": {
            "ModelQuality": {
                "Statistics": {"ContentType": "application/json", "S3Uri": f"s3://{BUCKET}/e.json"}
            }
        },
    }
    return aws.sagemaker.create_model_package(**request | more)["ModelPackageArn"]


def approval_rule(aws: Aws, name: str) -> None:
    """Approved packages of group ``name`` start the pipeline ``name``."""
    events = aws.client("events")
    pattern = {
        "source": ["aws.sagemaker"],
        "detail-type": ["SageMaker Model Package State Change"],
        "detail": {"ModelPackageGroupName": [name], "ModelApprovalStatus": ["Approved"]},
    }
    events.put_rule(Name=name, EventPattern=json.dumps(pattern))
    arn = aws.sagemaker.describe_pipeline(PipelineName=name)["PipelineArn"]
    parameters = [{"Name": "ModelPackageArn", "Value": "$.detail.ModelPackageArn"}]
    target = {
        "Id": "production",
        "Arn": arn,
        "RoleArn": aws.role,
        "SageMakerPipelineParameters": {"PipelineParameterList": parameters},
    }
    events.put_targets(Rule=name, Targets=[target])


def production(aws: Aws, name: str) -> None:
    step = aws.script("Show", "import sys; print(sys.argv[1])", {"Get": "Parameters.ModelPackageArn"})
    aws.create(name, [step], [{"Name": "ModelPackageArn", "Type": "String"}])


def executions(aws: Aws, name: str, count: int, patience_s: float = 5) -> list[str]:
    deadline = time.monotonic() + patience_s
    while True:
        found = aws.sagemaker.list_pipeline_executions(PipelineName=name)["PipelineExecutionSummaries"]
        if len(found) >= count or time.monotonic() > deadline:
            return [e["PipelineExecutionArn"] for e in found]
        time.sleep(0.05)


def test_versions_are_numbered_per_group_and_keep_every_field(aws: Aws, name: str) -> None:
    first, second = package(aws, name), package(aws, name, ModelApprovalStatus="Rejected")
    assert (first.rsplit("/", 1)[-1], second.rsplit("/", 1)[-1]) == ("1", "2")
    found = aws.sagemaker.describe_model_package(ModelPackageName=first)
    assert found["ModelApprovalStatus"] == "PendingManualApproval"
    assert found["CustomerMetadataProperties"] == {"KernelSha256": "abc"}
    container = found["InferenceSpecification"]["Containers"][0]
    assert container["AdditionalModelDataSources"][0]["ChannelName"] == "kernel"
    assert found["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"] == f"s3://{BUCKET}/e.json"
    rejected = aws.sagemaker.list_model_packages(ModelPackageGroupName=name, ModelApprovalStatus="Rejected")
    assert [p["ModelPackageArn"] for p in rejected["ModelPackageSummaryList"]] == [second]
    with pytest.raises(ClientError, match="still has model packages"):
        aws.sagemaker.delete_model_package_group(ModelPackageGroupName=name)
    for arn in (first, second):
        aws.sagemaker.delete_model_package(ModelPackageName=arn)
    assert package(aws, name).endswith("/3"), "a version number is never given twice"


def test_approval_starts_the_pipeline_with_the_approved_arn(aws: Aws, name: str) -> None:
    production(aws, name)
    approval_rule(aws, name)
    arn = package(aws, name)
    aws.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Rejected")
    assert executions(aws, name, 1, patience_s=0.5) == [], (
        "neither a pending nor a rejected package starts it"
    )
    aws.sagemaker.update_model_package(
        ModelPackageArn=arn, ModelApprovalStatus="Approved", ApprovalDescription="looks good"
    )
    (execution,) = executions(aws, name, 1)
    given = aws.sagemaker.list_pipeline_parameters_for_execution(PipelineExecutionArn=execution)
    assert given["PipelineParameters"] == [{"Name": "ModelPackageArn", "Value": arn}]
    assert aws.wait(execution)["PipelineExecutionStatus"] == "Succeeded"
    assert aws.sagemaker.describe_model_package(ModelPackageName=arn)["ApprovalDescription"] == "looks good"


def test_events_can_be_delivered_twice(aws: Aws, name: str) -> None:
    production(aws, name)
    approval_rule(aws, name)
    aws.sandbox.events.copies = 2
    try:
        package(aws, name, ModelApprovalStatus="Approved")
        found = executions(aws, name, 2)
    finally:
        aws.sandbox.events.copies = 1
    assert len(found) == 2
    for execution in found:
        aws.wait(execution)


def test_put_events_reaches_pipelines_queues_and_says_what_is_wrong(aws: Aws, name: str) -> None:
    production(aws, name)
    events, sqs = aws.client("events"), aws.client("sqs")
    queue = sqs.create_queue(QueueName=name)["QueueUrl"]
    queue_arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    events.put_rule(Name=name, EventPattern=json.dumps({"source": [name]}))
    arn = aws.sagemaker.describe_pipeline(PipelineName=name)["PipelineArn"]
    parameters = {"PipelineParameterList": [{"Name": "ModelPackageArn", "Value": "$.detail.a['b c']"}]}
    transformer = {"InputPathsMap": {"v": "$.detail.a"}, "InputTemplate": '"it is <v>"'}
    targets = [
        {"Id": "1", "Arn": arn, "RoleArn": aws.role, "SageMakerPipelineParameters": parameters},
        {"Id": "2", "Arn": queue_arn, "InputTransformer": transformer},
    ]
    events.put_targets(Rule=name, Targets=targets)
    good = {"Source": name, "DetailType": "t", "Detail": json.dumps({"a": {"b c": "x"}})}
    answer = events.put_events(Entries=[good, good | {"Detail": "no json"}])
    assert answer["FailedEntryCount"] == 1
    assert answer["Entries"][1]["ErrorCode"] == "MalformedDetail"
    (execution,) = executions(aws, name, 1)
    aws.wait(execution)
    message = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=2)["Messages"][0]["Body"]
    assert message == 'it is {"b c": "x"}'


def test_a_failed_step_announces_itself_with_its_reason(aws: Aws, name: str) -> None:
    aws.create(name, [aws.script("Bad", "raise SystemExit(1)")])
    events, sns, sqs = aws.client("events"), aws.client("sns"), aws.client("sqs")
    queue = sqs.create_queue(QueueName=name)["QueueUrl"]
    queue_arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    topic = sns.create_topic(Name=name)["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn)
    pattern = {
        "detail-type": ["SageMaker Model Building Pipeline Execution Step Status Change"],
        "detail": {"currentStepStatus": ["Failed"], "stepName": ["Bad"]},
    }
    events.put_rule(Name=name, EventPattern=json.dumps(pattern))
    paths = {"step": "$.detail.stepName", "why": "$.detail.failureReason"}
    transformer = {"InputPathsMap": paths, "InputTemplate": '"<step> failed: <why>"'}
    events.put_targets(Rule=name, Targets=[{"Id": "1", "Arn": topic, "InputTransformer": transformer}])
    aws.run(name)
    body = json.loads(sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=2)["Messages"][0]["Body"])
    expected = "Bad failed: AlgorithmError: See job logs for more information, exit code: 1"
    assert body["Message"] == expected
    events.remove_targets(Rule=name, Ids=["1"])


def test_executions_announce_their_status(aws: Aws, name: str) -> None:
    aws.create(name, [aws.script("Bad", "raise SystemExit(1)")])
    events, sqs = aws.client("events"), aws.client("sqs")
    queue = sqs.create_queue(QueueName=name)["QueueUrl"]
    queue_arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    pipeline = aws.sagemaker.describe_pipeline(PipelineName=name)["PipelineArn"]
    pattern = {
        "detail-type": ["SageMaker Model Building Pipeline Execution Status Change"],
        "detail": {"pipelineArn": [pipeline], "currentPipelineExecutionStatus": ["Failed"]},
    }
    events.put_rule(Name=name, EventPattern=json.dumps(pattern))
    events.put_targets(Rule=name, Targets=[{"Id": "1", "Arn": queue_arn}])
    execution, _ = aws.run(name)
    body = json.loads(sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=2)["Messages"][0]["Body"])
    assert body["detail"]["previousPipelineExecutionStatus"] == "Executing"
    assert body["detail"]["pipelineExecutionArn"] == execution["PipelineExecutionArn"]


def test_only_an_approved_package_becomes_a_model(aws: Aws, name: str) -> None:
    arn = package(aws, name)
    container = {"ModelPackageName": arn}
    with pytest.raises(ClientError, match="PendingManualApproval, not Approved"):
        aws.sagemaker.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=aws.role)
    aws.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")
    aws.sagemaker.create_model(ModelName=name, Containers=[container], ExecutionRoleArn=aws.role)
    variant = {
        "VariantName": "v",
        "ModelName": name,
        "InstanceType": "ml.p5.4xlarge",
        "InitialInstanceCount": 1,
    }
    aws.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    aws.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
    aws.sagemaker.get_waiter("endpoint_in_service").wait(
        EndpointName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20}
    )
    answer = json.loads(
        aws.client("sagemaker-runtime").invoke_endpoint(EndpointName=name, Body=b"x")["Body"].read()
    )
    assert answer["files"]["model/answer.txt"] == "packaged"
    assert answer["environment"]["MLA_KERNEL_BACKEND"] == "cpu"


def test_a_pipeline_registers_and_deploys(aws: Aws, name: str) -> None:
    aws.sagemaker.create_model_package_group(ModelPackageGroupName=name)
    code = "open('/opt/ml/processing/output/model/answer.txt', 'w').write('released')"
    pull = aws.script("Pull", code, outputs=("model",))
    uri = {"Get": "Steps.Pull.ProcessingOutputConfig.Outputs['model'].S3Output.S3Uri"}
    where = {"Std:Join": {"On": "/", "Values": [uri, ""]}}
    data = {"S3DataSource": {"S3Uri": where, "S3DataType": "S3Prefix", "CompressionType": "None"}}
    container = {"Image": "image:1", "ModelDataSource": data}
    specification = {
        "Containers": [container],
        "SupportedContentTypes": ["application/json"],
        "SupportedResponseMIMETypes": ["application/json"],
    }
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": {"Get": "Steps.CreateModel.ModelName"},
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
    }
    config = {"Get": "Steps.Config.EndpointConfigName"}
    steps = [
        pull,
        {
            "Name": "Register",
            "Type": "RegisterModel",
            "Arguments": {
                "ModelPackageGroupName": name,
                "InferenceSpecification": specification,
                "ModelApprovalStatus": "PendingManualApproval",
            },
        },
        {
            "Name": "CreateModel",
            "Type": "Model",
            "Arguments": {"PrimaryContainer": container, "ExecutionRoleArn": aws.role},
        },
        {"Name": "Config", "Type": "EndpointConfig", "Arguments": {"ProductionVariants": [variant]}},
        {
            "Name": "Deploy",
            "Type": "Endpoint",
            "Arguments": {"EndpointName": name, "EndpointConfigName": config},
        },
        aws.script("Show", "import sys; print(sys.argv)", {"Get": "Steps.Register.ModelPackageArn"}),
    ]
    aws.create(name, steps)
    for _ in range(2):  # the second run updates the endpoint that the first one made
        execution, done = aws.run(name)
        assert execution["PipelineExecutionStatus"] == "Succeeded", done
        live = aws.sagemaker.describe_endpoint(EndpointName=name)["EndpointConfigName"]
        assert done["Config"]["Metadata"]["EndpointConfig"]["Arn"].endswith(live)
    assert done["Register"]["Metadata"]["RegisterModel"]["Arn"].endswith(f"model-package/{name}/2")
