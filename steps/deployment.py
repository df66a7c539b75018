"""How production changes: the values of --deployment as requests of the API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from steps.job import StepError


class _Part(BaseModel):
    """Read from --deployment. Ranges are checked where a person writes them, by pipelines/deployment.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Capture(_Part):
    """Requests and answers that are kept: a share of them, below `uri`."""

    percent: int
    mode: Literal["Input", "Output", "InputAndOutput"]
    uri: str


class Scaling(_Part):
    """Application Auto Scaling of the instances; the target is invocations a minute of one instance."""

    min_instances: int
    max_instances: int
    invocations_per_minute: float
    scale_in_seconds: int


class Deployment(_Part):
    """How production changes, and what its containers get."""

    strategy: Literal["canary", "linear", "rolling", "all_at_once"]
    step_size: str = ""  # "10%" of the fleet, or a number of instances
    rollback_size: str | None = None
    bake_seconds: int  # watched after every step
    termination_wait_seconds: int = 0
    timeout_seconds: int
    alarms: tuple[str, ...] = ()
    startup_timeout_seconds: int | None = None
    download_timeout_seconds: int | None = None
    inference_ami: str | None = None
    subnets: tuple[str, ...] = ()
    security_group_ids: tuple[str, ...] = ()
    kms_key: str | None = None
    capture: Capture | None = None
    scaling: Scaling | None = None

    @model_validator(mode="after")
    def _has_a_size(self) -> Deployment:
        if self.strategy != "all_at_once" and not self.step_size:
            raise ValueError(f"strategy {self.strategy} needs a step_size")
        return self

    @classmethod
    def parse(cls, parts: Sequence[str]) -> Deployment:
        """Read the values of --deployment: JSON objects, each with some of the keys; lists are joined.

        It comes in parts because SageMaker takes at most 256 characters in one argument.
        Raises StepError naming the key that is wrong.
        """
        fix = "Correct `deployment` and `endpoint` in the environment's configuration."
        merged: dict[str, Any] = {}
        for part in parts:
            try:
                found = json.loads(part)
                for key, value in found.items():
                    joined = isinstance(value, list) and isinstance(merged.get(key), list)
                    merged[key] = merged[key] + value if joined else value
            except (ValueError, AttributeError) as error:
                raise StepError(f"--deployment is no JSON object ({error}): {part!r}.", fix) from error
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(place) for place in first["loc"])
            raise StepError(f"--deployment: {key}: {first['msg']}.", fix) from error

    def config(self) -> dict[str, Any]:
        """UpdateEndpoint's DeploymentConfig."""
        config = self._rolling() if self.strategy == "rolling" else self._blue_green()
        if self.alarms:
            config["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": name} for name in self.alarms]}
        return config

    def _rolling(self) -> dict[str, Any]:
        policy: dict[str, Any] = {
            "MaximumBatchSize": _capacity(self.step_size),
            "WaitIntervalInSeconds": self.bake_seconds,
            "MaximumExecutionTimeoutInSeconds": self.timeout_seconds,
        }
        if self.rollback_size:
            policy["RollbackMaximumBatchSize"] = _capacity(self.rollback_size)
        return {"RollingUpdatePolicy": policy}

    def _blue_green(self) -> dict[str, Any]:
        routing: dict[str, Any] = {
            "Type": self.strategy.upper(),
            "WaitIntervalInSeconds": self.bake_seconds,
        }
        if member := {"canary": "CanarySize", "linear": "LinearStepSize"}.get(self.strategy):
            routing[member] = _capacity(self.step_size)
        return {
            "BlueGreenUpdatePolicy": {
                "TrafficRoutingConfiguration": routing,
                "TerminationWaitInSeconds": self.termination_wait_seconds,
                "MaximumExecutionTimeoutInSeconds": self.timeout_seconds,
            }
        }

    def update(self) -> dict[str, Any]:
        """UpdateEndpoint's arguments besides the names; scaled instances stay as many as they are."""
        if not self.scaling:
            return {"DeploymentConfig": self.config()}
        # Everything that can be retained is named here, except DesiredInstanceCount.
        excluded = [{"VariantPropertyType": kind} for kind in ("DesiredWeight", "DataCaptureConfig")]
        return {
            "DeploymentConfig": self.config(),
            "RetainAllVariantProperties": True,
            "ExcludeRetainedVariantProperties": excluded,
        }

    def vpc(self) -> dict[str, Any]:
        """CreateModel's VpcConfig as a keyword argument; nothing outside a VPC."""
        if not self.subnets:
            return {}
        groups = list(self.security_group_ids)
        return {"VpcConfig": {"Subnets": list(self.subnets), "SecurityGroupIds": groups}}

    def variant(self) -> dict[str, Any]:
        """The fields of the ProductionVariant that are set."""
        fields = {
            "ModelDataDownloadTimeoutInSeconds": self.download_timeout_seconds,
            "ContainerStartupHealthCheckTimeoutInSeconds": self.startup_timeout_seconds,
            "InferenceAmiVersion": self.inference_ami,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def data_capture(self) -> dict[str, Any]:
        """CreateEndpointConfig's DataCaptureConfig as a keyword argument; nothing without capture."""
        if not self.capture:
            return {}
        modes = ["Input", "Output"] if self.capture.mode == "InputAndOutput" else [self.capture.mode]
        return {
            "DataCaptureConfig": {
                "EnableCapture": True,
                "InitialSamplingPercentage": self.capture.percent,
                "DestinationS3Uri": self.capture.uri,
                "CaptureOptions": [{"CaptureMode": mode} for mode in modes],
                "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
                **({"KmsKeyId": self.kms_key} if self.kms_key else {}),
            }
        }

    def __str__(self) -> str:
        watch = f"rollback on {', '.join(self.alarms)}" if self.alarms else "no rollback alarms"
        return f"{self.strategy} {self.step_size}, baking {self.bake_seconds} s, {watch}"


def _capacity(size: str) -> dict[str, Any]:
    kind = "CAPACITY_PERCENT" if size.endswith("%") else "INSTANCE_COUNT"
    return {"Type": kind, "Value": int(size.rstrip("%"))}
