"""What a step of each type does: one SageMaker call, waited for."""

from __future__ import annotations

import contextlib
import random
import string
from collections.abc import Callable
from typing import Any

from pipelines.sandbox.api import Api
from pipelines.sandbox.errors import ServiceError
from pipelines.sandbox.executions import Execution, StepState
from pipelines.sandbox.expressions import Scope, evaluate, resolve
from pipelines.sandbox.retries import kind_of_error, kind_of_job_failure

_NAME_MEMBERS = {
    "Processing": "ProcessingJobName",
    "Model": "ModelName",
    "EndpointConfig": "EndpointConfigName",
}
MAX_NAME = 63


class StepFailed(Exception):
    """Why a step failed: its FailureReason, and the exception type by which a retry policy knows it."""

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind


class Running:
    """A step that runs: where it reports to and how it is stopped.

    Attributes:
        stopping: whether someone asked it to stop.
    """

    def __init__(self, state: StepState, execution: Execution) -> None:
        self.state, self.execution = state, execution
        self.stopping = False
        self._stop: Callable[[], Any] | None = None

    def stop(self) -> None:
        """Stop what the step waits for; the caller holds the execution's lock."""
        if not self.stopping:
            self.stopping = True
            self.state.record["StepStatus"] = "Stopping"
            if self._stop:
                self._stop()

    def executing(self, stop: Callable[[], Any] | None = None, **metadata: Any) -> None:
        """The step's call was accepted: publish its metadata and how to stop it."""
        with self.execution.changed:
            self.state.record["Metadata"] = metadata
            self._stop = stop
            if not self.stopping:
                self.state.record["StepStatus"] = "Executing"
            elif stop:
                stop()


class Steps:
    """Runs steps through the emulated API.

    Args:
        wait_for_job: blocks until a processing job has ended; its Describe answer.
        wait_for_endpoint: the same for an endpoint that is being created or updated.
    """

    def __init__(
        self,
        api: Api,
        wait_for_job: Callable[[str], dict[str, Any]],
        wait_for_endpoint: Callable[[str], dict[str, Any]] | None = None,
    ) -> None:
        self._api, self._wait_for_job, self._wait_for_endpoint = api, wait_for_job, wait_for_endpoint
        self._kinds: dict[str, Callable[[dict[str, Any], Scope, Running], Any]] = {
            "Processing": self._processing,
            "Condition": self._condition,
            "Fail": self._fail,
            "Model": self._model,
            "RegisterModel": self._register_model,
            "EndpointConfig": self._endpoint_config,
            "Endpoint": self._endpoint,
        }

    def run(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        """Run a step to its end; returns its properties.

        Raises:
            StepFailed: it failed; the text is its FailureReason.
            ExpressionError: its arguments cannot be resolved.
        """
        return self._kinds[step["Type"]](step, scope, running)

    def _processing(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        request = self._request(step, scope, running)
        name = request["ProcessingJobName"]
        arn = self._call("CreateProcessingJob", request)["ProcessingJobArn"]
        running.executing(lambda: self._stop_job(name), ProcessingJob={"Arn": arn})
        job = self._wait_for_job(name)
        if job["ProcessingJobStatus"] != "Completed":
            reason = job.get("FailureReason", f"ClientError: The job was {job['ProcessingJobStatus']}.")
            raise StepFailed(reason, kind_of_job_failure(reason))
        return job

    def _stop_job(self, name: str) -> None:
        with contextlib.suppress(ServiceError):  # it may have ended by itself meanwhile
            self._api.call("StopProcessingJob", {"ProcessingJobName": name})

    def _condition(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        outcome = str(all(evaluate(c, scope) for c in step["Arguments"]["Conditions"]))
        running.executing(Condition={"Outcome": outcome})
        return {"Outcome": outcome}

    def _fail(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        message = str(resolve(step["Arguments"]["ErrorMessage"], scope))
        running.executing(Fail={"ErrorMessage": message})
        raise StepFailed(message)

    def _model(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        request = self._request(step, scope, running)
        arn = self._call("CreateModel", request)["ModelArn"]
        running.executing(Model={"Arn": arn})
        return self._api.call("DescribeModel", {"ModelName": request["ModelName"]})

    def _register_model(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        request = self._request(step, scope, running)
        arn = self._call("CreateModelPackage", request)["ModelPackageArn"]
        running.executing(RegisterModel={"Arn": arn})
        return self._api.call("DescribeModelPackage", {"ModelPackageName": arn})

    def _endpoint_config(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        request = self._request(step, scope, running)
        arn = self._call("CreateEndpointConfig", request)["EndpointConfigArn"]
        running.executing(EndpointConfig={"Arn": arn})
        return self._api.call("DescribeEndpointConfig", {"EndpointConfigName": request["EndpointConfigName"]})

    def _endpoint(self, step: dict[str, Any], scope: Scope, running: Running) -> Any:
        """Create the endpoint, or update it when there is one already."""
        request = self._request(step, scope, running)
        name = request["EndpointName"]
        try:
            self._api.call("DescribeEndpoint", {"EndpointName": name})
            action = "UpdateEndpoint"
            request.pop("Tags", None)  # UpdateEndpoint takes none
        except ServiceError:
            action = "CreateEndpoint"
        arn = self._call(action, request)["EndpointArn"]
        running.executing(Endpoint={"Arn": arn})
        assert self._wait_for_endpoint
        endpoint = self._wait_for_endpoint(name)
        wanted = request["EndpointConfigName"]
        if endpoint["EndpointStatus"] != "InService" or endpoint["EndpointConfigName"] != wanted:
            raise StepFailed(endpoint.get("FailureReason", f"ClientError: {name} does not run {wanted}."))
        return endpoint

    def _request(self, step: dict[str, Any], scope: Scope, running: Running) -> dict[str, Any]:
        request = resolve(step["Arguments"], scope)
        member = _NAME_MEMBERS.get(step["Type"])
        if member and member not in request:
            request[member] = _resource_name(step["Name"], running.execution)
        return request

    def _call(self, action: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._api.call(action, request)
        except ServiceError as error:
            reason = f"ClientError: Failed to invoke sagemaker:{action}. Error Details: {error.message}"
            raise StepFailed(reason, kind_of_error(error)) from None


def _resource_name(step: str, execution: Execution) -> str:
    """``pipelines-<execution>-<step>-<random>``, as the service names what its steps make."""
    tail = "".join(random.choices(string.ascii_letters + string.digits, k=10))
    head = f"pipelines-{execution.identifier}-"
    return f"{head}{step[: MAX_NAME - len(head) - 11].strip('-').replace('_', '-')}-{tail}"
