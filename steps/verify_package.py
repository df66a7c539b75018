"""VerifyPackage: the approved version is what was registered and measured, down to the bytes of its kernel.

Runs first in the production pipeline and reads everything anew: between approval and deployment the status
may have changed, and objects in S3 may have been overwritten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from kernels.package import FLASH_MLA, LIBRARY, MANIFEST, combined_sha256
from steps import aws, model_package
from steps.job import Job, StepError, log, run
from steps.model_package import ModelPackage

AGAIN = "Run the release pipeline again and approve its version."
RESTORE = f"Restore the object (bucket versioning). {AGAIN}"


@dataclass(frozen=True)
class S3Object:
    """One object below a prefix; `name` is relative to the prefix."""

    name: str
    bucket: str
    key: str
    bytes: int


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-package-arn", required=True)
    parser.add_argument(
        "--model-package-group", required=True, help="the only group this pipeline deploys from"
    )


def main(job: Job) -> None:
    """Verify an approved model package and write package/package.json."""
    s3 = aws.client("s3")
    package = model_package.describe(aws.client("sagemaker"), job.args.model_package_arn)
    package.require_approved()
    require_group(package, job.args.model_package_group)
    weights = require_weights(s3, package)
    kernel = verify_kernel(s3, package)
    log.info(
        "%s version %d is approved: %d weight files of %.1f MB, kernel %s",
        package.group,
        package.version,
        len(weights),
        sum(item.bytes for item in weights) / 1e6,
        kernel["sha256"],
    )
    job.write_json("package", "package.json", document(package, weights, kernel))


def require_group(package: ModelPackage, expected: str) -> None:
    """Raise StepError when the version belongs to another group than `expected` (a name or an ARN)."""
    name = expected.rpartition("/")[2]
    if package.group != name:
        raise StepError(
            f"Model package {package.arn} is of group '{package.group}', this pipeline deploys '{name}'.",
            "Start the pipeline with a version of its own group.",
        )


def require_weights(s3: Any, package: ModelPackage) -> list[S3Object]:
    """The objects of the weights' prefix. Raises StepError when there is none or one is empty safetensors."""
    objects = list_objects(s3, package.weights_uri)
    weights = [item for item in objects if item.name.endswith(".safetensors")]
    if not weights:
        raise StepError(
            f"No .safetensors object below {package.weights_uri}, the weights of {package.arn}.",
            RESTORE,
        )
    empty = [item.name for item in weights if item.bytes == 0]
    if empty:
        raise StepError(
            f"Empty weight files below {package.weights_uri}: {', '.join(empty)}.",
            AGAIN,
        )
    return objects


def verify_kernel(s3: Any, package: ModelPackage) -> dict[str, Any]:
    """Compare index.json and every library in S3 with the hashes that were registered.

    Returns:
        index.json of the kernel artifact.
    Raises:
        StepError: a hash differs, or an object is missing.
    """
    objects = {item.name: item for item in list_objects(s3, package.kernel_uri)}
    again = f"The kernel was changed after it was measured. {AGAIN}"
    index = json.loads(_read(s3, objects, "index.json", package.kernel_uri))
    registered = package.metadata.get("KernelSha256", "")
    hashes = {target: entry["sha256"] for target, entry in index.get("packages", {}).items()}
    if not index.get("sha256") == combined_sha256(hashes) == registered:
        raise StepError(
            f"Kernel hash differs: {package.kernel_uri.rstrip('/')}/index.json says {index.get('sha256')}, "
            f"its packages give {combined_sha256(hashes)}, "
            f"model package {package.arn} was registered with {registered or 'none'}.",
            again,
        )
    for target, expected in hashes.items():
        for name, sha in _kernel_files(s3, objects, target, expected, package.kernel_uri).items():
            actual = hashlib.sha256(_read(s3, objects, name, package.kernel_uri)).hexdigest()
            if actual != sha:
                raise StepError(
                    f"Kernel file {name} below {package.kernel_uri} has SHA-256 {actual}, "
                    f"its index says {sha}.",
                    again,
                )
    return index


def _kernel_files(
    s3: Any, objects: dict[str, S3Object], target: str, sha256: str, uri: str
) -> dict[str, str]:
    """What of a package runs, with the hashes it must have: a library, or each file that was installed."""
    if target != FLASH_MLA:
        return {f"{target}/{LIBRARY}": sha256}
    files = json.loads(_read(s3, objects, f"{target}/{MANIFEST}", uri))["files"]
    site = f"{target}/site/"
    added = {name for name in objects if name.startswith(site)} - {site + path for path in files}
    if combined_sha256(files) != sha256 or added:
        raise StepError(
            f"{uri.rstrip('/')}/{site} is not what its index says: its files give {combined_sha256(files)}, "
            f"expected {sha256}; added files: {', '.join(sorted(added)[:3]) or 'none'}.",
            f"The kernel was changed after it was measured. {AGAIN}",
        )
    return {site + path: sha for path, sha in files.items()}


def list_objects(s3: Any, uri: str) -> list[S3Object]:
    """Every object below the prefix `uri`, folders' placeholders left out."""
    bucket, prefix = aws.split_s3_uri(uri)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    with aws.explained(f"Listing {uri}", "Allow the job's role s3:ListBucket there."):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [
            S3Object(item["Key"].removeprefix(prefix), bucket, item["Key"], item["Size"])
            for page in pages
            for item in page.get("Contents", [])
            if not item["Key"].endswith("/")
        ]


def document(package: ModelPackage, weights: list[S3Object], kernel: dict[str, Any]) -> dict[str, Any]:
    """package.json: what was verified, for DeployProduction and RecordPromotion."""
    return {
        "schema_version": 1,
        "model_package_arn": package.arn,
        "model_package_group": package.group,
        "model_package_version": package.version,
        "approval_status": package.approval,
        "approval_description": package.approval_description,
        "image": package.image,
        "environment": package.environment,
        "customer_metadata": package.metadata,
        "weights": {
            "uri": package.weights_uri,
            "objects": len(weights),
            "bytes": sum(item.bytes for item in weights),
        },
        "kernel": {
            "uri": package.kernel_uri,
            "sha256": kernel["sha256"],
            "targets": sorted(kernel.get("packages", {})),
        },
        "verified": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(s3: Any, objects: dict[str, S3Object], name: str, uri: str) -> bytes:
    if name not in objects:
        raise StepError(
            f"{Path(name).name} is missing: no object {name} below {uri}.",
            RESTORE,
        )
    item = objects[name]
    try:
        return s3.get_object(Bucket=item.bucket, Key=item.key)["Body"].read()
    except ClientError as error:
        raise StepError(
            f"Reading s3://{item.bucket}/{item.key} failed: {error}.",
            "Allow the job's role s3:GetObject there.",
        ) from error


if __name__ == "__main__":
    run(main, arguments)
