"""One release from either end: run -> model version -> kernel -> evaluation -> package -> endpoint.

    python -m steps.registry.chain MODEL_PACKAGE_ARN|MODEL_URI [--json]

What one side says about the other is compared: a hash that does not agree is a contradiction, which is named
and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from steps import aws, model_package
from steps.job import StepError
from steps.registry.access import Registry, connect, resolve
from steps.registry.errors import explained
from steps.registry.provenance import NONE
from steps.registry.uris import ModelUri, parse_model_uri

_ENDPOINTS = 500  # looked through at most; describing one costs three calls


@dataclass(frozen=True)
class Link:
    """One link of the chain: what it is, its identity, and what is known about it."""

    what: str
    identity: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Chain:
    """The links in order, and what contradicts itself or could not be read."""

    links: list[Link] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def trace(start: str) -> Chain:
    """Follow the chain from a model package's ARN or from a model URI.

    Raises:
        StepError: the start does not exist or may not be read.
    """
    chain = Chain()
    if start.startswith("arn:") and ":model-package/" in start:
        package = _package(start)
        tags = _mlflow_side(chain, package)
    else:
        uri = parse_model_uri(start)
        tags = _mlflow_links(chain, connect(), uri)
        if not (arn := tags.get("model_package_arn")):
            chain.notes.append("not released: no model package is recorded on this version")
            return chain
        try:
            package = _package(arn)
        except StepError as error:  # deleted, or of an account that this one may not look into
            chain.notes.append(str(error))
            return chain
    _package_links(chain, package)
    _compare(chain, package, tags)
    chain.links += _endpoint_links(package)
    if not any(link.what == "endpoint" for link in chain.links):
        chain.notes.append("no endpoint serves this package")
    return chain


def _package(arn: str) -> model_package.ModelPackage:
    return model_package.describe(aws.client("sagemaker"), arn)


def _mlflow_side(chain: Chain, package: model_package.ModelPackage) -> dict[str, str]:
    """Add MLflow's side as MLflow tells it, else as the package does; returns the version's tags."""
    uri, reason = _uri_of(package), "MLFLOW_TRACKING_URI is not set"
    if uri and os.environ.get("MLFLOW_TRACKING_URI"):
        try:
            return _mlflow_links(chain, connect(), uri)
        except StepError as error:
            reason = str(error)
    chain.notes.append(f"the MLflow side is told from the package alone: {reason}")
    _mlflow_links_from_package(chain, package)
    return {}


def _uri_of(package: model_package.ModelPackage) -> ModelUri | None:
    known = package.metadata
    name, version = known.get("MlflowModelName", NONE), known.get("MlflowModelVersion", NONE)
    if name != NONE and version != NONE:
        return parse_model_uri(f"models:/{name}/{version}")
    text = known.get("MlflowModelUri", "")
    return parse_model_uri(text) if text else None


def _mlflow_links(chain: Chain, registry: Registry, uri: ModelUri) -> dict[str, str]:
    """Add run and model version. Returns the version's tags, or the run's, without their prefix."""
    model = resolve(registry, uri)
    with explained(registry, f"ModelUri '{uri.text}'"):
        found = registry.client.get_model_version(model.name, model.version) if model.version else None
    run_tags: dict[str, str] = {}
    if model.run_id:
        try:
            with explained(registry, f"Run {model.run_id}"):
                run = registry.client.get_run(model.run_id)
            run_tags = dict(run.data.tags)
            facts: dict[str, Any] = {
                "tracking": registry.tracking_uri,
                "name": run.info.run_name,
                "user": run_tags.get("mlflow.user"),
                "commit": run_tags.get("mlflow.source.git.commit"),
                "parameters": dict(run.data.params),
                "metrics": {
                    key: value for key, value in run.data.metrics.items() if not key.startswith("mla.")
                },
            }
            chain.links.append(Link("training run", model.run_id, facts))
        except StepError as error:
            chain.notes.append(str(error))
    if found:
        facts = {"registry": registry.registry_uri, "aliases": list(found.aliases), "source": model.source}
        chain.links.append(Link("model version", f"{model.name}/{model.version}", facts))
    prefix = registry.tag_key("mla.") if model.version else "mla."
    tags = model.tags if model.version else run_tags
    return {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}


def _mlflow_links_from_package(chain: Chain, package: model_package.ModelPackage) -> None:
    known = package.metadata
    if (run_id := known.get("MlflowRunId", NONE)) != NONE:
        chain.links.append(Link("training run", run_id))
    if (version := known.get("MlflowModelVersion", NONE)) != NONE:
        chain.links.append(Link("model version", f"{known.get('MlflowModelName')}/{version}"))


def _package_links(chain: Chain, package: model_package.ModelPackage) -> None:
    """Add kernel, evaluation and package."""
    known = package.metadata
    index = _read_json(chain, f"{package.kernel_uri.rstrip('/')}/index.json")
    chain.links.append(
        Link(
            "kernel",
            known.get("KernelSha256", NONE),
            {
                "backend": known.get("KernelBackend"),
                "uri": package.kernel_uri,
                "targets": sorted((index or {}).get("packages", {})),
            },
        )
    )
    statistics = _statistics_uri(package.arn)
    evaluation = _read_json(chain, statistics) if statistics else None
    chain.links.append(
        Link(
            "evaluation",
            statistics or NONE,
            {
                "relative_error": known.get("RelativeError"),
                "speedup": known.get("Speedup"),
                "decode_latency_ms": known.get("DecodeLatencyMs"),
                "correct": bool((evaluation or {}).get("gate", {}).get("correct")) if evaluation else None,
                "machine": (evaluation or {}).get("machine"),
            },
        )
    )
    chain.links.append(
        Link(
            "model package",
            package.arn,
            {
                "approval": package.approval,
                "approval_description": package.approval_description,
                "image": package.image,
                "weights": package.weights_uri,
            },
        )
    )
    if index is not None and index.get("sha256") != known.get("KernelSha256"):
        chain.contradictions.append(
            f"kernel: {package.kernel_uri} holds {index.get('sha256')}, "
            f"the package says {known.get('KernelSha256')}"
        )
    if evaluation is not None and evaluation.get("backend") != known.get("KernelBackend"):
        chain.contradictions.append(
            f"backend: the evaluation chose {evaluation.get('backend')}, "
            f"the package says {known.get('KernelBackend')}"
        )


def _compare(chain: Chain, package: model_package.ModelPackage, tags: dict[str, str]) -> None:
    """What MLflow's tags and the package say about each other."""
    if not tags:
        return
    if (arn := tags.get("model_package_arn")) and arn != package.arn:
        chain.notes.append(f"MLflow records a later release of this version: {arn}")
        return
    for tag, key in (("kernel_sha256", "KernelSha256"), ("kernel_backend", "KernelBackend")):
        if tag in tags and tags[tag] != package.metadata.get(key):
            chain.contradictions.append(
                f"{tag}: MLflow says {tags[tag]}, the package {package.metadata.get(key)}"
            )


