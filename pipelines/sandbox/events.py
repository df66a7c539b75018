"""EventBridge: SageMaker's own events and PutEvents, matched with moto's rules, sent to their targets."""

from __future__ import annotations

import datetime
import json
import logging
import queue
import threading
import uuid
from collections.abc import Callable
from typing import Any

from pipelines.sandbox.api import Account
from pipelines.sandbox.backends import Backends
from pipelines.sandbox.errors import ServiceError, invalid, not_emulated
from pipelines.sandbox.expressions import ExpressionError, lookup, parse_path

_log = logging.getLogger(__name__)
StartPipeline = Callable[[dict[str, Any]], dict[str, Any]]
MAX_ENTRIES = 10


class Events:
    """The event bus.

    Args:
        start_pipeline: answers StartPipelineExecution.

    Attributes:
        copies: how often each event is delivered. EventBridge promises "at least once" and SageMaker itself
            sends several events for one change; 2 shows whether a pipeline is idempotent.
    """

    def __init__(self, account: Account, backends: Backends, start_pipeline: StartPipeline) -> None:
        self._account, self._backends, self._start_pipeline = account, backends, start_pipeline
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue()
        self.copies = 1
        self._thread = threading.Thread(target=self._deliver_all, name="sandbox-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver what is queued, then stop."""
        self._queue.put(None)
        self._thread.join(2.0)

    def emit(self, detail_type: str, detail: dict[str, Any], *resources: str) -> None:
        """Publish an event of SageMaker itself; delivery happens in the background, as on AWS."""
        self._queue.put(("default", self._event("aws.sagemaker", detail_type, detail, list(resources))))

    def put_events(self, params: dict[str, Any]) -> dict[str, Any]:
        """events:PutEvents.

        Raises:
            ServiceError: ValidationException, too many entries.
        """
        entries = params.get("Entries", [])
        if not 1 <= len(entries) <= MAX_ENTRIES:
            raise invalid(f"Entries must hold 1 to {MAX_ENTRIES} events, not {len(entries)}.")
        answers = [self._put(entry) for entry in entries]
        return {"FailedEntryCount": sum("ErrorCode" in a for a in answers), "Entries": answers}

    def _put(self, entry: dict[str, Any]) -> dict[str, Any]:
        for member in ("Source", "DetailType", "Detail"):
            if not entry.get(member):
                reason = f"Parameter {member} is not valid. Reason: {member} is a required argument."
                return {"ErrorCode": "InvalidArgument", "ErrorMessage": reason}
        try:
            detail = json.loads(entry["Detail"])
        except json.JSONDecodeError:
            return {"ErrorCode": "MalformedDetail", "ErrorMessage": "Detail is malformed."}
        event = self._event(entry["Source"], entry["DetailType"], detail, entry.get("Resources", []))
        bus = entry.get("EventBusName", "default").rsplit("/", 1)[-1]
        self._queue.put((bus, event))
        return {"EventId": event["id"]}

    def _event(self, source: str, detail_type: str, detail: Any, resources: list[str]) -> dict[str, Any]:
        return {
            "version": "0",
            "id": str(uuid.uuid4()),
            "detail-type": detail_type,
            "source": source,
            "account": self._account.account_id,
            "time": iso_time(datetime.datetime.now(datetime.UTC).timestamp()),
            "region": self._account.region,
            "resources": resources,
            "detail": detail,
        }

    def _deliver_all(self) -> None:
        while (item := self._queue.get()) is not None:
            bus, event = item
            for _ in range(self.copies):
                for rule in self._backends.event_rules(bus):
                    if rule.event_pattern.get_pattern() and rule.event_pattern.matches_event(event):
                        for target in rule.targets:
                            self._send(rule.name, target, event)

    def tick(self, rule: str) -> None:
        """Let a scheduled rule of the default bus fire now; none fires by itself here.

        Raises:
            LookupError: no enabled rule of this name has a schedule.
        """
        for one in self._backends.event_rules():
            if one.name == rule and one.scheduled_expression:
                for target in one.targets:
                    self._send(rule, target, self._event("aws.events", "Scheduled Event", {}, [one.arn]))
                return
        raise LookupError(f"no enabled rule '{rule}' with a schedule")

    def _send(self, rule: str, target: dict[str, Any], event: dict[str, Any]) -> None:
        """One event to one target; on AWS a failure is seen in metrics only, here it is logged as well."""
        arn = target["Arn"]
        try:
            service = arn.split(":")[2]
            if service == "sagemaker":
                self._to_pipeline(arn, target.get("SageMakerPipelineParameters", {}), event)
            elif service in ("sns", "sqs", "logs"):
                group = target.get("SqsParameters", {}).get("MessageGroupId")
                self._backends.deliver(service, arn, _message(target, event), group)
            else:
                raise not_emulated(f"EventBridge targets of the service '{service}'")
        except (ServiceError, ExpressionError) as error:
            _log.warning("rule %s could not deliver event %s to %s: %s", rule, event["id"], arn, error)
            queue_arn = target.get("DeadLetterConfig", {}).get("Arn")
            if queue_arn:
                self._backends.deliver("sqs", queue_arn, json.dumps(event))

    def _to_pipeline(self, arn: str, parameters: dict[str, Any], event: dict[str, Any]) -> None:
        given = [
            {"Name": p["Name"], "Value": _value(p["Value"], event)}
            for p in parameters.get("PipelineParameterList", [])
        ]
        request = {"PipelineName": arn, "PipelineParameters": given, "ClientRequestToken": str(uuid.uuid4())}
        self._start_pipeline(request)


def _value(text: str, event: dict[str, Any]) -> str:
    """A parameter's value: one whole JSON path into the event, or the text itself."""
    if not text.startswith("$."):
        return text
    found = lookup(event, parse_path(text), text)
    return found if isinstance(found, str) else json.dumps(found)


def _message(target: dict[str, Any], event: dict[str, Any]) -> str:
    """What a target gets: the event, or what its Input, InputPath or InputTransformer makes of it."""
    if "Input" in target:
        return str(target["Input"])
    if "InputPath" in target:
        return json.dumps(lookup(event, parse_path(target["InputPath"]), target["InputPath"]))
    if "InputTransformer" not in target:
        return json.dumps(event)
    transformer = target["InputTransformer"]
    paths = transformer.get("InputPathsMap", {})
    values = {name: _or_empty(event, path) for name, path in paths.items()}
    parts = transformer["InputTemplate"].split('"')
    for i, part in enumerate(
        parts
    ):  # odd parts lie between quotes: there a value is text, elsewhere it is JSON
        for name, value in values.items():
            as_json = json.dumps(value)
            inside = json.dumps(value if isinstance(value, str) else as_json)[1:-1]
            part = part.replace(f"<{name}>", inside if i % 2 else as_json)
        parts[i] = part
    text = '"'.join(parts)
    return str(json.loads(text)) if text.startswith('"') else text


def _or_empty(event: dict[str, Any], path: str) -> Any:
    """What the path leads to; a transformer takes one that leads nowhere as an empty text."""
    try:
        return lookup(event, parse_path(path), path)
    except ExpressionError:
        return ""


def iso_time(seconds: float) -> str:
    """2026-01-31T12:00:00Z, the format of times in events."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def model_package_event(record: dict[str, Any]) -> dict[str, Any]:
    """Detail of ``SageMaker Model Package State Change``.

    Members as in https://docs.aws.amazon.com/sagemaker/latest/dg/automating-sagemaker-with-eventbridge.html
    """
    members = (
        "ModelPackageGroupName",
        "ModelPackageVersion",
        "ModelPackageArn",
        "ModelPackageDescription",
        "InferenceSpecification",
        "ModelPackageStatus",
        "ModelPackageStatusDetails",
        "ModelApprovalStatus",
        "ApprovalDescription",
        "CustomerMetadataProperties",
        "ModelMetrics",
    )
    times = {k: iso_time(record[k]) for k in ("CreationTime", "LastModifiedTime")}
    return {k: record[k] for k in members if k in record} | times


def execution_event(record: dict[str, Any], previous: str) -> dict[str, Any]:
    """Detail of ``SageMaker Model Building Pipeline Execution Status Change``."""
    detail = {
        "pipelineExecutionDescription": record.get("PipelineExecutionDescription", ""),
        "pipelineExecutionDisplayName": record["PipelineExecutionDisplayName"],
        "currentPipelineExecutionStatus": record["PipelineExecutionStatus"],
        "previousPipelineExecutionStatus": previous or None,
        "executionStartTime": iso_time(record["CreationTime"]),
        "pipelineArn": record["PipelineArn"],
        "pipelineExecutionArn": record["PipelineExecutionArn"],
    }
    if record["PipelineExecutionStatus"] not in ("Executing", "Stopping"):
        detail["executionEndTime"] = iso_time(record["LastModifiedTime"])
    return detail


def step_event(execution: dict[str, Any], kind: str, step: dict[str, Any], previous: str) -> dict[str, Any]:
    """Detail of ``SageMaker Model Building Pipeline Execution Step Status Change``.

    Members as in the page above: `failureReason` is there when `currentStepStatus` is Failed, and
    `cacheHitResult` when the step's result was found in the cache.
    """
    metadata = {_lower(k): {_lower(m): v for m, v in d.items()} for k, d in step.get("Metadata", {}).items()}
    detail = {
        "metadata": metadata,
        "stepName": step["StepName"],
        "stepType": kind,
        "stepStartTime": iso_time(step["StartTime"]),
        "previousStepStatus": previous or None,
        "currentStepStatus": step["StepStatus"],
        "pipelineArn": execution["PipelineArn"],
        "pipelineExecutionArn": execution["PipelineExecutionArn"],
    }
    if "EndTime" in step:
        detail["stepEndTime"] = iso_time(step["EndTime"])
    if "CacheHitResult" in step:
        detail["cacheHitResult"] = {_lower(k): v for k, v in step["CacheHitResult"].items()}
    if "FailureReason" in step:
        detail["failureReason"] = step["FailureReason"]
    return detail


def _lower(name: str) -> str:
    return name[:1].lower() + name[1:]


def endpoint_event(description: dict[str, Any]) -> dict[str, Any]:
    """Detail of ``SageMaker Endpoint State Change``: status in upper case, times in milliseconds."""
    words = "".join(f"_{c}" if c.isupper() else c for c in description["EndpointStatus"]).strip("_").upper()
    times = {k: int(description[k] * 1000) for k in ("CreationTime", "LastModifiedTime")}
    members = ("EndpointName", "EndpointArn", "EndpointConfigName", "FailureReason")
    return {k: description[k] for k in members if k in description} | times | {"EndpointStatus": words}
