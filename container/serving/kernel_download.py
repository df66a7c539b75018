"""The kernel artifact from S3, for endpoints that are given its address instead of a mounted folder."""

from __future__ import annotations

import logging
import time
from pathlib import Path, PurePosixPath

from kernels.package import KernelIndex, KernelPackageError

log = logging.getLogger(__name__)


class KernelDownloadError(RuntimeError):
    """The artifact cannot be fetched, or is not the one that was measured."""


def download_kernel(uri: str, folder: Path, sha256: str = "") -> KernelIndex:
    """Fetch every object below `uri` (s3://bucket/prefix) into `folder` and verify the artifact.

    sha256: of the index, as the release was evaluated with; "" compares the artifact with itself alone.
    Raises KernelDownloadError: not there, not allowed, or another hash.
    """
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    started = time.monotonic()
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/"
    try:
        s3 = boto3.client("s3")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [one["Key"] for page in pages for one in page.get("Contents", []) if one["Key"][-1] != "/"]
        for key in keys:
            path = folder / _relative(key.removeprefix(prefix), uri)
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, key, str(path))
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise KernelDownloadError(
            f"the kernel cannot be downloaded from {uri}: {error}; allow the endpoint's role "
            "s3:ListBucket and s3:GetObject there, and give its network a route to S3"
        ) from error
    if not keys:
        raise KernelDownloadError(f"no object lies below {uri}; restore the kernel, or release again")
    try:
        index = KernelIndex.load(folder)
    except KernelPackageError as error:
        raise KernelDownloadError(
            f"what lies at {uri} is no whole kernel: {error}; "
            "restore it (bucket versioning), or release again"
        ) from error
    if sha256 and index.sha256 != sha256:
        raise KernelDownloadError(
            f"the kernel at {uri} has sha256 {index.sha256}, the release was evaluated with {sha256}; "
            "restore it (bucket versioning), or release again"
        )
    log.info(
        "kernel %s: %d files from %s in %.1f s", index.sha256[:12], len(keys), uri, time.monotonic() - started
    )
    return index


def _relative(name: str, uri: str) -> PurePosixPath:
    """An object's place below the folder; a key may be any text."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise KernelDownloadError(f"object '{name}' below {uri} points outside; delete it, or release again")
    return path
