"""A step's RetryPolicies: which failures are tried again, after how long, and until when.

Schema, exception types and what is retried without a policy, as in
https://docs.aws.amazon.com/sagemaker/latest/dg/pipelines-retry-policy.html; the pauses of the retries without
a policy are not documented.
"""

from __future__ import annotations

import math
import time
from typing import Any

from pipelines.sandbox.errors import ServiceError, unparsable

SERVICE_FAULT, THROTTLING = "Step.SERVICE_FAULT", "Step.THROTTLING"
JOB_INTERNAL_ERROR = "SageMaker.JOB_INTERNAL_ERROR"
CAPACITY_ERROR, RESOURCE_LIMIT = "SageMaker.CAPACITY_ERROR", "SageMaker.RESOURCE_LIMIT"
KINDS = (SERVICE_FAULT, THROTTLING, JOB_INTERNAL_ERROR, CAPACITY_ERROR, RESOURCE_LIMIT)
STEP_TYPES = ("Processing", "Model", "RegisterModel")  # of those that the sandbox runs
MAX_INTERVAL_S, MAX_ATTEMPTS, MAX_EXPIRY_MIN = 43_200, 20, 14_400
DEFAULT_ATTEMPTS = 5
_BY_ITSELF: dict[str, Any] = {"ExceptionType": [SERVICE_FAULT, THROTTLING]}
_THROTTLED = ("Throttling", "TooManyRequests")


def kind_of_error(error: ServiceError) -> str | None:
    """The exception type of a refused call, None for one that no policy names."""
    if error.code.startswith(_THROTTLED):
        return THROTTLING
    if error.code == "ResourceLimitExceeded":
        return RESOURCE_LIMIT
    return SERVICE_FAULT if error.status >= 500 else None


def kind_of_job_failure(reason: str) -> str | None:
    """The exception type of a failed job, by the first word of its FailureReason."""
    word = reason.partition(":")[0]
    return {
        "InternalServerError": JOB_INTERNAL_ERROR,
        "CapacityError": CAPACITY_ERROR,
        "ResourceLimitExceeded": RESOURCE_LIMIT,
    }.get(word)


class Retries:
    """The retries that one step has left.

    Args:
        step: of the definition.
        scale: seconds that stand for one of the policies' seconds.
    """

    def __init__(self, step: dict[str, Any], scale: float = 1.0) -> None:
        named = step.get("RetryPolicies") or []
        self._policies = [*named, _BY_ITSELF] if step["Type"] in STEP_TYPES else []
        self._done = [0] * len(self._policies)
        self._scale, self._begun = scale, time.monotonic()

    def pause_s(self, kind: str | None) -> float | None:
        """Seconds to wait before the step is tried again after such a failure; None when it stays failed."""
        for index, policy in enumerate(self._policies):
            if kind in policy["ExceptionType"]:
                return self._next(index, policy)
        return None

    def _next(self, index: int, policy: dict[str, Any]) -> float | None:
        done = self._done[index]
        expiry = policy.get("ExpireAfterMin")
        attempts = policy.get("MaxAttempts", DEFAULT_ATTEMPTS if expiry is None else math.inf)
        pause = policy.get("IntervalSeconds", 1) * policy.get("BackoffRate", 2.0) ** done * self._scale
        too_late = expiry is not None and self._elapsed() + pause > expiry * 60 * self._scale
        if done >= attempts or too_late:
            return None
        self._done[index] += 1
        return float(pause)

    def _elapsed(self) -> float:
        return time.monotonic() - self._begun


def check(step: dict[str, Any]) -> None:
    """Refuse policies that CreatePipeline refuses.

    Raises:
        ServiceError: ValidationException naming the step and the member.
    """
    policies = step.get("RetryPolicies")
    if policies is None:
        return
    where = f"Step '{step['Name']}'"
    if step["Type"] not in STEP_TYPES:
        raise unparsable(f"{where} of type {step['Type']} takes no RetryPolicies.")
    for policy in policies:
        kinds = policy.get("ExceptionType")
        if not isinstance(kinds, list) or not kinds or not set(kinds) <= set(KINDS):
            raise unparsable(f"{where}: ExceptionType of a retry policy must be some of {', '.join(KINDS)}.")
        if "MaxAttempts" in policy and "ExpireAfterMin" in policy:
            raise unparsable(f"{where}: a retry policy has MaxAttempts or ExpireAfterMin, not both.")
        for member, low, high in (
            ("IntervalSeconds", 0, MAX_INTERVAL_S),
            ("BackoffRate", 1, math.inf),
            ("MaxAttempts", 0, MAX_ATTEMPTS),
            ("ExpireAfterMin", 1, MAX_EXPIRY_MIN),
        ):
            value = policy.get(member, low)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise unparsable(
                    f"{where}: {member} of a retry policy must be {low} to {high}, not {value!r}."
                )
