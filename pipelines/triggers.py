"""A new version behind an MLflow alias starts one release: the rule of it, for CI and any machine with cron.

A version is new when no execution was started for it and no registered package comes from it. The started
execution names the version (`models:/NAME/7`), not the alias, so that what is released is what was seen; its
display name (`NAME-v7`) is what the next look finds, also when the release failed: a version is tried once.
The function in config/infrastructure/triggers.yaml follows the same rule inside the account.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

from pipelines.aws import Aws
from pipelines.errors import UserError
from pipelines.settings import Settings

_ALIAS = re.compile(r"models:/([^/@\s]+)@([^/@\s]+)")
DISPLAY_NAME = 82  # characters that SageMaker takes
EXECUTIONS, PACKAGES = 100, 10  # how far back to look


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION"""
        return f"models:/{self.name}/{self.number}"

    @property
    def display_name(self) -> str:
        """Name of the execution that releases it."""
        return re.sub("[^a-zA-Z0-9]+", "-", f"{self.name}-v{self.number}")[-DISPLAY_NAME:].strip("-")

    def token(self, pipeline: str) -> str:
        """Two starts at the same moment are one: StartPipelineExecution's ClientRequestToken."""
        return hashlib.sha256(f"{pipeline} {self.uri}".encode()).hexdigest()


def alias_of(settings: Settings) -> tuple[str, str]:
    """Name and alias in the release's ModelUri. Raises UserError when it is not models:/NAME@ALIAS."""
    uri = str(settings.parameters.release["ModelUri"])
    if not (found := _ALIAS.fullmatch(uri)):
        where = f"config/{settings.environment}.yaml, parameters.release.ModelUri"
        raise UserError(f"'{uri}' has no alias that could move", where, "write models:/NAME@ALIAS")
    return found[1], found[2]


def host_of(settings: Settings) -> str:
    """Address of the registry's REST API: a server's own, or the Databricks workspace."""
    uri = settings.mlflow.registry_uri
    host = uri if uri.startswith(("http://", "https://")) else settings.mlflow.host
    if not host:
        where = f"config/{settings.environment}.yaml, mlflow.host"
        raise UserError(f"the registry is '{uri}', and no host is named", where, "write https://<workspace>")
    return host.rstrip("/")


def current(settings: Settings) -> Version:
    """The version that the alias points to now, asked with the caller's own credentials.

    Raises UserError when the client is not installed, or the registry knows no such alias or does not answer.
    """
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise UserError(
            "the MLflow client is not installed", "--if-new", "pip install mlflow-skinny"
        ) from error
    name, alias = alias_of(settings)
    if settings.mlflow.host:
        os.environ.setdefault("DATABRICKS_HOST", settings.mlflow.host)
    client = mlflow.MlflowClient(settings.mlflow.tracking_uri, settings.mlflow.registry_uri)
    try:
        return Version(name, str(client.get_model_version_by_alias(name, alias).version))
    except MlflowException as error:
        words = " ".join(str(error).split())
        raise UserError(words, f"models:/{name}@{alias} in {settings.mlflow.registry_uri}") from error


def tried(aws: Aws, settings: Settings, version: Version) -> str:
    """What there is of the version already, in words; "" when it is new."""
    executions = aws.sagemaker.list_pipeline_executions(
        PipelineName=settings.names.release_pipeline,
        SortBy="CreationTime",
        SortOrder="Descending",
        MaxResults=EXECUTIONS,
    )["PipelineExecutionSummaries"]
    for one in executions:
        if one.get("PipelineExecutionDisplayName") == version.display_name:
            arn, state = one["PipelineExecutionArn"], one["PipelineExecutionStatus"]
            return f"execution {arn.rsplit('/', 1)[-1]} is {state}"
    packages = aws.sagemaker.list_model_packages(
        ModelPackageGroupName=settings.names.model_package_group,
        SortBy="CreationTime",
        SortOrder="Descending",
        MaxResults=PACKAGES,
    )["ModelPackageSummaryList"]
    for one in packages:
        arn = one["ModelPackageArn"]
        found: dict[str, Any] = aws.sagemaker.describe_model_package(ModelPackageName=arn)
        metadata = found.get("CustomerMetadataProperties", {})
        if (metadata.get("MlflowModelName"), metadata.get("MlflowModelVersion")) == (
            version.name,
            version.number,
        ):
            return f"package {arn.rsplit('/', 1)[-1]} is {found['ModelApprovalStatus']}"
    return ""
