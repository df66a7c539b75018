"""Versions of the model package group: found by number or ARN, listed, approved or rejected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.aws import Aws, there
from pipelines.errors import UserError

LISTED = 10  # versions named in a message


@dataclass(frozen=True)
class Package:
    """A registered version of the model package group."""

    arn: str
    version: int
    status: str  # PendingManualApproval | Approved | Rejected
    created: datetime
    metadata: Mapping[str, str]


def packages(aws: Aws, group: str) -> list[Package]:
    """Versions of the group, newest first."""
    return [package(aws, one["ModelPackageArn"]) for one in _versions(aws, group)]


def package(aws: Aws, arn: str) -> Package:
    """A version by ARN. Raises UserError when there is none."""
    none = UserError(f"no version '{arn}'", aws.region, "its number in the group will do as well")
    answer = there(aws.sagemaker.describe_model_package, none, ModelPackageName=arn)
    return Package(
        arn=answer["ModelPackageArn"],
        version=answer["ModelPackageVersion"],
        status=answer["ModelApprovalStatus"],
        created=answer["CreationTime"],
        metadata=answer.get("CustomerMetadataProperties", {}),
    )


def find_package(aws: Aws, group: str, reference: str | None) -> Package:
    """A version by ARN or number; without reference the newest one that waits for a decision."""
    if reference and reference.startswith("arn:"):
        return package(aws, reference)
    known = []
    for one in _versions(aws, group):
        number, state = str(one["ModelPackageVersion"]), one["ModelApprovalStatus"]
        if number == reference or (reference is None and state == "PendingManualApproval"):
            return package(aws, one["ModelPackageArn"])
        known.append(f"{number} ({state})")
    more = f" and {len(known) - LISTED} older" if len(known) > LISTED else ""
    listed = ", ".join(known[:LISTED]) or "none"
    what = f"no version {reference}" if reference else "no version waits for approval"
    raise UserError(what, f"model package group {group}", f"known: {listed}{more}")


def _versions(aws: Aws, group: str) -> Iterator[dict[str, Any]]:
    """Summaries of the group's versions, newest first, page after page as they are asked for."""
    pages = aws.sagemaker.get_paginator("list_model_packages").paginate(
        ModelPackageGroupName=group, SortBy="CreationTime", SortOrder="Descending"
    )
    for page in pages:
        yield from page["ModelPackageSummaryList"]


def decide(aws: Aws, arn: str, approval: str, note: str) -> None:
    """Set a version's approval status: Approved or Rejected. Approval is what starts production."""
    aws.sagemaker.update_model_package(
        ModelPackageArn=arn,
        ModelApprovalStatus=approval,
        ApprovalDescription=note or f"{approval} by mla-pipeline",
    )
