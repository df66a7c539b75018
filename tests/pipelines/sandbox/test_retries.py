"""Transient failures are tried again as a step's policies say, other failures are not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines.sandbox.errors import ServiceError
from pipelines.sandbox.retries import CAPACITY_ERROR, JOB_INTERNAL_ERROR, SERVICE_FAULT, THROTTLING, Retries
from tests.pipelines.sandbox.conftest import Aws

NO_CAPACITY = "CapacityError: Unable to provision requested ML compute capacity."
INTERNAL = "InternalServerError: We encountered an internal error. Please try again."


def policy(*kinds: str, **limits: float) -> dict[str, Any]:
    return {"ExceptionType": list(kinds), **limits}


def step(*policies: dict[str, Any], kind: str = "Processing") -> dict[str, Any]:
    return {"Name": "S", "Type": kind, "RetryPolicies": list(policies)}


def test_pauses_grow_by_the_backoff_until_the_attempts_are_used_up() -> None:
    left = Retries(step(policy(THROTTLING, IntervalSeconds=10, BackoffRate=3, MaxAttempts=3)))
    assert [left.pause_s(THROTTLING) for _ in range(4)] == [10, 30, 90, None]


def test_each_exception_type_has_the_policy_that_names_it() -> None:
    left = Retries(
        step(
            policy(CAPACITY_ERROR, MaxAttempts=1, IntervalSeconds=7),
            policy(JOB_INTERNAL_ERROR, MaxAttempts=0),
        )
    )
    assert left.pause_s(CAPACITY_ERROR) == 7
    assert left.pause_s(CAPACITY_ERROR) is None
    assert left.pause_s(JOB_INTERNAL_ERROR) is None
    assert left.pause_s(None) is None


def test_a_retry_that_would_come_after_the_expiry_does_not_come() -> None:
    left = Retries(step(policy(CAPACITY_ERROR, IntervalSeconds=20, BackoffRate=2, ExpireAfterMin=1)))
    assert [left.pause_s(CAPACITY_ERROR) for _ in range(3)] == [20, 40, None]


def test_faults_of_the_service_are_tried_again_without_a_policy_where_the_step_can_be() -> None:
    assert Retries(step()).pause_s(SERVICE_FAULT) == 1
    assert Retries(step()).pause_s(CAPACITY_ERROR) is None
    assert Retries({"Name": "S", "Type": "Endpoint"}).pause_s(SERVICE_FAULT) is None


@pytest.fixture
def policies(definitions: dict[str, str]) -> list[dict[str, Any]]:
    """What the rendered pipelines carry."""
    found = json.loads(definitions["production"])["Steps"][0]["RetryPolicies"]
    assert {kind for one in found for kind in one["ExceptionType"]} == {
        SERVICE_FAULT,
        THROTTLING,
        JOB_INTERNAL_ERROR,
        CAPACITY_ERROR,
    }
    return list(found)


@pytest.mark.parametrize("reason", [NO_CAPACITY, INTERNAL])
def test_a_job_without_a_machine_is_tried_again_by_the_pipelines_policies(
    aws: Aws, name: str, policies: list[dict[str, Any]], reason: str
) -> None:
    aws.create(name, [aws.script("Work", "print(1)", RetryPolicies=policies)])
    aws.sandbox.faults.fail_jobs(reason, times=2)
    ended, steps = aws.run(name)
    assert ended["PipelineExecutionStatus"] == "Succeeded"
    assert steps["Work"]["AttemptCount"] == 3
    jobs = aws.sagemaker.list_processing_jobs(NameContains=ended["PipelineExecutionArn"].rsplit("/", 1)[-1])
    states = sorted(one["ProcessingJobStatus"] for one in jobs["ProcessingJobSummaries"])
    assert states == ["Completed", "Failed", "Failed"]  # every attempt is a job of its own


@pytest.mark.parametrize(
    "error",
    [
        ServiceError("ThrottlingException", "Rate exceeded"),
        ServiceError("InternalFailure", "An error occurred", 500),
    ],
    ids=["throttled", "fault"],
)
def test_a_refused_call_is_made_again(
    aws: Aws, name: str, policies: list[dict[str, Any]], error: ServiceError
) -> None:
    aws.create(name, [aws.script("Work", "print(1)", RetryPolicies=policies)])
    aws.sandbox.faults.refuse("CreateProcessingJob", error, times=5)
    ended, steps = aws.run(name)
    assert ended["PipelineExecutionStatus"] == "Succeeded"
    assert steps["Work"]["AttemptCount"] == 6


def test_a_fault_that_stays_fails_the_step_with_its_reason(
    aws: Aws, name: str, policies: list[dict[str, Any]]
) -> None:
    aws.create(name, [aws.script("Work", "print(1)", RetryPolicies=policies)])
    aws.sandbox.faults.throttle("CreateProcessingJob", times=6)
    ended, steps = aws.run(name)
    assert ended["PipelineExecutionStatus"] == "Failed"
    assert "Rate exceeded" in steps["Work"]["FailureReason"]
    assert steps["Work"]["AttemptCount"] == 6


def test_the_jobs_own_failure_is_an_answer_and_a_quota_is_one_too(
    aws: Aws, name: str, policies: list[dict[str, Any]]
) -> None:
    aws.create(name, [aws.script("Work", "raise SystemExit(3)", RetryPolicies=policies)])
    _, steps = aws.run(name)
    assert steps["Work"]["FailureReason"].startswith("AlgorithmError")
    assert steps["Work"]["AttemptCount"] == 1
    quota = ServiceError("ResourceLimitExceeded", "The account-level service limit is 0 Instances")
    aws.sandbox.faults.refuse("CreateProcessingJob", quota)
    _, steps = aws.run(name)
    assert "account-level service limit" in steps["Work"]["FailureReason"]
    assert steps["Work"]["AttemptCount"] == 1


def test_a_stop_ends_the_waiting_for_a_retry(aws: Aws, name: str) -> None:
    patient = [policy(CAPACITY_ERROR, IntervalSeconds=43_200, BackoffRate=1, ExpireAfterMin=14_400)]
    aws.create(name, [aws.script("Work", "print(1)", RetryPolicies=patient)])
    aws.sandbox.faults.fail_jobs(NO_CAPACITY)
    execution = aws.start(name)
    time.sleep(1)
    assert aws.steps(execution)["Work"]["StepStatus"] == "Executing"
    aws.sagemaker.stop_pipeline_execution(PipelineExecutionArn=execution)
    assert aws.wait(execution, 10)["PipelineExecutionStatus"] == "Stopped"
    assert aws.steps(execution)["Work"]["StepStatus"] == "Stopped"


def test_clients_outside_are_throttled_as_well(aws: Aws) -> None:
    aws.sandbox.faults.throttle("ListPipelines")
    with pytest.raises(ClientError, match="ThrottlingException"):
        aws.sagemaker.list_pipelines()
    aws.sagemaker.list_pipelines()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (policy("Step.THROTLING"), "ExceptionType of a retry policy must be some of"),
        (policy(), "ExceptionType of a retry policy"),
        (policy(THROTTLING, MaxAttempts=3, ExpireAfterMin=3), "not both"),
        (policy(THROTTLING, MaxAttempts=21), "MaxAttempts of a retry policy must be 0 to 20"),
        (policy(THROTTLING, IntervalSeconds=43_201), "IntervalSeconds of a retry policy"),
        (policy(THROTTLING, BackoffRate=0.5), "BackoffRate of a retry policy"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_policy_that_the_service_refuses_is_refused(
    aws: Aws, name: str, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ClientError, match=words):
        aws.create(name, [aws.script("Work", "print(1)", RetryPolicies=[wrong])])


def test_a_condition_takes_no_policies(aws: Aws, name: str) -> None:
    fail = {"Name": "F", "Type": "Fail", "Arguments": {"ErrorMessage": "x"}}
    with pytest.raises(ClientError, match="of type Fail takes no RetryPolicies"):
        aws.create(name, [{**fail, "RetryPolicies": [policy(THROTTLING)]}])
