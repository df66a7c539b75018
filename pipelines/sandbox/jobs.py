"""Processing jobs: the container's entry point runs as a subprocess with its own /opt/ml."""

from __future__ import annotations

import threading
from typing import Any

from pipelines.sandbox.api import Account, Tags, created_within, now, ordered, page
from pipelines.sandbox.containers import Container, ContainerFailure, Runtime
from pipelines.sandbox.errors import ServiceError, invalid, not_emulated, not_found
from pipelines.sandbox.faults import Faults
from pipelines.sandbox.logs import PROCESSING_GROUP

_SUMMARY = (
    "ProcessingJobName",
    "ProcessingJobArn",
    "CreationTime",
    "ProcessingEndTime",
    "LastModifiedTime",
    "ProcessingJobStatus",
    "FailureReason",
    "ExitMessage",
)
_ECHOED = (
    "ProcessingInputs",
    "ProcessingOutputConfig",
    "ProcessingJobName",
    "ProcessingResources",
    "StoppingCondition",
    "AppSpecification",
    "Environment",
    "NetworkConfig",
    "RoleArn",
    "ExperimentConfig",
)
MAX_REASON = 1024
DEFAULT_MAX_RUNTIME_S = 86_400


class Job:
    """One processing job: its record as Describe answers it, and what runs it."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.ended = threading.Event()
        self.stop_wanted = threading.Event()
        self.container: Container | None = None


class ProcessingJobs:
    """The processing jobs of the account."""

    def __init__(self, account: Account, runtime: Runtime, tags: Tags, faults: Faults) -> None:
        self._account, self._runtime, self._tags, self._faults = account, runtime, tags, faults
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "CreateProcessingJob": self.create,
            "DescribeProcessingJob": self.describe,
            "ListProcessingJobs": self._list,
            "StopProcessingJob": self.stop,
        }

    def create(self, params: dict[str, Any]) -> dict[str, Any]:
        """CreateProcessingJob: check, then run in the background."""
        _check(params)
        name, time = params["ProcessingJobName"], now()
        record = {k: params[k] for k in _ECHOED if k in params}
        record.setdefault("StoppingCondition", {"MaxRuntimeInSeconds": DEFAULT_MAX_RUNTIME_S})
        record |= {
            "ProcessingJobArn": self._account.arn(f"processing-job/{name}"),
            "ProcessingJobStatus": "InProgress",
            "CreationTime": time,
            "LastModifiedTime": time,
        }
        with self._lock:
            if name in self._jobs:
                raise ServiceError(
                    "ResourceInUse",
                    f"Job name must be unique within an AWS account and region, and a "
                    f"job with this name already exists ({record['ProcessingJobArn']})",
                )
            job = self._jobs[name] = Job(record)
        self._tags.set(record["ProcessingJobArn"], params.get("Tags", []))
        threading.Thread(target=self._run, args=(job,), name=f"job-{name}", daemon=True).start()
        return {"ProcessingJobArn": record["ProcessingJobArn"]}

    def describe(self, params: dict[str, Any]) -> dict[str, Any]:
        """DescribeProcessingJob."""
        return dict(self._job(params).record)

    def wait(self, name: str) -> dict[str, Any]:
        """Block until a job has ended; its record."""
        job = self._job({"ProcessingJobName": name})
        job.ended.wait()
        return dict(job.record)

    def join(self, timeout_s: float) -> None:
        """Wait for every job to have been recorded as ended (the sandbox is going down)."""
        for job in list(self._jobs.values()):
            job.ended.wait(timeout_s)

    def stop(self, params: dict[str, Any]) -> None:
        """StopProcessingJob: SIGTERM, later SIGKILL; the status is Stopping until it has ended."""
        job = self._job(params)
        with self._lock:
            if job.record["ProcessingJobStatus"] != "InProgress":
                status = job.record["ProcessingJobStatus"]
                raise invalid(f"The request was rejected because the processing job is in status {status}.")
            job.record |= {"ProcessingJobStatus": "Stopping", "LastModifiedTime": now()}
            job.stop_wanted.set()
            container = job.container
        if container:
            threading.Thread(target=container.stop, name="stop-job", daemon=True).start()

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        records = [
            j.record
            for j in list(self._jobs.values())
            if params.get("NameContains", "") in j.record["ProcessingJobName"]
            and params.get("StatusEquals", j.record["ProcessingJobStatus"]) == j.record["ProcessingJobStatus"]
            and created_within(j.record["CreationTime"], params, "CreationTime")
            and created_within(j.record["LastModifiedTime"], params, "LastModifiedTime")
        ]
        keys = {"Name": "ProcessingJobName", "CreationTime": "CreationTime", "Status": "ProcessingJobStatus"}
        summaries = [
            {k: r[k] for k in _SUMMARY if k in r} for r in ordered(records, params, keys, "CreationTime")
        ]
        return page(summaries, params, "ProcessingJobSummaries")

    def _job(self, params: dict[str, Any]) -> Job:
        name = params["ProcessingJobName"]
        if name not in self._jobs:
            raise not_found(f"Could not find requested job with name: {name}")
        return self._jobs[name]

    def _run(self, job: Job) -> None:
        record = job.record
        container = Container(self._runtime, "jobs", record["ProcessingJobName"])
        outcome: dict[str, Any]
        try:
            outcome = self._execute(job, container)
        except ContainerFailure as failure:
            outcome = {"ProcessingJobStatus": "Failed", "FailureReason": str(failure)[:MAX_REASON]}
        except Exception as error:  # a fault of the sandbox itself must still end the job, and say so
            reason = f"SandboxFault: {type(error).__name__}: {error}"  # no InternalServerError: never retried
            outcome = {"ProcessingJobStatus": "Failed", "FailureReason": reason[:MAX_REASON]}
        finally:
            container.remove()
        time = now()
        with self._lock:
            if job.stop_wanted.is_set():
                outcome = {"ProcessingJobStatus": "Stopped"}
            record |= outcome | {"ProcessingEndTime": time, "LastModifiedTime": time}
        job.ended.set()

    def _execute(self, job: Job, container: Container) -> dict[str, Any]:
        record = job.record
        if reason := self._faults.of_job():
            raise ContainerFailure(reason)
        channels = [i for i in record.get("ProcessingInputs", []) if "S3Input" in i]
        for channel in channels:
            source = channel["S3Input"]
            container.download(source["S3Uri"], source["LocalPath"], f"input '{channel['InputName']}'")
        outputs = record.get("ProcessingOutputConfig", {}).get("Outputs", [])
        for output in outputs:
            container.path(output["S3Output"]["LocalPath"]).mkdir(parents=True, exist_ok=True)
        container.write_json("config/processingjobconfig.json", _job_config(record))
        container.write_json("config/resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1"]})
        spec = record["AppSpecification"]
        argv = [*spec["ContainerEntrypoint"], *spec.get("ContainerArguments", [])]
        if job.stop_wanted.is_set():
            return {"ProcessingJobStatus": "Stopped"}
        stream = f"{record['ProcessingJobName']}/algo-1-{int(now())}"
        container.start(argv, record.get("Environment", {}), PROCESSING_GROUP, stream)
        with self._lock:
            job.container = container
            record |= {"ProcessingStartTime": now(), "LastModifiedTime": now()}
        if job.stop_wanted.is_set():
            container.stop()
        limit = record["StoppingCondition"]["MaxRuntimeInSeconds"]
        status = container.wait(limit)
        message = container.read_message()
        done: dict[str, Any] = {"ExitMessage": message[:MAX_REASON]} if message else {}
        if status is None:
            container.stop()
            reason = f"MaxRuntimeExceeded: The job was stopped after its MaxRuntimeInSeconds of {limit}."
            return {
                "ProcessingJobStatus": "Stopped" if job.stop_wanted.is_set() else "Failed",
                "FailureReason": reason,
            }
        if status != 0:
            what = (message or "See job logs for more information").strip()
            tail = f", exit code: {status if status >= 0 else 128 - status}"
            reason = f"AlgorithmError: {what}"[: MAX_REASON - len(tail)] + tail
            return done | {"ProcessingJobStatus": "Failed", "FailureReason": reason}
        for output in outputs:
            target = output["S3Output"]
            key = record["ProcessingOutputConfig"].get("KmsKeyId")
            container.upload(target["LocalPath"], target["S3Uri"], key, f"output '{output['OutputName']}'")
        return done | {"ProcessingJobStatus": "Completed"}


def _job_config(record: dict[str, Any]) -> dict[str, Any]:
    config = {k: record[k] for k in _ECHOED if k in record and k not in ("NetworkConfig", "ExperimentConfig")}
    return config | {"ProcessingJobArn": record["ProcessingJobArn"]}


def _check(params: dict[str, Any]) -> None:
    for channel in params.get("ProcessingInputs", []):
        source = channel.get("S3Input")
        if source is None:
            raise not_emulated(
                f"the DatasetDefinition of processing input '{channel['InputName']}'", "Use S3Input."
            )
        for member, only in (
            ("S3DataType", "S3Prefix"),
            ("S3InputMode", "File"),
            ("S3CompressionType", "None"),
        ):
            if source.get(member, only) != only:
                raise not_emulated(f"{member} {source[member]} of processing input '{channel['InputName']}'")
        _check_path(source.get("LocalPath"), f"input '{channel['InputName']}'")
    for output in params.get("ProcessingOutputConfig", {}).get("Outputs", []):
        if "S3Output" not in output:
            raise not_emulated(f"processing output '{output['OutputName']}' without S3Output")
        _check_path(output["S3Output"].get("LocalPath"), f"output '{output['OutputName']}'")
    if params["ProcessingResources"]["ClusterConfig"].get("InstanceCount", 1) != 1:
        raise not_emulated("processing jobs of more than one instance")
    if "ContainerEntrypoint" not in params["AppSpecification"]:
        hint = "There is no image to take the entry point from: set AppSpecification.ContainerEntrypoint."
        raise not_emulated("processing jobs without ContainerEntrypoint", hint)


def _check_path(path: str | None, what: str) -> None:
    if not path or not path.startswith("/opt/ml/processing/") or ".." in path.split("/"):
        raise invalid(f"LocalPath {path!r} of {what} must be a path below /opt/ml/processing/.")
