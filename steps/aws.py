"""The one seam between the steps and AWS: clients, and service errors turned into StepError.

Nothing here knows whether AWS_ENDPOINT_URL points to the sandbox or is unset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoRegionError

from steps.job import StepError

# InvokeEndpoint answers within 60 s or not at all, and a silent retry would blur a measured latency.
_RUNTIME = Config(read_timeout=70, retries={"mode": "standard", "total_max_attempts": 1})
_CONTROL = Config(retries={"mode": "standard", "total_max_attempts": 6})


def client(service: str) -> Any:
    """A boto3 client of `service`. Raises StepError when no region is set."""
    try:
        return boto3.client(
            service,
            # SageMaker tells its containers AWS_REGION, which boto3 does not read.
            region_name=os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION"),
            config=_RUNTIME if service == "sagemaker-runtime" else _CONTROL,
        )
    except NoRegionError:
        raise StepError(
            f"No AWS region for {service}.", "Set AWS_DEFAULT_REGION in the step's Environment."
        ) from None


@contextmanager
def explained(
    action: str, fix: str = "Check the job's role and the names in the pipeline's parameters."
) -> Iterator[None]:
    """Turn an AWS error inside the block into "`action` failed: <code>: <message>" with `fix`."""
    try:
        yield
    except ClientError as error:
        detail = error.response.get("Error", {})
        raise StepError(f"{action} failed: {detail.get('Code')}: {detail.get('Message')}", fix) from error
    except BotoCoreError as error:  # no connection, no credentials, time-out, a request that fails validation
        raise StepError(f"{action} failed: {error}", fix) from error


def is_missing(error: ClientError) -> bool:
    """Whether a Describe call says that the thing does not exist (SageMaker answers ValidationException)."""
    detail = error.response.get("Error", {})
    message = detail.get("Message", "").lower()
    return detail.get("Code") in {"ValidationException", "ResourceNotFound"} and (
        "could not find" in message or "not found" in message or "does not exist" in message
    )


def already_exists(error: ClientError) -> bool:
    """Whether a Create call says that the name is taken."""
    return "already exist" in error.response.get("Error", {}).get("Message", "").lower()


def split_s3_uri(uri: str) -> tuple[str, str]:
    """ "s3://bucket/a/b" -> ("bucket", "a/b"). Raises StepError for anything else."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise StepError(f"'{uri}' is no S3 URI.", "Expected s3://bucket/prefix.")
    return bucket, key
