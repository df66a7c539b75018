"""What an endpoint serves and how it is: health, version, traffic, alarms, cost, last deployments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines import service, versions
from pipelines.aws import Aws, if_there, there
from pipelines.prices import Prices, per_million_tokens
from pipelines.settings import Settings

DEPLOYMENTS = 5
# The metric filter of config/infrastructure/watching.yaml, on the production endpoint's log.
THROUGHPUT_NAMESPACE, THROUGHPUT = "MlaPipeline/{}", "TokensPerSecond"


@dataclass(frozen=True)
class Served:
    """The live configuration of an endpoint. package: the version's ARN, "" when there is none."""

    config: str
    instance_type: str
    package: str


@dataclass(frozen=True)
class Variant:
    """A fleet's share. side: live, or new during an update. state: what it is doing, "" when settled."""

    side: str
    name: str
    instances: int
    weight: float
    state: str


@dataclass(frozen=True)
class Deployment:
    """An execution that deploys to the endpoint. version: ARN for production, "" for staging."""

    execution: str
    version: str
    status: str
    started: datetime


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of one busy instance, and where they were measured."""

    tokens_a_second: float
    where: str


@dataclass(frozen=True)
class Status:
    """An endpoint at one moment. alarms: name to OK, ALARM, INSUFFICIENT_DATA or missing."""

    name: str
    health: str
    failure: str
    changed: datetime
    served: Served
    package: versions.Package | None
    variants: tuple[Variant, ...]
    alarms: tuple[tuple[str, str], ...]
    deployments: tuple[Deployment, ...]
    instance_dollars: float | None  # of one instance, an hour
    throughput: Throughput | None

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"{self.name}: {self.health} since {self.changed:%Y-%m-%d %H:%M}" + (
            f": {self.failure}" if self.failure else ""
        )
        yield f"config      {self.served.config}"
        if self.package:
            data = self.package.metadata
            yield f"version     {self.package.version} ({self.package.status}) {self.package.arn}"
            yield (
                f"model       {data.get('MlflowModelName', '-')} {data.get('MlflowModelVersion', '-')}, "
                f"kernel {data.get('KernelBackend', '-')} {data.get('KernelSha256', '-')[:12]}"
            )
        for one in self.variants:
            state = f", {one.state}" if one.state else ""
            yield f"{one.side:<12}{one.name}: {one.instances} instances, weight {one.weight:g}{state}"
        yield f"alarms      {', '.join(f'{name} {state}' for name, state in self.alarms) or 'none'}"
        yield f"cost        {self._cost()}"
        for run in self.deployments:
            version = f" version {run.version.rsplit('/', 1)[-1]}" if run.version else ""
            yield f"deployment  {run.started:%Y-%m-%d %H:%M} {run.execution}{version} {run.status}"

    def _cost(self) -> str:
        instances = sum(one.instances for one in self.variants)
        kind = f"{instances} x {self.served.instance_type}"
        if self.instance_dollars is None:
            return f"{kind}, unpriced"
        text = f"{kind}, {self.instance_dollars * instances:.2f} USD an hour"
        if not self.throughput:
            return text
        pace = self.throughput.tokens_a_second
        million = per_million_tokens(self.instance_dollars, pace)
        measured = f"{pace:.0f} tokens a second an instance, {self.throughput.where}"
        return f"{text}, {million:.2f} USD per million tokens at {measured}"


def status(aws: Aws, settings: Settings, name: str) -> Status:
    """The endpoint now. Raises UserError when there is none of the name."""
    answer = _describe(aws, name)
    served = live(aws, settings, name)
    production = name == settings.parameters.production["ProductionEndpointName"]
    pipeline = settings.names.production_pipeline if production else settings.names.release_pipeline
    return Status(
        name=name,
        health=answer["EndpointStatus"],
        failure=answer.get("FailureReason", ""),
        changed=answer["LastModifiedTime"],
        served=served,
        package=versions.package(aws, served.package) if served.package else None,
        variants=tuple(_variants(answer)),
        alarms=tuple(_alarms(aws, settings.deployment.alarms)) if production else (),
        deployments=tuple(_deployments(aws, pipeline)),
        instance_dollars=Prices.load(settings.region).of(served.instance_type, 1),
        throughput=_served_throughput(aws, name) or _evaluated_throughput(aws, served.package),
    )


def live(aws: Aws, settings: Settings, name: str) -> Served:
    """What the endpoint serves. Raises UserError when there is no such endpoint.

    One whose configuration or model was deleted goes on serving; then less is known of it.
    """
    config = _describe(aws, name)["EndpointConfigName"]
    variant = _first_variant(aws, config)
    package = _package_of(aws, variant["ModelName"]) if variant.get("ModelName") else ""
    return Served(config, variant.get("InstanceType", "unknown"), package or _staged(aws, settings, config))


def _first_variant(aws: Aws, config: str) -> dict[str, Any]:
    """{} when the configuration is gone."""
    described = if_there(aws.sagemaker.describe_endpoint_config, EndpointConfigName=config)
    return described["ProductionVariants"][0] if described else {}


def _package_of(aws: Aws, model: str) -> str:
    """ARN of the version that the model was made of; "" for one of files, and for one that is gone."""
    described = if_there(aws.sagemaker.describe_model, ModelName=model) or {}
    containers = [*described.get("Containers", ()), described.get("PrimaryContainer") or {}]
    return next((one["ModelPackageName"] for one in containers if one.get("ModelPackageName")), "")


def _staged(aws: Aws, settings: Settings, config: str) -> str:
    """Staging serves the files, not the package; its configuration bears the execution's name."""
    prefix = f"{settings.names.release_pipeline}-"
    if not config.startswith(prefix):
        return ""
    pipeline = aws.sagemaker.describe_pipeline(PipelineName=settings.names.release_pipeline)["PipelineArn"]
    execution = service.status(aws, f"{pipeline}/execution/{config.removeprefix(prefix)}")
    # A release that failed on staging registered none.
    return next((one.resource for one in execution.steps if one.name == "RegisterModel"), "")


