"""Return production to a version that served there before: by the production pipeline, as an approval would.

The version is verified, deployed as a canary with the alarms, and recorded in MLflow like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines import endpoint, service, versions
from pipelines.aws import Aws
from pipelines.errors import UserError
from pipelines.settings import Settings


@dataclass(frozen=True)
class Rollback:
    """What will be done: `endpoint` moves from version `live` to version `target` by `pipeline`."""

    endpoint: str
    pipeline: str
    live: versions.Package
    target: versions.Package

    def lines(self) -> Iterator[str]:
        """For a person."""
        data = self.target.metadata
        model = f"{data.get('MlflowModelName', '-')} {data.get('MlflowModelVersion', '-')}"
        yield f"{self.endpoint} serves version {self.live.version} ({self.live.status})"
        yield f"it goes back to version {self.target.version}, {model}: {self.target.arn}"
        yield f"by an execution of {self.pipeline}: verified, canary, alarms, recorded in MLflow"
        if self.live.status == "Approved":
            number = self.live.version
            yield f"version {number} stays approved; `mla-pipeline reject {number}` ends that"


def plan(aws: Aws, settings: Settings, version: str | None = None) -> Rollback:
    """Choose the version, reading only.

    version: number or ARN; by default the newest one before the live version that is still approved and that
    an execution of the production pipeline deployed with success.
    Raises UserError when there is none, or the chosen one is live or not approved.
    """
    name = str(settings.parameters.production["ProductionEndpointName"])
    pipeline, group = settings.names.production_pipeline, settings.names.model_package_group
    arn = endpoint.live(aws, settings, name).package
    if not arn:
        raise UserError(
            "it serves no version of the registry", f"endpoint {name}", "deploy one: mla-pipeline approve"
        )
    live = versions.package(aws, arn)
    if version is None:
        return Rollback(name, pipeline, live, _previous(aws, settings, live))
    target = versions.find_package(aws, group, version)
    if target.arn == live.arn:
        raise UserError(f"version {target.version} is live already", f"endpoint {name}", "name another one")
    if target.status != "Approved":
        fix = f"approve it: mla-pipeline approve {target.version} (which deploys it by itself)"
        raise UserError(f"version {target.version} is {target.status}", f"model package group {group}", fix)
    return Rollback(name, pipeline, live, target)


def start(aws: Aws, chosen: Rollback) -> str:
    """Start the production pipeline with the chosen version; gives the execution's ARN."""
    return service.start(aws, chosen.pipeline, {"ModelPackageArn": chosen.target.arn})


def _previous(aws: Aws, settings: Settings, live: versions.Package) -> versions.Package:
    group = settings.names.model_package_group
    served = set(_served_before(aws, settings.names.production_pipeline))
    older = [one for one in versions.packages(aws, group) if one.version < live.version]
    fit = [one for one in older if one.status == "Approved" and one.arn in served]
    if fit:
        return max(fit, key=lambda one: one.version)
    why = ", ".join(
        f"{one.version} ({one.status}{'' if one.arn in served else ', never in production'})" for one in older
    )
    raise UserError(
        f"no version before {live.version} to go back to",
        f"model package group {group}",
        f"older: {why or 'none'}; an approved one can be named: mla-pipeline rollback VERSION",
    )


def _served_before(aws: Aws, pipeline: str) -> Iterator[str]:
    """ARNs of the versions that the production pipeline deployed with success."""
    pages = aws.sagemaker.get_paginator("list_pipeline_executions").paginate(PipelineName=pipeline)
    for page in pages:
        for one in page["PipelineExecutionSummaries"]:
            if one["PipelineExecutionStatus"] == "Succeeded":
                yield endpoint.deployed_package(aws, one["PipelineExecutionArn"])