def _endpoint_links(package: model_package.ModelPackage) -> Iterator[Link]:
    """Every endpoint that serves the package: by its ARN (production) or by its weights (staging)."""
    sagemaker = aws.client("sagemaker")
    serves: dict[str, bool] = {}
    with aws.explained("Looking through the endpoints", "Allow sagemaker:ListEndpoints and Describe*."):
        pages = sagemaker.get_paginator("list_endpoints").paginate(PaginationConfig={"MaxItems": _ENDPOINTS})
        for summary in (item for page in pages for item in page["Endpoints"]):
            endpoint = sagemaker.describe_endpoint(EndpointName=summary["EndpointName"])
            config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
            for variant in config["ProductionVariants"]:
                model = variant.get("ModelName", "")
                if model not in serves:
                    serves[model] = _serves(sagemaker, model, package)
                if serves[model]:
                    facts = {
                        "status": endpoint["EndpointStatus"],
                        "config": endpoint["EndpointConfigName"],
                        "instance_type": variant.get("InstanceType"),
                        "since": str(endpoint.get("LastModifiedTime", "")),
                    }
                    yield Link("endpoint", summary["EndpointName"], facts)


def _serves(sagemaker: Any, model: str, package: model_package.ModelPackage) -> bool:
    try:
        answer = sagemaker.describe_model(ModelName=model)
    except ClientError as error:
        if aws.is_missing(error):  # the model of a running endpoint may have been deleted
            return False
        raise
    containers = [*answer.get("Containers", []), answer.get("PrimaryContainer", {})]
    weights = {
        container.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri", "")
        for container in containers
    }
    arns = {container.get("ModelPackageName") for container in containers}
    return package.arn in arns or package.weights_uri in weights


def _statistics_uri(arn: str) -> str:
    with aws.explained(f"Reading model package {arn}"):
        answer = aws.client("sagemaker").describe_model_package(ModelPackageName=arn)
    return answer.get("ModelMetrics", {}).get("ModelQuality", {}).get("Statistics", {}).get("S3Uri", "")


def _read_json(chain: Chain, uri: str) -> dict[str, Any] | None:
    bucket, key = aws.split_s3_uri(uri)
    try:
        return json.loads(aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())
    except (BotoCoreError, ClientError, ValueError) as error:
        chain.notes.append(f"cannot read {uri}: {error}")
        return None


def text(chain: Chain) -> str:
    """The chain for a person."""
    lines = []
    for index, link in enumerate(chain.links):
        lines.append(f"{'   ' if index == 0 else '-> '}{link.what}: {link.identity}")
        lines += [f"      {key}: {_short(value)}" for key, value in link.facts.items() if value]
    lines += [f"CONTRADICTION {line}" for line in chain.contradictions]
    lines += [f"note: {line}" for line in chain.notes]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module. Exit code 1 on a contradiction, 2 when the start cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m steps.registry.chain")
    parser.add_argument("start", help="a model package's ARN or a model URI")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        chain = trace(args.start)
    except StepError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(asdict(chain), indent=2, default=str) if args.json else text(chain))
    return int(bool(chain.contradictions))


if __name__ == "__main__":
    sys.exit(main())
