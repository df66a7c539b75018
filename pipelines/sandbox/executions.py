"""Pipeline executions: their records, and the actions that start, show, stop and retry them."""

from __future__ import annotations

import json
import logging
import random
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.sandbox.api import Account, created_within, now, ordered, page
from pipelines.sandbox.errors import conflict, invalid, not_emulated, not_found
from pipelines.sandbox.parameters import start_parameters
from pipelines.sandbox.pipelines import Pipelines

_log = logging.getLogger(__name__)
MAX_REASON = 1024


@dataclass
class StepState:
    """One step of one execution.

    Attributes:
        record: as ListPipelineExecutionSteps answers it.
        properties: what later steps may refer to, once it has succeeded.
        cache_key: what must be equal for a later execution to reuse it.
    """

    record: dict[str, Any]
    properties: Any = None
    cache_key: str | None = None

    @property
    def status(self) -> str:
        """Starting, Executing, Stopping, Stopped, Failed or Succeeded."""
        return self.record["StepStatus"]


@dataclass
class Execution:
    """One execution: what it runs, with which values, and how far it is.

    Attributes:
        record: as DescribePipelineExecution answers it.
        parameters: typed values; ``texts`` as the API lists them.
        steps: started steps by name, in the order they started.
    """

    record: dict[str, Any]
    definition: str
    parameters: dict[str, Any]
    texts: dict[str, str]
    steps: dict[str, StepState] = field(default_factory=dict)
    stop_wanted: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)
    attempt: int = 1

    @property
    def arn(self) -> str:
        """The execution's ARN."""
        return self.record["PipelineExecutionArn"]

    @property
    def identifier(self) -> str:
        """The last part of the ARN."""
        return self.arn.rsplit("/", 1)[-1]

    @property
    def status(self) -> str:
        """Executing, Stopping, Stopped, Failed, Succeeded or CompletedWithFailures."""
        return self.record["PipelineExecutionStatus"]


Run = Callable[[Execution], None]
Notify = Callable[[Execution, str], None]


