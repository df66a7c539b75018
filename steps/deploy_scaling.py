"""Application Auto Scaling of an endpoint's instances: off before an update, on again after it.

In this order because an update is refused while its variant scales and the instance type changes, and because
the service blocks scaling during an update anyway
(docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling-update.html).
"""

from __future__ import annotations

from typing import Any

from botocore.exceptions import ClientError

from steps import aws
from steps.deployment import Scaling
from steps.job import log

POLICY = "invocations-per-instance"
METRIC = "SageMakerVariantInvocationsPerInstance"
NOT_THERE = "No scalable target found"  # moto answers a ValidationException with it
FIX = "Allow the application-autoscaling actions to the job's role, or set `deployment.scaling: null`."


def stop(endpoint: str, variant: str) -> None:
    """Take scaling off the variant; nothing when it has none. Its instances stay as many as they are."""
    with aws.explained(f"Stopping the scaling of endpoint '{endpoint}'", FIX):
        try:
            aws.client("application-autoscaling").deregister_scalable_target(**_target(endpoint, variant))
        except ClientError as error:
            detail = error.response["Error"]
            if detail["Code"] != "ObjectNotFoundException" and NOT_THERE not in detail["Message"]:
                raise


def start(endpoint: str, variant: str, scaling: Scaling) -> None:
    """Let the variant's instances follow its invocations, between the two limits."""
    with aws.explained(f"Scaling endpoint '{endpoint}'", FIX):
        client = aws.client("application-autoscaling")
        target = _target(endpoint, variant)
        client.register_scalable_target(
            **target, MinCapacity=scaling.min_instances, MaxCapacity=scaling.max_instances
        )
        client.put_scaling_policy(
            **target,
            PolicyName=POLICY,
            PolicyType="TargetTrackingScaling",
            TargetTrackingScalingPolicyConfiguration={
                "TargetValue": scaling.invocations_per_minute,
                "PredefinedMetricSpecification": {"PredefinedMetricType": METRIC},
                "ScaleInCooldown": scaling.scale_in_seconds,
            },
        )
    limits = f"{scaling.min_instances} to {scaling.max_instances} instances"
    log.info("%s scales: %s, %g invocations a minute each", endpoint, limits, scaling.invocations_per_minute)


def _target(endpoint: str, variant: str) -> dict[str, Any]:
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{endpoint}/variant/{variant}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }
