"""Models and endpoint configurations: what an endpoint is made from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pipelines.sandbox.api import Account, Tags, created_within, now, ordered, page
from pipelines.sandbox.backends import Backends, NoSuchObject, parse_s3_uri
from pipelines.sandbox.errors import invalid, not_emulated

FindPackage = Callable[[str], dict[str, Any]]
_REFUSED_CONFIG = (
    "AsyncInferenceConfig",
    "ExplainerConfig",
    "ShadowProductionVariants",
    "CrossRegionTrafficConfig",
)
_REFUSED_VARIANT = ("ServerlessConfig", "InstancePools", "AcceleratorType", "AcceleratorPartitionLayouts")


class Models:
    """The models of the account.

    Args:
        find_package: a model package's record by ARN; raises ServiceError when there is none.
    """

    def __init__(self, account: Account, backends: Backends, tags: Tags, find_package: FindPackage) -> None:
        self._account, self._backends, self._tags = account, backends, tags
        self._find_package = find_package
        self._models: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "CreateModel": self._create,
            "DescribeModel": lambda params: dict(self.find(params["ModelName"])),
            "ListModels": self._list,
            "DeleteModel": self._delete,
        }

    def find(self, name: str) -> dict[str, Any]:
        """A model's record.

        Raises:
            ServiceError: ValidationException, as the service answers for a missing model.
        """
        if name not in self._models:
            raise invalid(f'Could not find model "{self._account.arn(f"model/{name}")}".')
        return self._models[name]

    def container(self, name: str) -> dict[str, Any]:
        """What a model's container runs (Image, Environment, model data), from its package if it has one."""
        model = self.find(name)
        own = model.get("PrimaryContainer") or model["Containers"][0]
        if "ModelPackageName" not in own:
            return dict(own)
        package = self._find_package(own["ModelPackageName"])
        container = dict(package["InferenceSpecification"]["Containers"][0])
        container["Environment"] = {**container.get("Environment", {}), **own.get("Environment", {})}
        return container

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        name, arn = params["ModelName"], self._account.arn(f"model/{params['ModelName']}")
        containers = params.get("Containers") or [params.get("PrimaryContainer")]
        if containers == [None] or ("PrimaryContainer" in params and "Containers" in params):
            raise invalid("Exactly one of PrimaryContainer and Containers must be given.")
        if len(containers) > 1:
            raise not_emulated("models of several containers")
        self._check(containers[0])
        if "ExecutionRoleArn" in params and not self._backends.has_role(params["ExecutionRoleArn"]):
            raise invalid(f"Could not assume role {params['ExecutionRoleArn']}: it does not exist.")
        with self._lock:
            if name in self._models:
                raise invalid(f'Cannot create already existing model "{arn}".')
            record = {k: v for k, v in params.items() if k != "Tags"}
            self._models[name] = record | {"ModelArn": arn, "CreationTime": now()}
        self._tags.set(arn, params.get("Tags", []))
        return {"ModelArn": arn}

    def _check(self, container: dict[str, Any]) -> None:
        if container.get("Mode") == "MultiModel":
            raise not_emulated("multi-model containers")
        if "ModelPackageName" in container:
            package = self._find_package(container["ModelPackageName"])
            status = package.get("ModelApprovalStatus")
            if status != "Approved":
                # the service does not document this check; a sandbox that allowed it would hide the mistake
                raise invalid(
                    f"Model package {package['ModelPackageArn']} cannot be deployed: "
                    f"its approval status is {status}, not Approved."
                )
            return
        if "Image" not in container:
            raise invalid("A container needs an Image or a ModelPackageName.")
        for uri in _model_data_uris(container):
            if not self._exists(uri):
                raise invalid(f"Could not find model data at {uri}.")

    def _exists(self, uri: str) -> bool:
        try:
            return bool(self._backends.list_objects(*parse_s3_uri(uri)))
        except (NoSuchObject, ValueError):
            return False

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        members = ("ModelName", "ModelArn", "CreationTime")
        found = [
            {k: m[k] for k in members}
            for m in list(self._models.values())
            if params.get("NameContains", "") in m["ModelName"]
            and created_within(m["CreationTime"], params, "CreationTime")
        ]
        keys = {"Name": "ModelName", "CreationTime": "CreationTime"}
        return page(ordered(found, params, keys, "CreationTime"), params, "Models")

    def _delete(self, params: dict[str, Any]) -> None:
        self.find(params["ModelName"])
        with self._lock:
            self._models.pop(params["ModelName"], None)


