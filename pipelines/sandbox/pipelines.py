"""Pipelines: create, update, describe, list, delete, and their versions."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from pipelines.sandbox.api import Account, Tags, created_within, now, ordered, page
from pipelines.sandbox.backends import Backends, NoSuchObject
from pipelines.sandbox.errors import invalid, not_found
from pipelines.sandbox.validation import parse_definition


@dataclass
class Pipeline:
    """One pipeline: its record as DescribePipeline answers it (without the definition) and its versions."""

    record: dict[str, Any]
    versions: list[tuple[str, float]] = field(default_factory=list)  # definition text, time of creation

    @property
    def arn(self) -> str:
        """The pipeline's ARN."""
        return self.record["PipelineArn"]

    def definition(self, version: int | None) -> str:
        """The text of a version, the newest by default.

        Raises:
            ServiceError: ResourceNotFound.
        """
        if version is not None and not 1 <= version <= len(self.versions):
            raise not_found(f"Pipeline version {version} of '{self.arn}' does not exist.")
        return self.versions[version - 1 if version else -1][0]


class Pipelines:
    """The pipelines of the account."""

    def __init__(self, account: Account, backends: Backends, tags: Tags) -> None:
        self._account, self._backends, self._tags = account, backends, tags
        self._pipelines: dict[str, Pipeline] = {}
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "CreatePipeline": self._create,
            "UpdatePipeline": self._update,
            "DescribePipeline": self._describe,
            "ListPipelines": self._list,
            "DeletePipeline": self._delete,
            "ListPipelineVersions": self._list_versions,
        }

    def find(self, name_or_arn: str) -> Pipeline:
        """A pipeline by name or ARN.

        Raises:
            ServiceError: ResourceNotFound.
        """
        name = name_or_arn.rsplit("/", 1)[-1]
        if name not in self._pipelines:
            raise not_found(f"Pipeline '{self._account.arn(f'pipeline/{name}')}' does not exist.")
        return self._pipelines[name]

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        name, arn = params["PipelineName"], self._account.arn(f"pipeline/{params['PipelineName']}")
        text = self._definition_text(params)
        self._check_role(params["RoleArn"])
        with self._lock:
            if self._tokens.get(params["ClientRequestToken"]) == name:
                return {"PipelineArn": arn}
            if name in self._pipelines:
                raise invalid(
                    f"Pipeline names must be unique within an AWS account and region. Pipeline with name "
                    f"({name}) already exists."
                )
            time = now()
            record = {
                "PipelineArn": arn,
                "PipelineName": name,
                "PipelineStatus": "Active",
                "RoleArn": params["RoleArn"],
                "PipelineDisplayName": params.get("PipelineDisplayName", name),
                "CreationTime": time,
                "LastModifiedTime": time,
            }
            record |= {
                k: params[k] for k in ("PipelineDescription", "ParallelismConfiguration") if k in params
            }
            self._pipelines[name] = Pipeline(record, [(text, time)])
            self._tokens[params["ClientRequestToken"]] = name
        self._tags.set(arn, params.get("Tags", []))
        return {"PipelineArn": arn}

    def _update(self, params: dict[str, Any]) -> dict[str, Any]:
        pipeline = self.find(params["PipelineName"])
        changed = {"PipelineDefinition", "PipelineDefinitionS3Location"} & set(params)
        text = self._definition_text(params) if changed else None
        if "RoleArn" in params:
            self._check_role(params["RoleArn"])
        members = ("RoleArn", "PipelineDisplayName", "PipelineDescription", "ParallelismConfiguration")
        with self._lock:
            pipeline.record |= {k: params[k] for k in members if k in params} | {"LastModifiedTime": now()}
            if text is not None and text != pipeline.versions[-1][0]:
                pipeline.versions.append((text, now()))
        return {"PipelineArn": pipeline.arn, "PipelineVersionId": len(pipeline.versions)}

    def _describe(self, params: dict[str, Any]) -> dict[str, Any]:
        pipeline = self.find(params["PipelineName"])
        return pipeline.record | {"PipelineDefinition": pipeline.definition(params.get("PipelineVersionId"))}

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        members = (
            "PipelineArn",
            "PipelineName",
            "PipelineDisplayName",
            "PipelineDescription",
            "RoleArn",
            "CreationTime",
            "LastModifiedTime",
        )
        records = [
            {k: p.record[k] for k in members if k in p.record}
            | ({"LastExecutionTime": p.record["LastRunTime"]} if "LastRunTime" in p.record else {})
            for p in list(self._pipelines.values())
            if p.record["PipelineName"].startswith(params.get("PipelineNamePrefix", ""))
            and created_within(p.record["CreationTime"], params)
        ]
        keys = {"Name": "PipelineName", "CreationTime": "CreationTime"}
        return page(ordered(records, params, keys, "CreationTime"), params, "PipelineSummaries")

    def _delete(self, params: dict[str, Any]) -> dict[str, Any]:
        pipeline = self.find(params["PipelineName"])
        with self._lock:
            self._pipelines.pop(pipeline.record["PipelineName"], None)
        return {"PipelineArn": pipeline.arn}

    def _list_versions(self, params: dict[str, Any]) -> dict[str, Any]:
        pipeline = self.find(params["PipelineName"])
        versions = [
            {"PipelineArn": pipeline.arn, "PipelineVersionId": i + 1, "CreationTime": time}
            for i, (_, time) in enumerate(pipeline.versions)
        ]
        keys = {"Version": "PipelineVersionId"}
        return page(ordered(versions, params, keys, "Version"), params, "PipelineVersionSummaries")

    def _definition_text(self, params: dict[str, Any]) -> str:
        if ("PipelineDefinition" in params) == ("PipelineDefinitionS3Location" in params):
            raise invalid("Exactly one of PipelineDefinition and PipelineDefinitionS3Location must be given.")
        if "PipelineDefinition" in params:
            text = params["PipelineDefinition"]
        else:
            place = params["PipelineDefinitionS3Location"]
            try:
                content = self._backends.read_object(
                    place["Bucket"], place["ObjectKey"], place.get("VersionId")
                )
            except NoSuchObject as error:
                raise invalid(f"Unable to read the pipeline definition: {error}.") from None
            text = content.decode(errors="replace")
        parse_definition(text)
        return text

    def _check_role(self, arn: str) -> None:
        if not self._backends.has_role(arn):
            raise invalid(
                f"The role '{arn}' does not exist. Create it first (pipelines/sandbox/account.py does)."
            )
