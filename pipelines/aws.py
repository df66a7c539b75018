"""The one seam to AWS: boto3 clients made when first used, and service errors in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from boto3.session import Session

CREDENTIALS = (
    "set credentials (aws sso login, AWS_PROFILE), or run `mla-pipeline sandbox` and use --env local"
)


class Aws:
    """Clients of one region. AWS_ENDPOINT_URL decides, as for any boto3 program, whom they talk to."""

    def __init__(self, region: str) -> None:
        self.region = region

    @cached_property
    def session(self) -> Session:
        """The boto3 session."""
        import boto3

        return boto3.Session(region_name=self.region)

    @cached_property
    def sagemaker(self) -> Any:
        """Pipelines, packages, jobs, endpoints."""
        return self.session.client("sagemaker")

    @cached_property
    def runtime(self) -> Any:
        """Invoking endpoints."""
        return self.session.client("sagemaker-runtime")

    @cached_property
    def logs(self) -> Any:
        """CloudWatch Logs."""
        return self.session.client("logs")

    @cached_property
    def events(self) -> Any:
        """EventBridge."""
        return self.session.client("events")

    @cached_property
    def s3(self) -> Any:
        """Objects."""
        return self.session.client("s3")

    @cached_property
    def cloudformation(self) -> Any:
        """Stacks."""
        return self.session.client("cloudformation")

    @cached_property
    def cloudwatch(self) -> Any:
        """Alarms."""
        return self.session.client("cloudwatch")

    @cached_property
    def quotas(self) -> Any:
        """Service quotas."""
        return self.session.client("service-quotas")


def is_missing(error: Any) -> bool:
    """Whether a ClientError says that the resource does not exist; services spell it differently."""
    detail = error.response["Error"]
    return detail["Code"] in ("ResourceNotFound", "ResourceNotFoundException", "NoSuchKey", "404") or (
        detail["Code"] in ("ValidationException", "ValidationError")
        and any(
            words in detail["Message"].lower() for words in ("does not exist", "could not find", "not found")
        )
    )


def if_there(call: Callable[..., Any], **arguments: Any) -> Any:
    """The call's answer, None when what it asks for does not exist."""
    from botocore.exceptions import ClientError

    try:
        return call(**arguments)
    except ClientError as error:
        if is_missing(error):
            return None
        raise


def there(call: Callable[..., Any], none: UserError, **arguments: Any) -> Any:
    """The answer; raises `none` when what is asked for does not exist."""
    answer = if_there(call, **arguments)
    if answer is None:
        raise none
    return answer


@contextmanager
def explained() -> Iterator[None]:
    """Turns botocore's errors into UserErrors: what failed, where, what to do."""
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        detail = error.response["Error"]
        fix = {
            "AccessDeniedException": "grant the action to your identity",
            "AccessDenied": "grant the action to your identity",
            "ExpiredTokenException": CREDENTIALS,
            "UnrecognizedClientException": CREDENTIALS,
            "ThrottlingException": "try again in a minute",
        }.get(detail["Code"], "")
        raise UserError(f"{detail['Code']}: {detail['Message']}", error.operation_name, fix) from error
    except NoCredentialsError as error:
        raise UserError("no AWS credentials", "environment", CREDENTIALS) from error
    except ConnectionError as error:
        raise UserError(
            f"AWS is not reachable: {error}",
            "AWS_ENDPOINT_URL",
            "start `mla-pipeline sandbox`, or unset it for the real AWS",
        ) from error
    except BotoCoreError as error:
        raise UserError(str(error), type(error).__name__) from error
