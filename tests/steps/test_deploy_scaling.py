"""Scaling against moto's Application Auto Scaling."""

import boto3
import pytest
from moto import mock_aws

from steps import deploy_scaling
from steps.deployment import Scaling

SCALING = Scaling(min_instances=2, max_instances=6, invocations_per_minute=120.0, scale_in_seconds=600)


@pytest.fixture
def autoscaling(monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        yield boto3.client("application-autoscaling")


def targets(autoscaling) -> list[tuple[str, int, int]]:
    found = autoscaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    return [(one["ResourceId"], one["MinCapacity"], one["MaxCapacity"]) for one in found]


def test_instances_follow_invocations_between_the_limits(autoscaling):
    deploy_scaling.start("mla-production", "AllTraffic", SCALING)
    assert targets(autoscaling) == [("endpoint/mla-production/variant/AllTraffic", 2, 6)]
    (policy,) = autoscaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert (tracking["TargetValue"], tracking["ScaleInCooldown"]) == (120.0, 600)
    assert tracking["PredefinedMetricSpecification"] == {
        "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"
    }


def test_it_can_be_stopped_and_started_any_number_of_times(autoscaling):
    deploy_scaling.stop("mla-production", "AllTraffic")
    deploy_scaling.start("mla-production", "AllTraffic", SCALING)
    deploy_scaling.start("mla-production", "AllTraffic", SCALING)
    assert len(targets(autoscaling)) == 1
    deploy_scaling.stop("mla-production", "AllTraffic")
    assert targets(autoscaling) == []
