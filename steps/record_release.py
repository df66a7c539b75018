"""RecordRelease and RecordPromotion: write back to MLflow what became of the model version.

Tags on the model version and its run, the alias `staging` or `production`, the figures as metrics and the
evaluation's files as artifacts of the run. Doing it again changes nothing: approval events come repeatedly.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steps.job import Job, StepError, run
from steps.registry import accelerated
from steps.registry.access import Registry, connect
from steps.registry.errors import explained
from steps.registry.provenance import NONE

log = logging.getLogger("steps.record_release")

ARTIFACT_FOLDER = "mla-release"
ACCELERATED_TAG = "mla.accelerated"  # of the weights' version: the URI of the model with the kernel
TAG_VALUE_LIMIT = 1000  # characters Unity Catalog takes in a tag's value; MLflow takes 5000 and more


@dataclass(frozen=True)
class Release:
    """What is recorded: the MLflow side's names and the AWS side's figures.

    Attributes:
        name, version, run_id: of the MLflow model; "" when it has none (a runs:/ URI has no version).
        tags: without the prefix "mla.".
        metrics: numbers of the evaluation, by metric name.
    """

    name: str
    version: str
    run_id: str
    tags: dict[str, str]
    metrics: dict[str, float]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the step."""
    parser.add_argument("--model-package-arn", required=True)
    parser.add_argument("--endpoint-name", required=True)
    parser.add_argument("--stage", choices=("staging", "production"), required=True)
    parser.add_argument(
        "--register-accelerated",
        default=NONE,
        metavar="NAME",
        help="staging: also register, under this name, a model with the kernel and the weights by reference; "
        f"{NONE} registers none",
    )


