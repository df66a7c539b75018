"""The model registry: package groups, versioned packages, approval."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pipelines.sandbox.api import Account, Tags, created_within, now, ordered, page
from pipelines.sandbox.errors import conflict, invalid, not_emulated

Changed = Callable[[dict[str, Any]], None]
_NOT_STORED = ("ClientToken", "Tags", "CertifyForMarketplace", "ValidationSpecification")
_SUMMARY = (
    "ModelPackageName",
    "ModelPackageGroupName",
    "ModelPackageVersion",
    "ModelPackageArn",
    "ModelPackageDescription",
    "CreationTime",
    "ModelPackageStatus",
    "ModelApprovalStatus",
    "ModelLifeCycle",
    "ModelPackageRegistrationType",
)
_GROUP_SUMMARY = (
    "ModelPackageGroupName",
    "ModelPackageGroupArn",
    "ModelPackageGroupDescription",
    "CreationTime",
    "ModelPackageGroupStatus",
)


class Registry:
    """Model package groups and packages of the account.

    Args:
        changed: called with a package's record after it was made or its status changed.
    """

    def __init__(self, account: Account, tags: Tags, changed: Changed) -> None:
        self._account, self._tags, self._changed = account, tags, changed
        self._groups: dict[str, dict[str, Any]] = {}
        self._packages: dict[str, dict[str, Any]] = {}  # by ARN
        self._last_version: dict[str, int] = {}
        self._tokens: dict[str, str] = {}
        self._policies: dict[str, str] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "CreateModelPackageGroup": self._create_group,
            "DescribeModelPackageGroup": lambda p: dict(self._group(p["ModelPackageGroupName"])),
            "ListModelPackageGroups": self._list_groups,
            "DeleteModelPackageGroup": self._delete_group,
            "PutModelPackageGroupPolicy": self._put_policy,
            "GetModelPackageGroupPolicy": self._get_policy,
            "DeleteModelPackageGroupPolicy": self._delete_policy,
            "CreateModelPackage": self._create,
            "DescribeModelPackage": lambda p: dict(self.find(p["ModelPackageName"])),
            "ListModelPackages": self._list,
            "UpdateModelPackage": self._update,
            "DeleteModelPackage": self._delete,
        }

    def find(self, name_or_arn: str) -> dict[str, Any]:
        """A package's record by ARN.

        Raises:
            ServiceError: ValidationException, as the service answers for a missing package.
        """
        if name_or_arn not in self._packages:
            raise invalid(f"ModelPackage {name_or_arn} does not exist.")
        return self._packages[name_or_arn]

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        if "ModelPackageName" in params or "ModelPackageGroupName" not in params:
            raise not_emulated("unversioned model packages", "Give ModelPackageGroupName.")
        if params.get("CertifyForMarketplace") or "ValidationSpecification" in params:
            raise not_emulated("validation of a model package")
        group = self._group(params["ModelPackageGroupName"])["ModelPackageGroupName"]
        token = params.get("ClientToken")
        time = now()
        with self._lock:
            if token and token in self._tokens:
                return {"ModelPackageArn": self._tokens[token]}
            version = self._last_version[group] = self._last_version.get(group, 0) + 1
            arn = self._account.arn(f"model-package/{group}/{version}")
            record = {k: v for k, v in params.items() if k not in _NOT_STORED}
            record |= {
                "ModelPackageName": group,  # DescribeModelPackage requires one; a version has its group's
                "ModelPackageGroupName": group,
                "ModelPackageVersion": version,
                "ModelPackageArn": arn,
                "ModelPackageStatus": "Completed",
                "ModelPackageStatusDetails": {"ValidationStatuses": [], "ImageScanStatuses": []},
                "CreationTime": time,
                "LastModifiedTime": time,
            }
            record.setdefault("ModelApprovalStatus", "PendingManualApproval")
            record.setdefault("ModelPackageRegistrationType", "Registered")
            self._packages[arn] = record
            if token:
                self._tokens[token] = arn
        self._tags.set(arn, params.get("Tags", []))
        self._changed(dict(record))
        return {"ModelPackageArn": arn}

    def _update(self, params: dict[str, Any]) -> dict[str, Any]:
        arn = params["ModelPackageArn"]
        record = self.find(arn)
        for member in ("AdditionalInferenceSpecificationsToAdd", "InferenceSpecification"):
            if member in params:
                raise not_emulated(f"{member} of UpdateModelPackage")
        removed = set(params.get("CustomerMetadataPropertiesToRemove", []))
        with self._lock:
            kept = {k: v for k, v in record.get("CustomerMetadataProperties", {}).items() if k not in removed}
            custom = kept | params.get("CustomerMetadataProperties", {})
            members = (
                "ModelApprovalStatus",
                "ApprovalDescription",
                "ModelPackageRegistrationType",
                "SourceUri",
                "ModelCard",
                "ModelLifeCycle",
            )
            record |= {k: params[k] for k in members if k in params} | {"LastModifiedTime": now()}
            if custom:
                record["CustomerMetadataProperties"] = custom
            else:
                record.pop("CustomerMetadataProperties", None)
        self._changed(dict(record))
        return {"ModelPackageArn": arn}

    def _delete(self, params: dict[str, Any]) -> None:
        self.find(params["ModelPackageName"])
        with self._lock:
            self._packages.pop(params["ModelPackageName"], None)

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        group = params.get("ModelPackageGroupName")
        if group:
            group = self._group(group)["ModelPackageGroupName"]
        status = params.get("ModelApprovalStatus")
        found = [
            {k: p[k] for k in _SUMMARY if k in p}
            for p in list(self._packages.values())
            if (group is None or p["ModelPackageGroupName"] == group)
            and (status is None or p["ModelApprovalStatus"] == status)
            and params.get("NameContains", "") in p["ModelPackageGroupName"]
            and created_within(p["CreationTime"], params, "CreationTime")
        ]
        keys = {"Name": "ModelPackageArn", "CreationTime": "CreationTime"}
        return page(ordered(found, params, keys, "CreationTime"), params, "ModelPackageSummaryList")

    def _create_group(self, params: dict[str, Any]) -> dict[str, Any]:
        name = params["ModelPackageGroupName"]
        arn = self._account.arn(f"model-package-group/{name}")
        with self._lock:
            if name in self._groups:
                raise invalid(f"Model Package Group already exists: {arn}")
            record = {k: v for k, v in params.items() if k != "Tags"}
            times = {"CreationTime": now()}
            status = {"ModelPackageGroupStatus": "Completed"}
            self._groups[name] = record | {"ModelPackageGroupArn": arn} | status | times
        self._tags.set(arn, params.get("Tags", []))
        return {"ModelPackageGroupArn": arn}

    def _group(self, name_or_arn: str) -> dict[str, Any]:
        name = name_or_arn.rsplit("/", 1)[-1]
        if name not in self._groups:
            raise invalid(
                f"Model Package Group {self._account.arn(f'model-package-group/{name}')} does not exist."
            )
        return self._groups[name]

    def _list_groups(self, params: dict[str, Any]) -> dict[str, Any]:
        found = [
            {k: g[k] for k in _GROUP_SUMMARY if k in g}
            for g in list(self._groups.values())
            if params.get("NameContains", "") in g["ModelPackageGroupName"]
            and created_within(g["CreationTime"], params, "CreationTime")
        ]
        keys = {"Name": "ModelPackageGroupName", "CreationTime": "CreationTime"}
        return page(ordered(found, params, keys, "CreationTime"), params, "ModelPackageGroupSummaryList")

    def _delete_group(self, params: dict[str, Any]) -> None:
        name = self._group(params["ModelPackageGroupName"])["ModelPackageGroupName"]
        with self._lock:
            if any(p["ModelPackageGroupName"] == name for p in self._packages.values()):
                raise conflict(f"Model Package Group {name} still has model packages; delete them first.")
            self._groups.pop(name, None)
            self._policies.pop(name, None)

    def _put_policy(self, params: dict[str, Any]) -> dict[str, Any]:
        group = self._group(params["ModelPackageGroupName"])
        self._policies[group["ModelPackageGroupName"]] = params["ResourcePolicy"]
        return {"ModelPackageGroupArn": group["ModelPackageGroupArn"]}

    def _get_policy(self, params: dict[str, Any]) -> dict[str, Any]:
        name = self._group(params["ModelPackageGroupName"])["ModelPackageGroupName"]
        if name not in self._policies:
            raise invalid(f"Model Package Group {name} has no resource policy.")
        return {"ResourcePolicy": self._policies[name]}

    def _delete_policy(self, params: dict[str, Any]) -> None:
        self._policies.pop(self._group(params["ModelPackageGroupName"])["ModelPackageGroupName"], None)
