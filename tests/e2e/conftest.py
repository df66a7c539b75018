"""One sandbox, one MLflow server, one model and one release for the tests of a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from pipelines import run, upsert, versions
from pipelines.aws import Aws
from pipelines.display import Display
from pipelines.local import Local
from pipelines.run import Summary

# The same steps on fewer shapes; a step's latency on a machine that is shared is no verdict on the chain.
QUICK = {
    "KernelBackend": "cpu",
    "Workload": "1x256,2x64",
    "MaxDecodeLatencyMs": "10000",
    "MaxRegressionPercent": "10000",
}
TRAINING = ("--steps", "20", "--threads", "1")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # threads of several test processes would wait for each other's cores


@dataclass
class Chain:
    """A running pair of servers, and the first release made on it."""

    local: Local
    aws: Aws
    sdk: dict[str, Any]  # the SDK's pipelines by name
    summary: Summary
    before_decision: dict[str, Any]  # what was true while the version waited

    @property
    def release(self) -> str:
        """Name of the release pipeline."""
        return self.local.settings.names.release_pipeline

    @property
    def production(self) -> str:
        """Name of the production pipeline."""
        return self.local.settings.names.production_pipeline

    def production_executions(self) -> list[dict[str, Any]]:
        """All executions of the production pipeline so far."""
        answer = self.aws.sagemaker.list_pipeline_executions(PipelineName=self.production)
        return answer["PipelineExecutionSummaries"]

    def packages(self) -> list[versions.Package]:
        """All registered versions."""
        return versions.packages(self.aws, self.local.settings.names.model_package_group)


@pytest.fixture(scope="package")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """`mla-pipeline run` up to a decision, which is to reject."""
    before = dict(os.environ)
    try:
        with Local(tmp_path_factory.mktemp("mla"), job_environment=ONE_THREAD) as local:
            yield _first_release(local)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _first_release(local: Local) -> Chain:
    aws = Aws(local.settings.region)
    local.mlflow.wait_until_healthy()
    run.train_demo(local, *TRAINING)
    seen: dict[str, Any] = {}

    def reject(package: versions.Package) -> str:
        names = local.settings.names
        seen["status"] = package.status
        seen["executions"] = aws.sagemaker.list_pipeline_executions(PipelineName=names.production_pipeline)
        return "Rejected"

    display = Display(Console(quiet=True))
    summary = run.run(local, display, QUICK, reject)
    return Chain(local, aws, upsert.render(local.settings), summary, seen)
