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
        Call(step, service, operation, resource, _context(parameters))
        for resource in _resources(service, operation, parameters, arn)
    ]
    passed = [parameters.get("ExecutionRoleArn") or (service == "sagemaker" and parameters.get("RoleArn"))]
    passed += [target.get("RoleArn") for target in parameters.get("Targets", ())]
    receiver = {"iam:PassedToService": f"{'events' if service == 'events' else 'sagemaker'}.amazonaws.com"}
    found += [Call(step, "iam", "PassRole", str(role), receiver) for role in passed if role]
    return found


def _resources(service: str, operation: str, parameters: Parameters, arn: str) -> list[str]:
    if service == "s3":
        bucket = f"arn:aws:s3:::{parameters['Bucket']}"
        return [f"{bucket}/{parameters['Key']}" if "Key" in parameters else bucket]
    if service == "secretsmanager":
        return [str(parameters["SecretId"])]
    if service in _OTHERS:
        _, _, _, region, account, _ = arn.split(":", 5)
        return [_OTHERS[service](parameters).format(region=region, account=account)]
    table = _SAGEMAKER if service in ("sagemaker", "sagemaker-runtime") else {}
    if operation not in table:
        raise NotImplementedError(f"{service}:{operation} called by a step: add its resources to {__name__}")
    return table[operation](parameters, arn)


def _context(parameters: Parameters) -> dict[str, str]:
    keys = {
        "Prefix": "s3:prefix",
        "ServiceNamespace": "application-autoscaling:service-namespace",
        "ScalableDimension": "application-autoscaling:scalable-dimension",
    }
    return {key: str(parameters[name]) for name, key in keys.items() if name in parameters}


def _named(kind: str, key: str) -> Callable[[Parameters, str], list[str]]:
    """A resource that the request names; some requests take its ARN as well."""
    return lambda parameters, arn: [f"{arn}{kind}/{parameters[key].removeprefix(f'{arn}{kind}/')}".lower()]


def _package(parameters: Parameters, arn: str) -> list[str]:
    return [str(parameters.get("ModelPackageName") or parameters["ModelPackageArn"])]


def _packages(parameters: Parameters, arn: str) -> list[str]:
    return [f"{arn}model-package/{parameters['ModelPackageGroupName']}/1"]


def _execution(parameters: Parameters, arn: str) -> list[str]:
    return [str(parameters["PipelineExecutionArn"])]


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
    "CreateModelPackageGroup": _named("model-package-group", "ModelPackageGroupName"),
    "CreatePipeline": _named("pipeline", "PipelineName"),
    "CreateProcessingJob": _named("processing-job", "ProcessingJobName"),
    "DescribeEndpoint": _named("endpoint", "EndpointName"),
    "DescribeEndpointConfig": _named("endpoint-config", "EndpointConfigName"),
    "DescribeModel": _named("model", "ModelName"),
    "DescribeModelPackage": _package,
    "DescribeModelPackageGroup": _named("model-package-group", "ModelPackageGroupName"),
    "DescribePipeline": _named("pipeline", "PipelineName"),
    "DescribePipelineExecution": _execution,
    "DescribeProcessingJob": _named("processing-job", "ProcessingJobName"),
    "InvokeEndpoint": _named("endpoint", "EndpointName"),
    "InvokeEndpointWithResponseStream": _named("endpoint", "EndpointName"),
    "ListModelPackages": _packages,
    "ListPipelineExecutionSteps": _execution,
    "ListPipelineExecutions": _named("pipeline", "PipelineName"),
    "ListPipelineParametersForExecution": _execution,
    "StartPipelineExecution": _named("pipeline", "PipelineName"),
    "UpdateEndpoint": _endpoint_and_config,
    "UpdateModelPackage": _package,
    "UpdatePipeline": _named("pipeline", "PipelineName"),
}


def _rule(parameters: Parameters) -> str:
    return f"arn:aws:events:{{region}}:{{account}}:rule/{parameters.get('Rule') or parameters['Name']}"


def _log_stream(parameters: Parameters) -> str:
    group, stream = parameters["logGroupName"], parameters.get("logStreamName", "")
    return f"arn:aws:logs:{{region}}:{{account}}:log-group:{group}:log-stream:{stream}"


def _alarm(parameters: Parameters) -> str:
    names = parameters.get("AlarmNames")
    return f"arn:aws:cloudwatch:{{region}}:{{account}}:alarm:{names[0]}" if names else "*"


_OTHERS: dict[str, Callable[[Parameters], str]] = {
    "application-autoscaling": lambda _: (
        "arn:aws:application-autoscaling:{region}:{account}:scalable-target/1"
    ),
    "cloudwatch": _alarm,
    "events": _rule,
    "iam": lambda one: f"arn:aws:iam::{{account}}:role/{one['RoleName']}",
    "logs": _log_stream,
    "service-quotas": lambda _: "*",
}
