"""How the production endpoint changes: settings, what they must satisfy, their way to DeployProduction.

The limits are those of UpdateEndpoint in SageMaker's API reference and, for the share of a step, of the
developer guide's pages on canary, linear and rolling deployments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo, field_validator

from pipelines.strict import Strict

if TYPE_CHECKING:
    from pipelines.settings import Settings

# of Endpoint, for the server: the registered container's environment holds them
SERVER_SETTINGS = {"kernel_delivery", "engine", "tensor_parallel", "pipeline_parallel"}
ARGUMENT_LIMIT = 256  # characters of one ContainerArguments entry
# An alarm's name may have 255, but with its key it has to fit one argument.
AlarmName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def _size(value: object) -> str:
    """ "10%" of the fleet, or a number of instances."""
    if not re.fullmatch(r"[1-9][0-9]*%?", str(value)):
        raise ValueError('give a share of the fleet, "10%", or a number of instances')
    return str(value)


Size = Annotated[str, BeforeValidator(_size)]
Seconds = Annotated[int, Field(ge=0, le=3600)]
STEP_PERCENT = {"canary": (1, 50), "linear": (10, 50), "rolling": (5, 50)}


class Capture(Strict):
    """Requests and answers of production, kept below <prefix>/data-capture/ of the bucket for 90 days."""

    percent: Annotated[int, Field(ge=1, le=100)]
    mode: Literal["Input", "Output", "InputAndOutput"] = "InputAndOutput"


class Scaling(Strict):
    """Application Auto Scaling of production's instances.

    ManagedInstanceScaling of a production variant is not it: CreateEndpointConfig refuses it for a variant
    that names its model ("only supported for inference component endpoints",
    hashicorp/terraform-provider-aws pull request 45926).
    """

    min_instances: Annotated[int, Field(ge=1)]
    max_instances: Annotated[int, Field(ge=1)]
    invocations_per_minute: Annotated[float, Field(gt=0)]  # of one instance, the target
    scale_in_seconds: Annotated[int, Field(ge=0)] = 300  # between two removals of instances

    @field_validator("max_instances")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min_instances", 1):
            raise ValueError(f"give at least min_instances, {info.data['min_instances']}")
        return value


class Deployment(Strict):
    """The strategy of an update and what else only production has.

    canary: step_size of the traffic first, then the rest. linear: step_size after step_size. rolling: batches
    of step_size instances, old ones away as new ones come, so that it needs no second fleet. all_at_once: the
    whole traffic, with the old fleet kept until the alarms have been watched.
    """

    strategy: Literal["canary", "linear", "rolling", "all_at_once"]
    step_size: Size
    rollback_size: Size | None = None  # rolling: batch of the way back; all at once without it
    bake_seconds: Seconds  # alarms are watched after every step
    termination_wait_seconds: Seconds  # the old fleet stays after the last step; rolling has none left
    timeout_seconds: Annotated[int, Field(ge=600, le=28800)]
    alarms: tuple[AlarmName, ...] = Field(default=(), max_length=10)
    scaling: Scaling | None = None
    capture: Capture | None = None

    @field_validator("step_size")
    @classmethod
    def _share(cls, value: str, info: ValidationInfo) -> str:
        strategy = info.data.get("strategy", "")
        low, high = STEP_PERCENT.get(strategy, (1, 100))
        if value.endswith("%") and not low <= int(value[:-1]) <= high:
            raise ValueError(f"a step of strategy {strategy} is {low}% to {high}% of the fleet")
        return value

    @field_validator("rollback_size")
    @classmethod
    def _only_rolling(cls, value: str | None, info: ValidationInfo) -> str | None:
        strategy = info.data.get("strategy")
        if value is not None and strategy != "rolling":
            raise ValueError(f"only strategy rolling goes back in batches, {strategy} keeps the old fleet")
        if value is not None and value.endswith("%") and int(value[:-1]) > 100:
            raise ValueError("a batch is at most 100% of the fleet")
        return value

    def steps(self, instances: int) -> int:
        """How often the alarms are watched, for a fleet of `instances`."""
        if self.strategy in ("canary", "all_at_once"):
            return {"canary": 2, "all_at_once": 1}[self.strategy]
        percent = self.step_size.endswith("%")
        size, whole = int(self.step_size.rstrip("%")), 100 if percent else instances
        return -(-whole // size)

    def extra(self, instances: int) -> int:
        """Instances that an update of a fleet of `instances` needs besides them, its way back included."""
        if self.strategy != "rolling" or self.rollback_size is None:
            return instances
        return max(_instances(size, instances) for size in (self.step_size, self.rollback_size))


def _instances(size: str, fleet: int) -> int:
    return -(-fleet * int(size[:-1]) // 100) if size.endswith("%") else int(size)


def problem(deployment: Deployment, instances: int) -> tuple[str, object, str] | None:
    """The key that does not fit a fleet of `instances`, its value, and why; None when all do."""
    size = deployment.step_size
    stepwise = deployment.strategy != "all_at_once"
    if stepwise and not size.endswith("%") and 2 * int(size) > instances:
        why = f"it is more than half of EndpointInstanceCount, {instances}: give fewer, or percent"
        return "step_size", size, why
    steps = deployment.steps(instances)
    after = 0 if deployment.strategy == "rolling" else deployment.termination_wait_seconds
    waits = steps * deployment.bake_seconds + after
    if waits >= deployment.timeout_seconds:
        words = f"{steps} x bake_seconds{' and termination_wait_seconds' * bool(after)} alone take {waits} s"
        why = f"{words}: give more, or take fewer steps or shorter waits"
        return "timeout_seconds", deployment.timeout_seconds, why
    scaling = deployment.scaling
    if scaling and instances < scaling.min_instances:
        return "scaling.min_instances", scaling.min_instances, f"EndpointInstanceCount is {instances}"
    if scaling and instances > scaling.max_instances:
        return "scaling.max_instances", scaling.max_instances, f"EndpointInstanceCount is {instances}"
    return None


def job_minutes(settings: Settings) -> int:
    """Time limit of DeployProduction: it may wait for an update in progress before its own."""
    return settings.jobs.timeout_minutes + 2 * -(-settings.deployment.timeout_seconds // 60)


def parts(settings: Settings) -> list[str]:
    """The values of --deployment: JSON objects of at most 256 characters, that steps.deployment merges.

    A section is one object, so that a difference of definitions reads well; a list that makes it too long
    goes on in the next object, and the lists of one key are joined again.
    """
    deployment = settings.deployment.model_dump(exclude_none=True, exclude={"capture", "scaling"})
    sections: list[dict[str, Any]] = [
        deployment,
        settings.endpoint.model_dump(exclude_none=True, exclude=SERVER_SETTINGS),
    ]
    if scaling := settings.deployment.scaling:
        sections.append({"scaling": scaling.model_dump()})
    if capture := settings.deployment.capture:
        uri = f"s3://{settings.bucket}/{settings.prefix}/data-capture"
        sections.append({"capture": {**capture.model_dump(), "uri": uri}})
    if settings.network:
        sections.append(settings.network.model_dump(include={"subnets", "security_group_ids"}))
    if settings.kms_key:
        sections.append({"kms_key": settings.kms_key})
    return [part for section in sections for part in _fitting(section)]


def _fitting(section: Mapping[str, Any]) -> Iterator[str]:
    entries = [
        (key, [one] if isinstance(value, tuple) else one)
        for key, value in section.items()
        for one in (value if isinstance(value, tuple) else (value,))
    ]
    part: dict[str, Any] = {}
    for key, value in entries:
        longer = {**part, key: part.get(key, []) + value if isinstance(value, list) else value}
        if part and len(_json(longer)) > ARGUMENT_LIMIT:
            yield _json(part)
            longer = {key: value}
        part = longer
    if part:
        yield _json(part)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