def _model_data_uris(container: dict[str, Any]) -> list[str]:
    sources = [container[k] for k in ("ModelDataSource",) if k in container]
    sources += container.get("AdditionalModelDataSources", [])
    uris = [s["S3DataSource"]["S3Uri"] for s in sources if "S3DataSource" in s]
    return uris + ([container["ModelDataUrl"]] if "ModelDataUrl" in container else [])


class EndpointConfigs:
    """The endpoint configurations of the account."""

    def __init__(self, account: Account, models: Models, tags: Tags) -> None:
        self._account, self._models, self._tags = account, models, tags
        self._configs: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Any]:
        """The actions answered here."""
        return {
            "CreateEndpointConfig": self._create,
            "DescribeEndpointConfig": lambda params: dict(self.find(params["EndpointConfigName"])),
            "ListEndpointConfigs": self._list,
            "DeleteEndpointConfig": self._delete,
        }

    def find(self, name: str) -> dict[str, Any]:
        """A configuration's record.

        Raises:
            ServiceError: ValidationException, as the service answers for a missing one.
        """
        if name not in self._configs:
            raise invalid(f'Could not find endpoint configuration "{self._arn(name)}".')
        return self._configs[name]

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        name = params["EndpointConfigName"]
        for member in _REFUSED_CONFIG:
            if member in params:
                raise not_emulated(f"{member} of an endpoint configuration")
        names = [v["VariantName"] for v in params["ProductionVariants"]]
        if len(set(names)) < len(names):
            raise invalid(f"Variant names must be unique: {names}.")
        for variant in params["ProductionVariants"]:
            self._check(variant)
        with self._lock:
            if name in self._configs:
                raise invalid(f'Cannot create already existing endpoint configuration "{self._arn(name)}".')
            record = {k: v for k, v in params.items() if k != "Tags"}
            self._configs[name] = record | {"EndpointConfigArn": self._arn(name), "CreationTime": now()}
        self._tags.set(self._arn(name), params.get("Tags", []))
        return {"EndpointConfigArn": self._arn(name)}

    def _check(self, variant: dict[str, Any]) -> None:
        for member in _REFUSED_VARIANT:
            if member in variant:
                raise not_emulated(f"{member} of production variant '{variant['VariantName']}'")
        if "ModelName" not in variant:
            raise not_emulated(f"production variant '{variant['VariantName']}' without a ModelName")
        for member in ("InstanceType", "InitialInstanceCount"):
            if member not in variant:
                raise invalid(f"{member} is required for production variant '{variant['VariantName']}'.")
        if "ManagedInstanceScaling" in variant:  # the service's words beside a ModelName
            raise invalid("ManagedInstanceScaling is only supported for inference component endpoints.")
        self._models.find(variant["ModelName"])

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        members = ("EndpointConfigName", "EndpointConfigArn", "CreationTime")
        found = [
            {k: c[k] for k in members}
            for c in list(self._configs.values())
            if params.get("NameContains", "") in c["EndpointConfigName"]
            and created_within(c["CreationTime"], params, "CreationTime")
        ]
        keys = {"Name": "EndpointConfigName", "CreationTime": "CreationTime"}
        return page(ordered(found, params, keys, "CreationTime"), params, "EndpointConfigs")

    def _delete(self, params: dict[str, Any]) -> None:
        self.find(params["EndpointConfigName"])
        with self._lock:
            self._configs.pop(params["EndpointConfigName"], None)

    def _arn(self, name: str) -> str:
        return self._account.arn(f"endpoint-config/{name}")
