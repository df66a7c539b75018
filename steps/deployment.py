"""How an endpoint changes: the deployment policy, and the endpoint followed while it moves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from botocore.exceptions import ClientError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steps import aws
from steps.job import StepError, log

MOVING = {"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"}
FIRST_POLL_SECONDS, SLOWEST_POLL_SECONDS = 0.5, 15.0


class Network(BaseModel):
    """The VPC of the endpoint's containers."""

    model_config = ConfigDict(frozen=True)  # the configuration's section holds settings of jobs too

    subnets: tuple[str, ...]
    security_group_ids: tuple[str, ...]


class Deployment(BaseModel):
    """How production changes, and what its containers get. Ranges are the API's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["canary", "linear", "all_at_once"] = "canary"
    canary_percent: int = Field(default=10, ge=1, le=50)
    linear_percent: int = Field(default=25, ge=10, le=50)
    bake_seconds: int = Field(default=300, ge=0, le=3600)  # watched after every shift of traffic
    termination_wait_seconds: int = Field(default=0, ge=0, le=3600)
    timeout_seconds: int = Field(default=3600, ge=600, le=28800)
    alarms: tuple[str, ...] = Field(default=(), max_length=10)
    startup_timeout_seconds: int | None = Field(default=None, ge=60, le=3600)
    download_timeout_seconds: int | None = Field(default=None, ge=60, le=3600)
    inference_ami: str | None = None
    network: Network | None = None
    kms_key: str | None = None

    @classmethod
    def parse(cls, parts: Sequence[str]) -> Deployment:
        """Read the values of --deployment: JSON objects, each with some of the keys.

        It comes in parts because SageMaker takes at most 256 characters in one argument.
        Raises StepError naming the key that is wrong.
        """
        fix = "Correct `deployment` and `endpoint` in the environment's configuration."
        merged: dict[str, Any] = {}
        for part in parts:
            try:
                merged |= json.loads(part)
            except (ValueError, TypeError) as error:
                raise StepError(f"--deployment is no JSON object ({error}): {part!r}.", fix) from error
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(place) for place in first["loc"])
            raise StepError(f"--deployment: {key}: {first['msg']}.", fix) from error

    def config(self) -> dict[str, Any]:
        """UpdateEndpoint's DeploymentConfig."""
        routing: dict[str, Any] = {
            "Type": self.strategy.upper(),
            "WaitIntervalInSeconds": self.bake_seconds,
        }
        if self.strategy == "canary":
            routing["CanarySize"] = {"Type": "CAPACITY_PERCENT", "Value": self.canary_percent}
        elif self.strategy == "linear":
            routing["LinearStepSize"] = {"Type": "CAPACITY_PERCENT", "Value": self.linear_percent}
        config: dict[str, Any] = {
            "BlueGreenUpdatePolicy": {
                "TrafficRoutingConfiguration": routing,
                "TerminationWaitInSeconds": self.termination_wait_seconds,
                "MaximumExecutionTimeoutInSeconds": self.timeout_seconds,
            }
        }
        if self.alarms:
            config["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": name} for name in self.alarms]}
        return config

    def vpc(self) -> dict[str, Any]:
        """CreateModel's VpcConfig as a keyword argument; nothing outside a VPC."""
        if not self.network:
            return {}
        return {
            "VpcConfig": {
                "Subnets": list(self.network.subnets),
                "SecurityGroupIds": list(self.network.security_group_ids),
            }
        }

    def variant(self) -> dict[str, Any]:
        """The fields of the ProductionVariant that are set."""
        fields = {
            "ModelDataDownloadTimeoutInSeconds": self.download_timeout_seconds,
            "ContainerStartupHealthCheckTimeoutInSeconds": self.startup_timeout_seconds,
            "InferenceAmiVersion": self.inference_ami,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        size = {
            "canary": f" {self.canary_percent} %",
            "linear": f" {self.linear_percent} %",
            "all_at_once": "",
        }
        watch = f"rollback on {', '.join(self.alarms)}" if self.alarms else "no rollback alarms"
        return f"{self.strategy}{size[self.strategy]}, baking {self.bake_seconds} s, {watch}"


@dataclass(frozen=True)
class Endpoint:
    """An endpoint as DescribeEndpoint shows it at one moment."""

    name: str
    arn: str
    status: str
    config: str | None
    failure: str
    progress: str

    @classmethod
    def find(cls, sagemaker: Any, name: str) -> Endpoint | None:
        """The endpoint, or None when there is none of that name."""
        try:
            answer = sagemaker.describe_endpoint(EndpointName=name)
        except ClientError as error:
            if aws.is_missing(error):
                return None
            raise StepError(f"Reading endpoint '{name}' failed: {error}", "Check the job's role.") from error
        return cls(
            name=name,
            arn=answer["EndpointArn"],
            status=answer["EndpointStatus"],
            config=answer.get("EndpointConfigName"),
            failure=answer.get("FailureReason", ""),
            progress=_progress(answer),
        )

    @property
    def moving(self) -> bool:
        """Whether the service is changing it, so that it takes no update."""
        return self.status in MOVING

    def require_updatable(self) -> None:
        """Raise StepError when the service would refuse an update in this state for good."""
        if self.status != "InService":
            raise StepError(
                f"Endpoint '{self.name}' is {self.status} and takes no update: "
                f"{self.failure or 'no reason given'}.",
                "Delete it (aws sagemaker delete-endpoint) and start the pipeline again: it creates it anew.",
            )


def wait_until_settled(sagemaker: Any, name: str, timeout: float) -> Endpoint | None:
    """Follow the endpoint until it stops moving, with a log line at every change.

    Returns:
        the settled endpoint; None when it was being deleted and is gone.
    Raises:
        StepError: it still moved after `timeout` seconds.
    """
    deadline, poll, shown = time.monotonic() + timeout, FIRST_POLL_SECONDS, ""
    while True:
        endpoint = Endpoint.find(sagemaker, name)
        if endpoint and endpoint.progress != shown:
            shown = endpoint.progress
            log.info("%s: %s", name, shown)
        if not endpoint or not endpoint.moving:
            return endpoint
        if time.monotonic() > deadline:
            raise StepError(
                f"Endpoint '{name}' is still {endpoint.status} after {timeout:.0f} s.",
                "The service goes on with it: look at the endpoint, then start the pipeline again, "
                "which waits for an update in progress.",
            )
        time.sleep(poll)
        poll = min(poll * 1.3, SLOWEST_POLL_SECONDS)


def _progress(answer: dict[str, Any]) -> str:
    """One line: status, and per variant its instances, traffic weight and state, old and new."""
    parts = [answer["EndpointStatus"]]
    pending = answer.get("PendingDeploymentSummary", {})
    for side, variants in (
        ("live", answer.get("ProductionVariants", [])),
        ("new", pending.get("ProductionVariants", [])),
    ):
        for variant in variants:
            states = [
                state.get("StatusMessage") or state["Status"] for state in variant.get("VariantStatus", [])
            ]
            parts.append(
                f"{side} {variant['VariantName']}: {variant.get('CurrentInstanceCount', 0)} instances, "
                f"weight {variant.get('CurrentWeight', 0):g}" + (f" ({'; '.join(states)})" if states else "")
            )
    return " | ".join(parts)
