"""Endpoints serve for real: health, invocation, streaming, updates with canary, alarms and rollback."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.pipelines.sandbox.conftest import BUCKET, Aws


def model(aws: Aws, name: str, **environment: str) -> str:
    aws.put(f"{name}/model/answer.txt", name.encode())
    aws.put(f"{name}/kernel/index.json", {"k": 1})
    container = {
        "Image": "image:1",
        "Environment": environment,
        "ModelDataSource": {"S3DataSource": source(f"{name}/model/")},
        "AdditionalModelDataSources": [{"ChannelName": "kernel", "S3DataSource": source(f"{name}/kernel/")}],
    }
    aws.sagemaker.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=aws.role)
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": name,
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 2,
    }
    aws.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    return name


def source(key: str) -> dict[str, str]:
    return {"S3Uri": f"s3://{BUCKET}/{key}", "S3DataType": "S3Prefix", "CompressionType": "None"}


def settle(aws: Aws, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = aws.sagemaker.describe_endpoint(EndpointName=name)
        if found["EndpointStatus"] in ("InService", "Failed"):
            return found
        time.sleep(0.05)
    raise TimeoutError(found)


def create(aws: Aws, name: str, config: str) -> dict[str, Any]:
    aws.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=config)
    return settle(aws, name)


def ask(aws: Aws, name: str, body: str = "hello", **more: Any) -> dict[str, Any]:
    answer = aws.client("sagemaker-runtime").invoke_endpoint(EndpointName=name, Body=body, **more)
    return json.loads(answer["Body"].read()) | {"variant": answer["InvokedProductionVariant"]}


def who(aws: Aws, name: str) -> str:
    return ask(aws, name)["files"]["model/answer.txt"]


def canary(wait: int, *alarms: str) -> dict[str, Any]:
    routing = {
        "Type": "CANARY",
        "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 25},
        "WaitIntervalInSeconds": wait,
    }
    config: dict[str, Any] = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing}}
    if alarms:
        config["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": a} for a in alarms]}
    return config


def test_serves_the_models_files_and_passes_headers_on(aws: Aws, name: str) -> None:
    found = create(aws, name, model(aws, name, GREETING="hi"))
    assert found["EndpointStatus"] == "InService"
    assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 2
    answer = ask(aws, name, ContentType="text/plain", CustomAttributes="trace=1")
    assert answer["files"]["model/answer.txt"] == name
    assert json.loads(answer["files"]["additional-model-data-sources/kernel/index.json"]) == {"k": 1}
    assert answer["environment"]["GREETING"] == "hi"
    assert (answer["body"], answer["custom"], answer["variant"]) == ("hello", "trace=1", "AllTraffic")
    streams = aws.client("logs").describe_log_streams(logGroupName=f"/aws/sagemaker/Endpoints/{name}")
    assert len(streams["logStreams"]) == 1


def test_the_containers_own_errors_reach_the_client(aws: Aws, name: str) -> None:
    create(aws, name, model(aws, name))
    runtime = aws.client("sagemaker-runtime")
    with pytest.raises(ClientError) as refused:
        runtime.invoke_endpoint(EndpointName=name, Body=b"refuse")
    answer = refused.value.response
    assert answer["Error"]["Code"] == "ModelError"
    assert (answer["OriginalStatusCode"], answer["OriginalMessage"]) == (400, "I refuse")
    with pytest.raises(ClientError) as died:
        runtime.invoke_endpoint(EndpointName=name, Body=b"die")
    assert died.value.response["OriginalStatusCode"] == 503
    with pytest.raises(ClientError, match="not found"):
        runtime.invoke_endpoint(EndpointName="nowhere", Body=b"x")
    with pytest.raises(ClientError, match="no variant 'Other'"):
        runtime.invoke_endpoint(EndpointName=name, Body=b"x", TargetVariant="Other")


def test_streams_what_the_container_streams(aws: Aws, name: str) -> None:
    create(aws, name, model(aws, name))
    answer = aws.client("sagemaker-runtime").invoke_endpoint_with_response_stream(
        EndpointName=name, Body=b"stream"
    )
    assert answer["ContentType"] == "text/event-stream"
    parts = [event["PayloadPart"]["Bytes"] for event in answer["Body"]]
    assert b"".join(parts) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize(
    ("mode", "why"), [("exit", "exited with code 7"), ("never", "did not answer 200 within")]
)
def test_is_failed_when_the_container_is_never_healthy(aws: Aws, name: str, mode: str, why: str) -> None:
    found = create(aws, name, model(aws, name, TOY_MODE=mode))
    assert found["EndpointStatus"] == "Failed"
    assert "did not pass the ping health check" in found["FailureReason"]
    assert why in found["FailureReason"]
    if mode == "exit":
        assert "cannot load the model" in found["FailureReason"]


def test_update_moves_all_traffic_and_refuses_a_second_one_meanwhile(aws: Aws, name: str) -> None:
    old, new = model(aws, f"{name}-1"), model(aws, f"{name}-2")
    create(aws, name, old)
    aws.sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=new)
    with pytest.raises(ClientError, match="Cannot update in-progress endpoint"):
        aws.sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=new)
    assert who(aws, name) == old, "the old fleet serves until the new one is healthy"
    found = settle(aws, name)
    assert found["EndpointConfigName"] == new
    assert who(aws, name) == new


def test_canary_splits_traffic_then_takes_all(aws: Aws, name: str) -> None:
    old, new = model(aws, f"{name}-1"), model(aws, f"{name}-2")
    create(aws, name, old)
    aws.sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=new, DeploymentConfig=canary(1))
    wait_for_phase(aws, name, "Baking")
    answers = [who(aws, name) for _ in range(8)]
    assert answers.count(new) == 2, "25 % of the traffic"
    assert settle(aws, name)["EndpointConfigName"] == new
    assert {who(aws, name) for _ in range(4)} == {new}


def test_alarm_while_baking_rolls_back(aws: Aws, name: str) -> None:
    old, new = model(aws, f"{name}-1"), model(aws, f"{name}-2")
    create(aws, name, old)
    alarm(aws, name)
    config = canary(30, name)
    aws.sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=new, DeploymentConfig=config)
    wait_for_phase(aws, name, "Baking")
    aws.client("cloudwatch").set_alarm_state(AlarmName=name, StateValue="ALARM", StateReason="test")
    found = settle(aws, name)
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", old)
    assert name in found["FailureReason"]
    assert {who(aws, name) for _ in range(4)} == {old}


def test_unhealthy_update_keeps_the_old_fleet(aws: Aws, name: str) -> None:
    old, new = model(aws, f"{name}-1"), model(aws, f"{name}-2", TOY_MODE="exit")
    create(aws, name, old)
    aws.sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=new)
    found = settle(aws, name)
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", old)
    assert "exited with code 7" in found["FailureReason"]
    assert who(aws, name) == old


def test_deleted_endpoint_is_gone_and_its_name_free(aws: Aws, name: str) -> None:
    config = model(aws, name)
    create(aws, name, config)
    aws.sagemaker.delete_endpoint(EndpointName=name)
    deadline = time.monotonic() + 10
    while aws.sagemaker.list_endpoints(NameContains=name)["Endpoints"] and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ClientError, match="Could not find endpoint"):
        aws.sagemaker.describe_endpoint(EndpointName=name)
    assert create(aws, name, config)["EndpointStatus"] == "InService"


@pytest.mark.parametrize(
    ("deployment", "why"),
    [
        (canary(0, "no-such-alarm"), "do not exist"),
        (
            {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "CANARY",
                        "WaitIntervalInSeconds": 0,
                        "CanarySize": {"Type": "INSTANCE_COUNT", "Value": 2},
                    }
                }
            },
            "must be 0% to 50%",
        ),
    ],
)
def test_impossible_deployments_are_refused(
    aws: Aws, name: str, deployment: dict[str, Any], why: str
) -> None:
    config = model(aws, name)
    create(aws, name, config)
    with pytest.raises(ClientError, match=why):
        aws.sagemaker.update_endpoint(
            EndpointName=name, EndpointConfigName=config, DeploymentConfig=deployment
        )
    assert aws.sagemaker.describe_endpoint(EndpointName=name)["EndpointStatus"] == "InService"


def test_captures_requests_when_asked(aws: Aws, name: str) -> None:
    model(aws, name)
    variant = {
        "VariantName": "v",
        "ModelName": name,
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
    }
    capture = {
        "EnableCapture": True,
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": f"s3://{BUCKET}/captured/{name}",
        "CaptureOptions": [{"CaptureMode": "Input"}],
        "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
    }
    config = f"{name}-c"
    aws.sagemaker.create_endpoint_config(
        EndpointConfigName=config, ProductionVariants=[variant], DataCaptureConfig=capture
    )
    create(aws, name, config)
    ask(aws, name, '{"a": 1}', ContentType="application/json")
    keys = aws.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"captured/{name}/{name}/v/")["Contents"]
    line = json.loads(aws.get(keys[0]["Key"]))
    assert line["captureData"]["endpointInput"]["data"] == '{"a": 1}'
    assert "endpointOutput" not in line["captureData"]


def wait_for_phase(aws: Aws, name: str, phase: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pending = aws.sagemaker.describe_endpoint(EndpointName=name).get("PendingDeploymentSummary", {})
        status = [v["VariantStatus"][0]["Status"] for v in pending.get("ProductionVariants", [])]
        if status == [phase]:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{name} never was {phase}")


def alarm(aws: Aws, name: str) -> None:
    aws.client("cloudwatch").put_metric_alarm(
        AlarmName=name,
        Namespace="AWS/SageMaker",
        MetricName="Invocation5XXErrors",
        Statistic="Sum",
        Period=60,
        EvaluationPeriods=1,
        Threshold=1,
        ComparisonOperator="GreaterThanThreshold",
    )
