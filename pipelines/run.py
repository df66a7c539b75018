"""`mla-pipeline run`: the whole chain on one machine, from an MLflow model to a production endpoint.

Everything it does after starting the two servers goes through boto3, as it would against AWS.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import service, upsert, versions
from pipelines.aws import Aws
from pipelines.display import Display
from pipelines.errors import UserError
from pipelines.local import Local, end, leashed
from pipelines.service import Execution
from pipelines.settings import Settings

DEMO, ALIAS = "mla-demo", "champion"
TRAINER = Path(__file__).resolve().parent.parent / "examples" / "train_and_log.py"
POLL_SECONDS = 0.25
EVENT_SECONDS = 30.0  # from an approval to the execution it starts
EXECUTION_SECONDS = 1800.0


class ReleaseFailed(UserError):
    """The release or the production pipeline ended without success; the message is the service's reason."""


@dataclass
class Summary:
    """What a run ended with; written to runs/<id>/summary.json."""

    release: str
    status: str
    failure: str = ""
    staging_endpoint: str = ""
    model_package_arn: str = ""
    approval: str = ""
    production: str = ""
    production_endpoint: str = ""
    sentence: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    report: str = ""


def run(
    local: Local,
    display: Display,
    values: Mapping[str, str] | None = None,
    decide: Callable[[versions.Package], str] = lambda package: "Approved",
) -> Summary:
    """Train if need be, upsert, release, decide, follow production, ask the endpoint; see the module.

    values: release parameters by name. decide: gives Approved, Rejected or "" (leave it pending).
    Raises ReleaseFailed when a pipeline does not succeed, after its report was saved.
    """
    started = time.monotonic()
    values = dict(values or {})
    settings, aws = local.settings, Aws(local.settings.region)
    with ThreadPoolExecutor(max_workers=1) as background:
        rendered = background.submit(
            upsert.render, settings
        )  # the SDK's import takes as long as MLflow's start
        with display.phase("MLflow server and AWS sandbox"):
            local.mlflow.wait_until_healthy()
        ensure_demo_model(local, settings, values, display)
        with display.phase("pipelines and approval rule"):
            _upsert(aws, settings, rendered)
    summary, package = release(aws, settings, local.state, values, display)
    if package:
        promote(aws, settings, package, decide, summary, display)
    summary.seconds["total"] = time.monotonic() - started
    _save(local.state, summary)
    if summary.status != "Succeeded":
        where = f"execution {summary.production or summary.release}"
        raise ReleaseFailed(summary.failure, where, f"report: {summary.report}" if summary.report else "")
    return summary


def ensure_demo_model(local: Local, settings: Settings, values: Mapping[str, str], display: Display) -> None:
    """Train, log and register the demo model when it is asked for and the registry lacks it."""
    uri = values.get("ModelUri", settings.parameters.release["ModelUri"])
    if uri != f"models:/{DEMO}@{ALIAS}" or local.mlflow.has_alias(DEMO, ALIAS):
        return
    with display.phase(f"training the demo model {DEMO}"):
        train_demo(local)


def train_demo(local: Local, *options: str) -> None:
    """Run examples/train_and_log.py against the local MLflow server. Raises UserError with its last line."""
    log = local.state / "train.log"
    variables = {"MLFLOW_TRACKING_URI": local.mlflow.uri, "MLFLOW_REGISTRY_URI": local.mlflow.uri}
    command = [sys.executable, str(TRAINER), "--registered-model-name", DEMO, *options]
    process = leashed(command, {**os.environ, **variables}, log)
    try:
        status = process.wait()
    finally:
        end(process)
    if status:
        words = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"training failed: {words[-1]}", str(log), "read the log")


def release(
    aws: Aws, settings: Settings, state: Path, values: Mapping[str, str], display: Display
) -> tuple[Summary, versions.Package | None]:
    """Start the release pipeline and follow it; the package is None unless it succeeded."""
    arn = service.start(aws, settings.names.release_pipeline, values)
    display.note(f"release   {arn.rsplit('/', 1)[-1]}")
    ended = display.follow(service.watch(aws, arn, POLL_SECONDS, EXECUTION_SECONDS))
    summary = Summary(
        release=ended.id, status=ended.status, failure=service.reason(ended), seconds=_seconds(ended)
    )
    if any(step.name == "Evaluate" and step.status == "Succeeded" for step in ended.steps):
        service.report(aws, arn, state / "runs" / ended.id)
        summary.report = str(state / "runs" / ended.id / "report.html")
    if ended.status != "Succeeded":
        return summary, None
    package = versions.package(aws, ended.step("RegisterModel").resource)
    summary.model_package_arn = package.arn
    summary.staging_endpoint = str(
        values.get("StagingEndpointName", settings.parameters.release["StagingEndpointName"])
    )
    return summary, package


def promote(
    aws: Aws,
    settings: Settings,
    package: versions.Package,
    decide: Callable[[versions.Package], str],
    summary: Summary,
    display: Display,
) -> None:
    """Ask for the decision, make it, and follow the production pipeline that it starts."""
    summary.approval = package.status if package.status != "PendingManualApproval" else decide(package)
    if package.status == "PendingManualApproval" and summary.approval:
        versions.decide(aws, package.arn, summary.approval, "decided in `mla-pipeline run`")
    if summary.approval != "Approved":
        summary.approval = summary.approval or package.status
        return
    pipeline = settings.names.production_pipeline
    arn = service.started_for(aws, pipeline, package.arn, EVENT_SECONDS)
    display.note(f"production {arn.rsplit('/', 1)[-1]}, started by the approval of version {package.version}")
    ended = display.follow(service.watch(aws, arn, POLL_SECONDS, EXECUTION_SECONDS))
    summary.production, summary.status, summary.failure = ended.id, ended.status, service.reason(ended)
    summary.seconds |= _seconds(ended)
    if ended.status != "Succeeded":
        return
    summary.production_endpoint = str(settings.parameters.production["ProductionEndpointName"])
    prompt = _prompt(summary)
    answer = service.invoke(aws, summary.production_endpoint, prompt, 48)
    summary.sentence = prompt + answer["choices"][0]["text"]


def _upsert(aws: Aws, settings: Settings, rendered: Future[dict[str, Any]]) -> None:
    upsert.execute(upsert.plan(aws, settings, rendered.result()))


def _seconds(execution: Execution) -> dict[str, float]:
    return {step.name: round(step.seconds, 2) for step in execution.steps if step.seconds is not None}


def _prompt(summary: Summary) -> str:
    evaluation = json.loads(Path(summary.report).with_name("evaluation.json").read_text())
    return str(evaluation["model"]["smoke"]["prompt"])


def _save(state: Path, summary: Summary) -> None:
    folder = state / "runs" / summary.release
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(vars(summary), indent=2) + "\n")