class Executions:
    """The executions of the account.

    Args:
        run: runs an execution to its end, in a thread of its own (the interpreter).
        notify: called with the execution and its previous status after each change of status.
    """

    def __init__(self, account: Account, pipelines: Pipelines, run: Run, notify: Notify) -> None:
        self._account, self._pipelines, self._run, self._notify = account, pipelines, run, notify
        self._executions: dict[str, Execution] = {}
        self._tokens: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "StartPipelineExecution": self.start,
            "DescribePipelineExecution": self._describe,
            "ListPipelineExecutions": self._list,
            "ListPipelineExecutionSteps": self._list_steps,
            "ListPipelineParametersForExecution": self._list_parameters,
            "DescribePipelineDefinitionForExecution": self._describe_definition,
            "StopPipelineExecution": self.stop,
            "RetryPipelineExecution": self._retry,
            "UpdatePipelineExecution": self._update,
        }

    def start(self, params: dict[str, Any]) -> dict[str, Any]:
        """StartPipelineExecution; the same ClientRequestToken gives the same execution."""
        pipeline = self._pipelines.find(params["PipelineName"])
        if "SelectiveExecutionConfig" in params:
            raise not_emulated("selective execution", "Step caching (CacheConfig) is.")
        text = pipeline.definition(params.get("PipelineVersionId"))
        values, texts = start_parameters(json.loads(text), params.get("PipelineParameters", []))
        request = json.dumps([pipeline.arn, texts], sort_keys=True)
        with self._lock:
            known = self._tokens.get(params["ClientRequestToken"])
            if known and known[1] != request:
                raise invalid("ClientRequestToken was already used for a request with other parameters.")
            if known:
                return {"PipelineExecutionArn": known[0]}
            execution = self._new(pipeline.record, params, text, values, texts)
            self._executions[execution.arn] = execution
            self._tokens[params["ClientRequestToken"]] = (execution.arn, request)
            pipeline.record["LastRunTime"] = execution.record["CreationTime"]
        self._launch(execution, "")
        return {"PipelineExecutionArn": execution.arn}

    def stop(self, params: dict[str, Any]) -> dict[str, Any]:
        """StopPipelineExecution: running steps are stopped, no further one starts."""
        execution = self._find(params)
        with execution.changed:
            if execution.status != "Executing":
                raise conflict(
                    f"Pipeline execution '{execution.arn}' is in status {execution.status} and cannot be "
                    f"stopped."
                )
            self.set_status(execution, "Stopping")
            execution.stop_wanted.set()
            execution.changed.notify_all()
        return {"PipelineExecutionArn": execution.arn}

    def stop_all(self) -> None:
        """Stop whatever still runs (the sandbox is going down)."""
        for execution in list(self._executions.values()):
            with execution.changed:
                execution.stop_wanted.set()
                execution.changed.notify_all()

    def set_status(self, execution: Execution, status: str, reason: str | None = None) -> None:
        """Change the status, tell EventBridge."""
        previous = execution.status
        execution.record |= {"PipelineExecutionStatus": status, "LastModifiedTime": now()}
        execution.record.pop("FailureReason", None)
        if reason:
            execution.record["FailureReason"] = reason
        self._notify(execution, previous)

    def cached(
        self, execution: Execution, step: str, key: str, max_age_s: float
    ) -> tuple[str, StepState] | None:
        """The newest success of the same step with the same key in another execution of the pipeline."""
        best: tuple[str, StepState] | None = None
        for other in list(self._executions.values()):
            state = other.steps.get(step)
            if (
                other is execution
                or other.record["PipelineArn"] != execution.record["PipelineArn"]
                or state is None
            ):
                continue
            if state.cache_key != key or state.status != "Succeeded" or "CacheHitResult" in state.record:
                continue
            if now() - state.record["EndTime"] > max_age_s:
                continue
            if best is None or state.record["EndTime"] > best[1].record["EndTime"]:
                best = (other.arn, state)
        return best

    def _new(
        self,
        pipeline: dict[str, Any],
        params: dict[str, Any],
        text: str,
        values: dict[str, Any],
        texts: dict[str, str],
    ) -> Execution:
        time = now()
        identifier = "".join(random.choices(string.ascii_lowercase + string.digits, k=12))
        record = {
            "PipelineArn": pipeline["PipelineArn"],
            "PipelineExecutionArn": f"{pipeline['PipelineArn']}/execution/{identifier}",
            "PipelineExecutionDisplayName": params.get(
                "PipelineExecutionDisplayName", f"execution-{int(time * 1000)}"
            ),
            "PipelineExecutionStatus": "Executing",
            "CreationTime": time,
            "LastModifiedTime": time,
        }
        if "PipelineExecutionDescription" in params:
            record["PipelineExecutionDescription"] = params["PipelineExecutionDescription"]
        parallelism = params.get("ParallelismConfiguration", pipeline.get("ParallelismConfiguration"))
        if parallelism:
            record["ParallelismConfiguration"] = parallelism
        return Execution(record, text, values, texts)

    def _launch(self, execution: Execution, previous: str) -> None:
        self._notify(execution, previous)
        name = f"execution-{execution.identifier}"
        threading.Thread(target=self._run_guarded, args=(execution,), name=name, daemon=True).start()

    def _run_guarded(self, execution: Execution) -> None:
        try:
            self._run(execution)
        except Exception as error:  # a fault of the sandbox itself must still end the execution, and say so
            _log.exception("execution %s", execution.arn)
            reason = f"SandboxFault: {type(error).__name__}: {error}"
            self.set_status(execution, "Failed", reason)

    def _retry(self, params: dict[str, Any]) -> dict[str, Any]:
        execution = self._find(params)
        with execution.changed:
            if execution.status not in ("Failed", "Stopped", "CompletedWithFailures"):
                raise conflict(
                    f"Only failed or stopped executions can be retried; '{execution.arn}' is in status "
                    f"{execution.status}."
                )
            previous = execution.status
            for name in [n for n, s in execution.steps.items() if s.status != "Succeeded"]:
                del execution.steps[name]
            execution.stop_wanted.clear()
            execution.attempt += 1
            execution.record |= {"PipelineExecutionStatus": "Executing", "LastModifiedTime": now()}
            execution.record.pop("FailureReason", None)
            if "ParallelismConfiguration" in params:
                execution.record["ParallelismConfiguration"] = params["ParallelismConfiguration"]
        self._launch(execution, previous)
        return {"PipelineExecutionArn": execution.arn}

    def _update(self, params: dict[str, Any]) -> dict[str, Any]:
        execution = self._find(params)
        members = ("PipelineExecutionDescription", "PipelineExecutionDisplayName", "ParallelismConfiguration")
        execution.record |= {k: params[k] for k in members if k in params} | {"LastModifiedTime": now()}
        return {"PipelineExecutionArn": execution.arn}

    def _describe(self, params: dict[str, Any]) -> dict[str, Any]:
        return dict(self._find(params).record)

    def _describe_definition(self, params: dict[str, Any]) -> dict[str, Any]:
        execution = self._find(params)
        return {"PipelineDefinition": execution.definition, "CreationTime": execution.record["CreationTime"]}

    def _list_parameters(self, params: dict[str, Any]) -> dict[str, Any]:
        texts = self._find(params).texts
        return page([{"Name": k, "Value": v} for k, v in texts.items()], params, "PipelineParameters")

    def _list_steps(self, params: dict[str, Any]) -> dict[str, Any]:
        if "PipelineExecutionArn" not in params:
            raise invalid("PipelineExecutionArn must be given.")
        execution = self._find(params)
        with execution.changed:
            records = [dict(s.record) for s in execution.steps.values()]
        if (
            params.get("SortOrder", "Descending") == "Descending"
        ):  # newest first, as the service answers by default
            records.reverse()
        return page(records, params, "PipelineExecutionSteps")

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        pipeline = self._pipelines.find(params["PipelineName"])
        renamed = {"CreationTime": "StartTime", "FailureReason": "PipelineExecutionFailureReason"}
        members = (
            "PipelineExecutionArn",
            "CreationTime",
            "PipelineExecutionStatus",
            "PipelineExecutionDescription",
            "PipelineExecutionDisplayName",
            "FailureReason",
        )
        summaries = [
            {renamed.get(k, k): e.record[k] for k in members if k in e.record}
            for e in list(self._executions.values())
            if e.record["PipelineArn"] == pipeline.arn and created_within(e.record["CreationTime"], params)
        ]
        keys = {"CreationTime": "StartTime", "PipelineExecutionArn": "PipelineExecutionArn"}
        return page(ordered(summaries, params, keys, "CreationTime"), params, "PipelineExecutionSummaries")

    def _find(self, params: dict[str, Any]) -> Execution:
        arn = params["PipelineExecutionArn"]
        if arn not in self._executions:
            raise not_found(f"Pipeline execution with ARN '{arn}' does not exist.")
        return self._executions[arn]