def main(job: Job) -> None:
    """Record a release or a promotion in MLflow."""
    release = staged_release(job) if job.args.stage == "staging" else promoted_release(job)
    registry = connect()
    tags = release.tags | {
        "stage": job.args.stage,
        "model_package_arn": job.args.model_package_arn,
        "endpoint": job.args.endpoint_name,
    }
    tags = {f"mla.{key}": value[:TAG_VALUE_LIMIT] for key, value in tags.items() if value}
    recorded: list[str] = []
    also: list[str] = []
    if name := _known(job.args.register_accelerated):
        version = register_accelerated(job, registry, name, tags)
        tags[ACCELERATED_TAG] = f"models:/{name}/{version}"
        also = [f"accelerated model {name} version {version}, alias {job.args.stage}"]
    if release.run_id:
        recorded += record_run(registry, release, tags, evaluation_files(job))
    if release.version:
        recorded += record_version(registry, release, tags, job.args.stage)
        if job.args.stage == "production":
            also = promote_accelerated(registry, release, tags)
    recorded += also
    if not recorded:
        raise StepError(
            "The release names neither an MLflow model version nor a run, so nothing can be recorded.",
            "Release a registered model (models:/NAME@ALIAS) instead of loose files.",
        )
    job.write_json(
        "record",
        "record.json",
        {
            "schema_version": 1,
            "stage": job.args.stage,
            "model_package_arn": job.args.model_package_arn,
            "endpoint_name": job.args.endpoint_name,
            "name": release.name or NONE,
            "version": release.version or NONE,
            "run_id": release.run_id or NONE,
            "tags": tags,
            "metrics": release.metrics,
            "recorded": recorded,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    log.info("recorded in %s: %s", registry.registry_uri, "; ".join(recorded))


def staged_release(job: Job) -> Release:
    """The release as PullModel, CompileKernel and Evaluate described it."""
    origin = job.read_json("provenance", "provenance.json")
    evaluation = job.read_json("evaluation", "evaluation.json")
    kernel = job.read_json("kernel", "index.json")
    gate = evaluation["gate"]
    metrics = {
        "mla.relative_error": gate["relative_error"],
        "mla.speedup": gate["speedup"],
        "mla.decode_latency_ms": gate["decode_latency_ms"],
        "mla.tokens_equal_percent": gate["tokens_equal_percent"],
        "mla.tokens_per_s": evaluation["model"]["tokens_per_s"],
    }
    for case in evaluation["latency"]["cases"]:
        metrics[f"mla.kernel_p50_us.{_metric_name(case['name'])}"] = case["p50_us"]
    return Release(
        name=_known(origin["name"]),
        version=_known(origin["version"]),
        run_id=_known(origin["run_id"]),
        tags={
            "verdict": "passed" if gate["correct"] else "failed",
            "kernel_sha256": kernel["sha256"],
            "kernel_backend": evaluation["backend"],
            "relative_error": _figure(gate["relative_error"]),
            "speedup": _figure(gate["speedup"]),
            "decode_latency_ms": _figure(gate["decode_latency_ms"]),
        },
        metrics={name: float(value) for name, value in metrics.items()},
    )


def promoted_release(job: Job) -> Release:
    """The release as the approved model package's metadata describe it."""
    package = job.read_json("package", "package.json")
    deployment = job.read_json("deployment", "deployment.json")
    known = package["customer_metadata"]
    for file, document in (("package.json", package), ("deployment.json", deployment)):
        if document["model_package_arn"] != job.args.model_package_arn:
            raise StepError(
                f"{file} is about {document['model_package_arn']}, not {job.args.model_package_arn}.",
                "Start the production pipeline again for the version to promote.",
            )
    return Release(
        name=_known(known.get("MlflowModelName", "")),
        version=_known(known.get("MlflowModelVersion", "")),
        run_id=_known(known.get("MlflowRunId", "")),
        tags={
            "kernel_sha256": known.get("KernelSha256", ""),
            "kernel_backend": known.get("KernelBackend", ""),
            "relative_error": known.get("RelativeError", ""),
            "speedup": known.get("Speedup", ""),
            "decode_latency_ms": known.get("DecodeLatencyMs", ""),
        },
        metrics={},
    )


def record_run(registry: Registry, release: Release, tags: dict[str, str], files: list[Path]) -> list[str]:
    """Tags, metrics and artifacts of the training run; returns what was done, in words.

    A run that was deleted, or that another workspace holds, does not stop a release: its version still gets
    tags and alias. That it is missing is said in the log and in record.json.
    """
    from mlflow.entities import LifecycleStage, Metric, RunTag
    from mlflow.exceptions import MlflowException

    client = registry.client
    try:
        gone = client.get_run(release.run_id).info.lifecycle_stage != LifecycleStage.ACTIVE
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"):
            with explained(registry, f"Run {release.run_id}"):
                raise
        gone = True
    if gone:
        log.warning("run %s is not in %s; only the version is tagged", release.run_id, registry.tracking_uri)
        return [f"run {release.run_id} not found"] if release.version else []
    with explained(registry, f"Run {release.run_id}"):
        now = int(time.time() * 1000)
        client.log_batch(
            release.run_id,
            metrics=[Metric(name, number, now, 0) for name, number in release.metrics.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        for file in files:
            client.log_artifact(release.run_id, str(file), ARTIFACT_FOLDER)
    return [f"run {release.run_id}: {len(tags)} tags, {len(release.metrics)} metrics, {len(files)} artifacts"]


def record_version(registry: Registry, release: Release, tags: dict[str, str], alias: str) -> list[str]:
    """Tags of the model version, then its alias: whoever follows the alias finds the tags already there."""
    client = registry.client
    with explained(registry, f"Version {release.version} of '{release.name}'"):
        for key, value in tags.items():
            client.set_model_version_tag(release.name, release.version, registry.tag_key(key), value)
        client.set_registered_model_alias(release.name, alias, release.version)
    return [f"{release.name} version {release.version}: {len(tags)} tags, alias {alias}"]


def register_accelerated(job: Job, registry: Registry, name: str, tags: dict[str, str]) -> str:
    """Register the released weights with the measured kernel for batch jobs; returns the version."""
    if job.args.stage != "staging":
        raise StepError(
            "--register-accelerated goes with --stage staging: a promotion has no kernel at hand.",
            "Give it to RecordRelease; RecordPromotion moves the accelerated model's alias by itself.",
        )
    evaluation = job.read_json("evaluation", "evaluation.json")
    return accelerated.register(
        registry,
        name,
        job.read_json("provenance", "provenance.json"),
        job.input("kernel"),
        backend=evaluation["backend"],
        kv_cache_dtype=evaluation["requested"]["kv_cache_dtype"],
        alias=job.args.stage,
        package_arn=job.args.model_package_arn,
        tags=tags,
    )


def promote_accelerated(registry: Registry, release: Release, tags: dict[str, str]) -> list[str]:
    """Tags and alias of the accelerated model, if this release registered one; what was done, in words."""
    client = registry.client
    with explained(registry, f"The accelerated model of '{release.name}' version {release.version}"):
        known = client.get_model_version(release.name, release.version).tags
        if not (text := known.get(registry.tag_key(ACCELERATED_TAG))):
            return []
        name, _, version = text.removeprefix("models:/").rpartition("/")
        package = client.get_model_version(name, version).tags.get(registry.tag_key(accelerated.PACKAGE_TAG))
        if package != tags[accelerated.PACKAGE_TAG]:
            log.warning("%s is of a later release, %s: its alias production stays where it is", text, package)
            return []
        for key, value in tags.items():
            client.set_model_version_tag(name, version, registry.tag_key(key), value)
        client.set_registered_model_alias(name, "production", version)
    return [f"accelerated model {name} version {version}, alias production"]


def evaluation_files(job: Job) -> list[Path]:
    """evaluation.json and report.html, where the step has the evaluation as input."""
    folder = job.root / "processing" / "input" / "evaluation"
    return [folder / name for name in ("evaluation.json", "report.html") if (folder / name).is_file()]


def _known(value: Any) -> str:
    return "" if value in (NONE, None) else str(value)


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _metric_name(text: str) -> str:
    """MLflow's metric names hold letters, digits and `_-./ `; a case may be called "1x512"."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in text)


if __name__ == "__main__":
    run(main, arguments)
