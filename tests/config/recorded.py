"""Which resources a botocore request touches: from (service, operation, parameters) to `Call`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.config.iam_walk import Call
from tests.config.template import ACCOUNT, REGION

Parameters = Mapping[str, Any]


def calls(
    step: str,
    service: str,
    operation: str,
    parameters: Parameters,
    region: str = REGION,
    account: str = ACCOUNT,
) -> list[Call]:
    """Every permission the request needs: one call a resource, and iam:PassRole for a role it hands over.

    Raises NotImplementedError for an operation the table lacks, so that a new call cannot go unchecked.
    """
    arn = f"arn:aws:sagemaker:{region}:{account}:"
    found = [
        Call(step, service, operation, resource, _context(operation, parameters))
        for resource in _resources(service, operation, parameters, arn)
    ]
    if role := parameters.get("ExecutionRoleArn") or (service == "sagemaker" and parameters.get("RoleArn")):
        found.append(
            Call(step, "iam", "PassRole", str(role), {"iam:PassedToService": "sagemaker.amazonaws.com"})
        )
    return found


def _resources(service: str, operation: str, parameters: Parameters, arn: str) -> list[str]:
    if service == "s3":
        bucket = f"arn:aws:s3:::{parameters['Bucket']}"
        return [f"{bucket}/{parameters['Key']}" if "Key" in parameters else bucket]
    if service == "secretsmanager":
        return [str(parameters["SecretId"])]
    table = _SAGEMAKER if service in ("sagemaker", "sagemaker-runtime") else {}
    if operation not in table:
        raise NotImplementedError(f"{service}:{operation} called by a step: add its resources to {__name__}")
    return table[operation](parameters, arn)


def _context(operation: str, parameters: Parameters) -> dict[str, str]:
    return {"s3:prefix": str(parameters["Prefix"])} if "Prefix" in parameters else {}


def _named(kind: str, key: str) -> Callable[[Parameters, str], list[str]]:
    """A resource that the request names; some requests take its ARN as well."""
    return lambda parameters, arn: [f"{arn}{kind}/{parameters[key].removeprefix(f'{arn}{kind}/')}".lower()]


def _package(parameters: Parameters, arn: str) -> list[str]:
    return [str(parameters["ModelPackageName"])]


def _new_package(parameters: Parameters, arn: str) -> list[str]:
    group = parameters["ModelPackageGroupName"]
    return [f"{arn}model-package-group/{group}", f"{arn}model-package/{group}/1"]


def _model(parameters: Parameters, arn: str) -> list[str]:
    containers = [*parameters.get("Containers", ()), parameters.get("PrimaryContainer") or {}]
    packages = [str(one["ModelPackageName"]) for one in containers if "ModelPackageName" in one]
    return [*_named("model", "ModelName")(parameters, arn), *packages]


def _endpoint_and_config(parameters: Parameters, arn: str) -> list[str]:
    return [
        f"{arn}endpoint/{parameters['EndpointName']}",
        f"{arn}endpoint-config/{parameters['EndpointConfigName']}",
    ]


_SAGEMAKER: dict[str, Callable[[Parameters, str], list[str]]] = {
    "CreateEndpoint": _endpoint_and_config,
    "CreateEndpointConfig": _named("endpoint-config", "EndpointConfigName"),
    "CreateModel": _model,
    "CreateModelPackage": _new_package,
    "CreateProcessingJob": _named("processing-job", "ProcessingJobName"),
    "DescribeEndpoint": _named("endpoint", "EndpointName"),
    "DescribeEndpointConfig": _named("endpoint-config", "EndpointConfigName"),
    "DescribeModel": _named("model", "ModelName"),
    "DescribeModelPackage": _package,
    "InvokeEndpoint": _named("endpoint", "EndpointName"),
    "InvokeEndpointWithResponseStream": _named("endpoint", "EndpointName"),
    "StartPipelineExecution": _named("pipeline", "PipelineName"),
    "UpdateEndpoint": _endpoint_and_config,
}
