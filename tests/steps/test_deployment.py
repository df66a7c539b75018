"""The values of --deployment as requests that UpdateEndpoint and CreateEndpointConfig take."""

import json

import botocore.session
import pytest
from botocore.validate import ParamValidator

from steps.deployment import Deployment
from steps.job import StepError

BASE = {"strategy": "canary", "step_size": "10%", "bake_seconds": 60, "timeout_seconds": 900}


def parse(*parts: dict) -> Deployment:
    return Deployment.parse([json.dumps(part) for part in parts])


def accepted(operation: str, **request: object) -> None:
    shape = botocore.session.get_session().get_service_model("sagemaker").operation_model(operation)
    report = ParamValidator().validate(request, shape.input_shape)
    assert not report.has_errors(), report.generate_report()


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        (
            {},
            {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "CANARY",
                        "WaitIntervalInSeconds": 60,
                        "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 10},
                    },
                    "TerminationWaitInSeconds": 0,
                    "MaximumExecutionTimeoutInSeconds": 900,
                }
            },
        ),
        (
            {"strategy": "linear", "step_size": "2", "termination_wait_seconds": 30},
            {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "LINEAR",
                        "WaitIntervalInSeconds": 60,
                        "LinearStepSize": {"Type": "INSTANCE_COUNT", "Value": 2},
                    },
                    "TerminationWaitInSeconds": 30,
                    "MaximumExecutionTimeoutInSeconds": 900,
                }
            },
        ),
        (
            {"strategy": "all_at_once"},
            {
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 60},
                    "TerminationWaitInSeconds": 0,
                    "MaximumExecutionTimeoutInSeconds": 900,
                }
            },
        ),
        (
            {"strategy": "rolling", "step_size": "1", "rollback_size": "50%", "alarms": ["a"]},
            {
                "RollingUpdatePolicy": {
                    "MaximumBatchSize": {"Type": "INSTANCE_COUNT", "Value": 1},
                    "RollbackMaximumBatchSize": {"Type": "CAPACITY_PERCENT", "Value": 50},
                    "WaitIntervalInSeconds": 60,
                    "MaximumExecutionTimeoutInSeconds": 900,
                },
                "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "a"}]},
            },
        ),
    ],
    ids=["canary", "linear", "all_at_once", "rolling"],
)
def test_each_strategy_is_the_apis_policy(changes: dict, policy: dict) -> None:
    deployment = parse(BASE, changes)
    assert deployment.config() == policy
    assert deployment.update() == {"DeploymentConfig": policy}
    accepted("UpdateEndpoint", EndpointName="e", EndpointConfigName="c", **deployment.update())


def test_a_scaled_fleet_keeps_its_size_in_an_update() -> None:
    scaling = {
        "min_instances": 2,
        "max_instances": 8,
        "invocations_per_minute": 60,
        "scale_in_seconds": 300,
    }
    update = parse(BASE, {"scaling": scaling}).update()
    assert update["RetainAllVariantProperties"]
    kept_out = {one["VariantPropertyType"] for one in update["ExcludeRetainedVariantProperties"]}
    assert "DesiredInstanceCount" not in kept_out
    accepted("UpdateEndpoint", EndpointName="e", EndpointConfigName="c", **update)


def test_captured_data_is_encrypted_with_the_configured_key() -> None:
    capture = {"percent": 5, "mode": "InputAndOutput", "uri": "s3://bucket/mla/data-capture"}
    deployment = parse(BASE, {"capture": capture}, {"kms_key": "arn:aws:kms:us-east-1:1:key/k"})
    config = deployment.data_capture()
    assert config["DataCaptureConfig"]["KmsKeyId"] == deployment.kms_key
    assert config["DataCaptureConfig"]["InitialSamplingPercentage"] == 5
    assert config["DataCaptureConfig"]["CaptureOptions"] == [
        {"CaptureMode": "Input"},
        {"CaptureMode": "Output"},
    ]
    variant = {"VariantName": "v", "ModelName": "m"}
    accepted("CreateEndpointConfig", EndpointConfigName="c", ProductionVariants=[variant], **config)
    assert parse(BASE).data_capture() == {}


def test_parts_are_merged_and_their_lists_joined() -> None:
    deployment = parse(
        BASE,
        {"alarms": ["a"], "inference_ami": "ami", "startup_timeout_seconds": 900},
        {"alarms": ["b"], "subnets": ["s-1"]},
        {"subnets": ["s-2"], "security_group_ids": ["g-1"]},
    )
    assert deployment.alarms == ("a", "b")
    assert deployment.variant() == {
        "InferenceAmiVersion": "ami",
        "ContainerStartupHealthCheckTimeoutInSeconds": 900,
    }
    assert deployment.vpc() == {"VpcConfig": {"Subnets": ["s-1", "s-2"], "SecurityGroupIds": ["g-1"]}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({**BASE, "canary": 1}), "canary: Extra"),
        (json.dumps({**BASE, "strategy": "green"}), "strategy: Input should be"),
        (json.dumps({**BASE, "step_size": ""}), "strategy canary needs a step_size"),
        ("{}", "strategy: Field required"),
        ("[1]", "no JSON object"),
        ("{", "no JSON object"),
    ],
)
def test_a_wrong_value_names_the_key(text: str, words: str) -> None:
    with pytest.raises(StepError, match=words):
        Deployment.parse([text])
