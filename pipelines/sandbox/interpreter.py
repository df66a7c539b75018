"""Runs a stored pipeline definition (version 2020-12-01): which step may start, and how it all ends."""

from __future__ import annotations

import datetime
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from pipelines.sandbox.api import now
from pipelines.sandbox.backends import Backends, NoSuchObject, parse_s3_uri
from pipelines.sandbox.caching import cache_key, parse_duration
from pipelines.sandbox.errors import ServiceError
from pipelines.sandbox.executions import MAX_REASON, Execution, Executions, StepState
from pipelines.sandbox.expressions import ExpressionError
from pipelines.sandbox.retries import Retries
from pipelines.sandbox.steps import Running, StepFailed, Steps
from pipelines.sandbox.validation import Node, graph

_log = logging.getLogger(__name__)
_TRIGGERED_BY = {
    "Completed": ("Succeeded",),
    "Failed": ("Failed",),
    "Stopped": ("Stopped",),
    "Any": ("Succeeded", "Failed", "Stopped"),
}
FAILED = "Step failure: One or multiple steps failed."


class ExecutionScope:
    """What the expressions of one execution see."""

    def __init__(self, execution: Execution, nodes: dict[str, Node], backends: Backends) -> None:
        self._execution, self._nodes, self._backends = execution, nodes, backends

    @property
    def parameters(self) -> dict[str, Any]:
        """The values of the pipeline's parameters."""
        return self._execution.parameters

    @property
    def execution(self) -> dict[str, Any]:
        """The execution variables."""
        record = self._execution.record
        return {
            "PipelineName": record["PipelineArn"].rsplit("/", 1)[-1],
            "PipelineArn": record["PipelineArn"],
            "PipelineExecutionId": self._execution.identifier,
            "PipelineExecutionArn": record["PipelineExecutionArn"],
            "StartDateTime": _iso(record["CreationTime"]),
            "CurrentDateTime": _iso(now()),
        }

    def properties(self, step: str) -> Any:
        """The properties of a step that has succeeded."""
        state = self._execution.steps.get(step)
        if state is None or state.status != "Succeeded":
            raise ExpressionError(f"step '{step}' has not succeeded, its properties do not exist")
        return state.properties

    def property_file(self, step: str, name: str) -> Any:
        """The JSON of a property file, read from the step's output in S3."""
        file = next(f for f in self._nodes[step].step["PropertyFiles"] if f["PropertyFileName"] == name)
        outputs = self.properties(step).get("ProcessingOutputConfig", {}).get("Outputs", [])
        output = next((o for o in outputs if o["OutputName"] == file["OutputName"]), None)
        if output is None:
            raise ExpressionError(
                f"property file '{name}': step '{step}' has no output '{file['OutputName']}'"
            )
        return self.json_object(f"{output['S3Output']['S3Uri'].rstrip('/')}/{file['FilePath']}")

    def json_object(self, s3_uri: str) -> Any:
        """The JSON of an S3 object."""
        try:
            return json.loads(self._backends.read_object(*parse_s3_uri(s3_uri)))
        except (NoSuchObject, ValueError) as error:
            raise ExpressionError(f"cannot read JSON from {s3_uri}: {error}") from None


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class Interpreter:
    """Runs one execution from its first step to its last.

    Args:
        steps: what a step of each type does.
        executions: where the status is kept and earlier executions are found.
        on_step: told of a step's type, record and previous status when it starts and when it ends.
        retry_scale: seconds that stand for one second of a retry policy.
    """

    def __init__(
        self,
        execution: Execution,
        steps: Steps,
        executions: Executions,
        backends: Backends,
        on_step: Callable[[Execution, str, dict[str, Any], str], None],
        retry_scale: float = 1.0,
    ) -> None:
        self._execution, self._steps, self._executions = execution, steps, executions
        self._on_step, self._retry_scale = on_step, retry_scale
        self._nodes = graph(json.loads(execution.definition))
        self._scope = ExecutionScope(execution, self._nodes, backends)
        self._running: dict[str, Running] = {}

    def run(self) -> None:
        """Run until nothing can start and nothing runs; sets the execution's final status."""
        execution = self._execution
        with execution.changed:
            while True:
                if execution.stop_wanted.is_set():
                    for running in self._running.values():
                        running.stop()
                else:
                    self._start_ready()
                if not self._running:
                    break
                execution.changed.wait()
            self._finish()

    def _start_ready(self) -> None:
        limit = self._execution.record.get("ParallelismConfiguration", {}).get(
            "MaxParallelExecutionSteps", 200
        )
        for name, node in self._nodes.items():
            if name in self._execution.steps or len(self._running) >= limit or not self._is_ready(node):
                continue
            record: dict[str, Any] = {
                "StepName": name,
                "StartTime": now(),
                "StepStatus": "Starting",
                "AttemptCount": self._execution.attempt,
            }
            for member in ("DisplayName", "Description"):
                if member in node.step:
                    record[f"Step{member}"] = node.step[member]
            state = self._execution.steps[name] = StepState(record)
            running = self._running[name] = Running(state, self._execution)
            self._on_step(self._execution, node.step["Type"], dict(record), "")
            thread_name = f"step-{name}-{self._execution.identifier}"
            threading.Thread(
                target=self._run_step, args=(node, running), name=thread_name, daemon=True
            ).start()

    def _is_ready(self, node: Node) -> bool:
        for upstream, trigger in node.depends.items():
            state = self._execution.steps.get(upstream)
            if state is None or state.status not in _TRIGGERED_BY[trigger]:
                return False
            if upstream == node.parent and state.properties["Outcome"] != str(node.branch):
                return False
        return True

    def _run_step(self, node: Node, running: Running) -> None:
        state, failure = running.state, None
        try:
            state.properties = self._from_cache(node, state) or self._try(node, running)
        except (StepFailed, ExpressionError) as error:
            failure = str(error)
        except ServiceError as error:
            failure = f"ClientError: {error.code}: {error.message}"
        except Exception as error:  # a fault of the sandbox itself must end the step, and say so
            failure = f"SandboxFault: {type(error).__name__}: {error}"
        with self._execution.changed:
            previous = state.status
            state.record["EndTime"] = now()
            if failure is None:
                state.record["StepStatus"] = "Succeeded"
            elif running.stopping:
                state.record["StepStatus"] = "Stopped"
            else:
                state.record |= {"StepStatus": "Failed", "FailureReason": failure[:MAX_REASON]}
            self._on_step(self._execution, node.step["Type"], dict(state.record), previous)
            del self._running[node.name]
            self._execution.changed.notify_all()

    def _try(self, node: Node, running: Running) -> Any:
        """Run the step, again and again while its retry policies say so; its properties."""
        retries = Retries(node.step, self._retry_scale)
        while True:
            try:
                return self._steps.run(node.step, self._scope, running)
            except StepFailed as failure:
                pause = None if running.stopping else retries.pause_s(failure.kind)
                if pause is None:
                    raise
                _log.info("step %s is tried again in %g s: %s", node.name, pause, failure)
                if self._execution.stop_wanted.wait(pause):
                    running.stopping = True
                    raise
                with self._execution.changed:
                    running.state.record["AttemptCount"] += 1

    def _from_cache(self, node: Node, state: StepState) -> Any:
        config = node.step.get("CacheConfig") or {}
        if not config.get("Enabled"):
            return None
        state.cache_key = cache_key(node.step, self._scope)
        age = parse_duration(config["ExpireAfter"]) if "ExpireAfter" in config else float("inf")
        hit = self._executions.cached(self._execution, node.name, state.cache_key, age)
        if hit is None:
            return None
        arn, earlier = hit
        state.record["CacheHitResult"] = {"SourcePipelineExecutionArn": arn}
        state.record["Metadata"] = earlier.record.get("Metadata", {})
        return earlier.properties

    def _finish(self) -> None:
        states = self._execution.steps
        failed = [name for name, state in states.items() if state.status == "Failed"]
        if self._execution.stop_wanted.is_set():
            self._executions.set_status(self._execution, "Stopped")
        elif failed:
            handled = all(self._was_handled(name) for name in failed)
            status = "CompletedWithFailures" if handled else "Failed"
            self._executions.set_status(self._execution, status, FAILED)
        else:
            self._executions.set_status(self._execution, "Succeeded")

    def _was_handled(self, failed: str) -> bool:
        return any(
            node.depends.get(failed) in ("Failed", "Any") and node.name in self._execution.steps
            for node in self._nodes.values()
        )
