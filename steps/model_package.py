"""A registered model version as the production steps read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from container.serving.settings import KERNEL_S3_URI
from steps import aws
from steps.job import StepError

KERNEL_CHANNEL = "kernel"  # mounted by SageMaker under /opt/ml/additional-model-data-sources/kernel


@dataclass(frozen=True)
class ModelPackage:
    """One version of a model package group: what was registered, and whether a person approved it."""

    arn: str
    group: str
    version: int
    status: str
    approval: str
    approval_description: str
    image: str
    environment: dict[str, str]
    weights_uri: str
    kernel_uri: str
    metadata: dict[str, str]

    def require_approved(self) -> None:
        """Raise StepError unless the version is complete and approved at this moment."""
        if self.status != "Completed":
            raise StepError(
                f"Model package {self.arn} has status {self.status}, not Completed.",
                "Wait for its registration, or register the release again.",
            )
        if self.approval != "Approved":
            reason = f" ({self.approval_description})" if self.approval_description else ""
            raise StepError(
                f"Model package {self.arn} is {self.approval or 'without approval status'}{reason}, "
                "not Approved: it is not deployed.",
                "Approve this version (console, CLI, update_model_package) when it should reach production.",
            )


def describe(sagemaker: Any, arn: str) -> ModelPackage:
    """Read the package from the service.

    Args:
        sagemaker: a boto3 sagemaker client.
        arn: the version's ARN, ".../model-package/<group>/<version>".
    Raises:
        StepError: it does not exist, or holds no container, weights or kernel.
    """
    with aws.explained(f"Reading model package {arn}", "Give the ARN of a registered version."):
        answer = sagemaker.describe_model_package(ModelPackageName=arn)
    containers = answer.get("InferenceSpecification", {}).get("Containers", [])
    if len(containers) != 1:
        raise StepError(
            f"Model package {arn} has {len(containers)} containers, expected 1.",
            "Approve a version that the release pipeline registered.",
        )
    container = containers[0]
    return ModelPackage(
        arn=arn,
        group=answer.get("ModelPackageGroupName", ""),
        version=answer.get("ModelPackageVersion", 0),
        status=answer.get("ModelPackageStatus", ""),
        approval=answer.get("ModelApprovalStatus", ""),
        approval_description=answer.get("ApprovalDescription", ""),
        image=container.get("Image", ""),
        environment=container.get("Environment", {}),
        weights_uri=_weights(arn, container),
        kernel_uri=kernel_uri(arn, container),
        metadata=answer.get("CustomerMetadataProperties", {}),
    )


def _weights(arn: str, container: dict[str, Any]) -> str:
    uri = container.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri", "")
    if not uri:
        raise StepError(
            f"Model package {arn} has no weights: ModelDataSource.S3DataSource.S3Uri is empty.",
            "Approve a version that the release pipeline registered.",
        )
    return uri


def kernel_uri(arn: str, container: dict[str, Any]) -> str:
    """S3 prefix of a container's kernel: what SageMaker mounts, else what the server downloads.

    The server decides in the same order (container/serving/settings.py). Raises StepError for neither.
    """
    sources = container.get("AdditionalModelDataSources", [])
    for source in sources:
        if source["ChannelName"] == KERNEL_CHANNEL:
            return source["S3DataSource"]["S3Uri"]
    if uri := container.get("Environment", {}).get(KERNEL_S3_URI):
        return uri
    channels = ", ".join(source["ChannelName"] for source in sources) or "none"
    raise StepError(
        f"Model package {arn} has no kernel: its AdditionalModelDataSources hold {channels}, "
        f"not '{KERNEL_CHANNEL}', and its Environment has no {KERNEL_S3_URI}.",
        "Approve a version that the release pipeline registered.",
    )
