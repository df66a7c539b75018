"""The version that production serves now: found from its endpoint, fetched and verified.

    endpoint -> its live configuration -> the model -> the model package it was made from

The endpoint is asked, not the registry: the newest approved version may have been rolled back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from kernels.package import file_sha256
from steps import aws, model_package
from steps.deployed_endpoint import Endpoint
from steps.job import StepError, log
from steps.model_package import ModelPackage
from steps.registry.paths import check_paths
from steps.verify_package import S3Object, list_objects, require_weights, verify_kernel

SERVES_NOBODY = {"Creating", "Deleting", "Failed", "OutOfService"}


def find(sagemaker: Any, endpoint_name: str) -> tuple[ModelPackage | None, str]:
    """The approved version behind `endpoint_name`.

    Returns:
        the version; or None and the reason, a sentence for a person.
    Raises:
        StepError: the service cannot be asked, or the version is none of a release.
    """
    endpoint = Endpoint.find(sagemaker, endpoint_name)
    if not endpoint:
        return None, f"There is no endpoint '{endpoint_name}' in this account."
    if endpoint.status in SERVES_NOBODY or not endpoint.config:
        return None, f"Endpoint '{endpoint_name}' is {endpoint.status} and serves nobody."
    with aws.explained(f"Reading what endpoint '{endpoint_name}' serves"):
        config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint.config)
        variant = max(config["ProductionVariants"], key=lambda one: one.get("InitialVariantWeight", 0.0))
        model = sagemaker.describe_model(ModelName=variant["ModelName"])
    containers = model.get("Containers") or [model.get("PrimaryContainer", {})]
    arn = containers[0].get("ModelPackageName")
    if not arn:
        return None, f"Model {variant['ModelName']} of '{endpoint_name}' was made from no model package."
    package = model_package.describe(sagemaker, arn)
    if package.approval != "Approved":
        return None, f"Version {arn} is live but {package.approval}: it is no measure for another one."
    return package, ""


def fetch(s3: Any, package: ModelPackage, folder: Path) -> tuple[Path, Path]:
    """Download weights and kernel of `package` below `folder`, streaming, and verify every file.

    A kernel's hashes are registered with the version. The weights' are in the provenance that PullModel wrote
    beside them; without it their sizes and the checksums that S3 keeps are what is compared.

    Returns:
        the folders of the model and of the kernel.
    Raises:
        StepError: an object is missing, was changed since its release, or does not fit on the disk.
    """
    verify_kernel(s3, package)
    weights, kernel = require_weights(s3, package), list_objects(s3, package.kernel_uri)
    needed, free = sum(item.bytes for item in (*weights, *kernel)), shutil.disk_usage(folder).free
    if needed > free:
        raise StepError(
            f"The version in production, {package.arn}, has {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free for it on this machine's disk.",
            "Raise jobs.volume_gb in the environment's configuration: both versions are measured in one job.",
        )
    hashes = weight_hashes(s3, package)
    download(s3, weights, folder / "model", hashes)
    download(s3, kernel, folder / "kernel", {})
    log.info("fetched %s from production: %.1f MB", package.arn, needed / 1e6)
    return folder / "model", folder / "kernel"


def weight_hashes(s3: Any, package: ModelPackage) -> dict[str, str]:
    """SHA-256 by file name from provenance/provenance.json beside the weights; empty when there is none."""
    bucket, prefix = aws.split_s3_uri(package.weights_uri)
    key = f"{prefix.rstrip('/').rpartition('/')[0]}/provenance/provenance.json"
    try:
        document = json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchKey":
            log.info("no provenance at s3://%s/%s: sizes and S3's checksums are compared", bucket, key)
            return {}
        raise StepError(
            f"Reading s3://{bucket}/{key} failed: {error}.", "Allow the job's role s3:GetObject there."
        ) from error
    return {entry["path"]: entry["sha256"] for entry in document["files"]}


def download(s3: Any, objects: list[S3Object], folder: Path, hashes: Mapping[str, str]) -> None:
    """Every object into `folder` under its name. Raises StepError when one is not what was released."""
    check_paths([item.name for item in objects])
    for item in objects:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with aws.explained(
            f"Downloading s3://{item.bucket}/{item.key}", "Allow the job's role s3:GetObject."
        ):
            s3.download_file(item.bucket, item.key, str(path))
        expected = hashes.get(item.name)
        if path.stat().st_size != item.bytes or (expected and file_sha256(path) != expected):
            raise StepError(
                f"s3://{item.bucket}/{item.key}, live in production, is not what was released: "
                f"{path.stat().st_size} bytes, expected {item.bytes} with SHA-256 {expected or 'unknown'}.",
                "Restore the object (bucket versioning), or move production to a whole version.",
            )