def _describe(aws: Aws, name: str) -> dict[str, Any]:
    return there(aws.sagemaker.describe_endpoint, service.no_endpoint(aws, name), EndpointName=name)


def _variants(answer: dict[str, Any]) -> Iterator[Variant]:
    pending = answer.get("PendingDeploymentSummary", {})
    for side, variants in (
        ("live", answer.get("ProductionVariants", [])),
        ("new", pending.get("ProductionVariants", [])),
    ):
        for one in variants:
            states = [state.get("StatusMessage") or state["Status"] for state in one.get("VariantStatus", [])]
            yield Variant(
                side,
                one["VariantName"],
                one.get("CurrentInstanceCount", 0),
                one.get("CurrentWeight", 0.0),
                "; ".join(states),
            )


def _alarms(aws: Aws, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if not names:
        return
    found = aws.cloudwatch.describe_alarms(AlarmNames=list(names))
    states = {one["AlarmName"]: one["StateValue"] for one in found.get("MetricAlarms", [])}
    states |= {one["AlarmName"]: one["StateValue"] for one in found.get("CompositeAlarms", [])}
    for name in names:
        yield name, states.get(name, "missing")


def _deployments(aws: Aws, pipeline: str) -> Iterator[Deployment]:
    """The last executions, newest first."""
    for one in service.newest(aws, pipeline, DEPLOYMENTS):
        arn = one["PipelineExecutionArn"]
        yield Deployment(
            arn.rsplit("/", 1)[-1],
            deployed_package(aws, arn),
            one["PipelineExecutionStatus"],
            one["StartTime"],
        )


def deployed_package(aws: Aws, execution: str) -> str:
    """ARN of the version that an execution of the production pipeline deploys, "" for another pipeline."""
    values = aws.sagemaker.list_pipeline_parameters_for_execution(PipelineExecutionArn=execution)
    return next(
        (one["Value"] for one in values["PipelineParameters"] if one["Name"] == "ModelPackageArn"), ""
    )


def _served_throughput(aws: Aws, name: str) -> Throughput | None:
    """Of the last day's busy minutes, as the servers logged them; None when they log to no metric."""
    now = datetime.now(UTC)
    found = aws.cloudwatch.get_metric_statistics(
        Namespace=THROUGHPUT_NAMESPACE.format(name),
        MetricName=THROUGHPUT,
        StartTime=now - timedelta(days=1),
        EndTime=now,
        Period=86_400,
        Statistics=["Average"],
    )["Datapoints"]
    newest = max(found, key=lambda one: one["Timestamp"], default=None)
    return Throughput(newest["Average"], "served while busy in the last day") if newest else None


def _evaluated_throughput(aws: Aws, package: str) -> Throughput | None:
    """Of this version's evaluation, None when there is none."""
    if not package:
        return None
    answer = aws.sagemaker.describe_model_package(ModelPackageName=package)
    uri = answer.get("ModelMetrics", {}).get("ModelQuality", {}).get("Statistics", {}).get("S3Uri", "")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not key:
        return None
    stored = if_there(aws.s3.get_object, Bucket=bucket, Key=key)
    if not stored:
        return None
    evaluation = json.loads(stored["Body"].read())
    return Throughput(float(evaluation["model"]["tokens_per_s"]), "measured by the evaluation")
