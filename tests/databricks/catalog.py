"""What Unity Catalog's model registry and its grants answer."""

from __future__ import annotations

import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

from tests.databricks.workspace import PRINCIPAL, Model, Refusal, Route, Version, Workspace, now_ms

BUCKET = "unity-managed"
_TAG_KEY = re.compile(r"[^.,\-=/:]{1,255}")  # documentation: "Apply tags to Unity Catalog securable objects"


def find(workspace: Workspace, name: str) -> Model:
    """The model, if the principal may see it."""
    if name.count(".") != 2:
        raise Refusal(400, "INVALID_PARAMETER_VALUE", f"'{name}': specify all three levels")
    catalog, schema, _ = name.split(".")
    workspace.require("USE_CATALOG", catalog)
    workspace.require("USE_SCHEMA", f"{catalog}.{schema}")
    workspace.require("EXECUTE", name)
    if name not in workspace.models:
        raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Routine or Model '{name}' does not exist.")
    return workspace.models[name]


def find_version(workspace: Workspace, name: str, version: str) -> Version:
    model = find(workspace, name)
    if str(version) not in model.versions:
        raise Refusal(
            404, "RESOURCE_DOES_NOT_EXIST", f"Model version '{version}' of model '{name}' does not exist."
        )
    return model.versions[str(version)]


def describe(workspace: Workspace, name: str, version: str) -> dict[str, Any]:
    found, model = find_version(workspace, name, version), workspace.models[name]
    return {
        "name": name,
        "version": version,
        "creation_timestamp": now_ms(),
        "source": f"dbfs:/databricks/mlflow-tracking/1/{found.run_id}/artifacts/model"
        if found.run_id
        else "",
        "run_id": found.run_id,
        "status": found.status,
        "storage_location": location(name, version),
        "aliases": [
            {"alias": key, "version": value} for key, value in model.aliases.items() if value == version
        ],
        "tags": [{"key": key, "value": value} for key, value in found.tags.items()],
    }


def location(name: str, version: str) -> str:
    return f"s3://{BUCKET}/{name.replace('.', '/')}/{version}"


def get_model(request: Any) -> Any:
    name = request.arguments()["name"]
    model = find(request.workspace, name)
    aliases = [{"alias": key, "version": value} for key, value in model.aliases.items()]
    return {"registered_model": {"name": name, "aliases": aliases}}


def create_model(request: Any) -> Any:
    name = request.arguments()["name"]
    request.workspace.require("CREATE_MODEL", name.rpartition(".")[0])
    if name in request.workspace.models:
        raise Refusal(400, "RESOURCE_ALREADY_EXISTS", f"Routine or Model '{name}' already exists.")
    request.workspace.models[name] = Model()
    return {"registered_model": {"name": name}}


def get_alias(request: Any) -> Any:
    arguments = request.arguments()
    model = find(request.workspace, arguments["name"])
    version = model.aliases.get(arguments["alias"])
    if version is None:
        raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Alias '{arguments['alias']}' does not exist.")
    return {"model_version": describe(request.workspace, arguments["name"], version)}


def set_alias(request: Any) -> Any:
    arguments = request.arguments()
    find_version(request.workspace, arguments["name"], arguments["version"])
    require_owner(request.workspace, arguments["name"])
    request.workspace.models[arguments["name"]].aliases[arguments["alias"]] = str(arguments["version"])
    return {}


def get_version(request: Any) -> Any:
    arguments = request.arguments()
    return {"model_version": describe(request.workspace, arguments["name"], str(arguments["version"]))}


def create_version(request: Any) -> Any:
    arguments = request.arguments()
    model = find(request.workspace, arguments["name"])
    require_owner(request.workspace, arguments["name"])
    version = str(len(model.versions) + 1)
    tags = {tag["key"]: tag["value"] for tag in arguments.get("tags", [])}
    folder = Path(tempfile.mkdtemp(prefix="unity-"))
    model.versions[version] = Version(folder, arguments.get("run_id", ""), tags, "PENDING_REGISTRATION")
    return {"model_version": describe(request.workspace, arguments["name"], version)}


def finalize(request: Any) -> Any:
    arguments = request.arguments()
    find_version(request.workspace, arguments["name"], arguments["version"]).status = "READY"
    return {"model_version": describe(request.workspace, arguments["name"], str(arguments["version"]))}


def set_tag(request: Any) -> Any:
    arguments = request.arguments()
    found = find_version(request.workspace, arguments["name"], arguments["version"])
    request.workspace.require("APPLY_TAG", arguments["name"])
    if not _TAG_KEY.fullmatch(arguments["key"]):
        raise Refusal(
            400, "INVALID_PARAMETER_VALUE", f"Tag key '{arguments['key']}' holds a character of . , - = / :"
        )
    found.tags[arguments["key"]] = arguments["value"]
    return {}


def download_uri(request: Any) -> Any:
    arguments = request.arguments()
    find_version(request.workspace, arguments["name"], arguments["version"])
    return {"artifact_uri": location(arguments["name"], str(arguments["version"]))}


def credentials(request: Any) -> Any:
    arguments, workspace = request.arguments(), request.workspace
    find_version(workspace, arguments["name"], arguments["version"])
    if workspace.route == "presigned":
        return {"credentials": {"storage_mode": "DEFAULT_STORAGE"}}
    key = f"ASIA{secrets.token_hex(8).upper()}"
    workspace.access_keys.add(key)
    return {
        "credentials": {
            "aws_temp_credentials": {
                "access_key_id": key,
                "secret_access_key": "vended-very-secret-key",
                "session_token": "vended-very-secret-session",
            },
            "expiration_time": now_ms() + 3_600_000,
        }
    }


def sdk_enabled(request: Any) -> Any:
    return {"is_databricks_sdk_models_artifact_repository_enabled": request.workspace.route == "files"}


def require_owner(workspace: Workspace, name: str) -> None:
    """New versions and aliases are the owner's (documentation: "Upgrade workflows", Required privileges)."""
    if workspace.models[name].owner not in (PRINCIPAL, *workspace.groups):
        raise Refusal(403, "PERMISSION_DENIED", f"User is not an owner of Routine or Model '{name}'.")


def me(request: Any) -> Any:
    groups = [{"display": group} for group in request.workspace.groups]
    return {"id": "1", "userName": PRINCIPAL, "displayName": PRINCIPAL, "groups": groups}


def model_info(request: Any, name: str) -> Any:
    """The model as Unity Catalog's own API describes it, not as the registry does."""
    return {"full_name": name, "owner": find(request.workspace, name).owner}


def permissions(request: Any, kind: str, name: str) -> Any:
    """Effective permissions of the caller on a securable; models are of type "function" here."""
    wanted = {"catalog": ["USE_CATALOG"], "schema": ["USE_SCHEMA"], "function": ["EXECUTE", "APPLY_TAG"]}[
        kind
    ]
    held = [privilege for privilege in wanted if (privilege, name) not in request.workspace.missing_grants]
    return {
        "privilege_assignments": [
            {"principal": PRINCIPAL, "privileges": [{"privilege": privilege} for privilege in held]}
        ]
    }


_UC = "/api/2.0/mlflow/unity-catalog"
ROUTES: list[Route] = [
    ("GET", f"{_UC}/registered-models/get", get_model),
    ("POST", f"{_UC}/registered-models/create", create_model),
    ("GET", f"{_UC}/registered-models/alias", get_alias),
    ("POST", f"{_UC}/registered-models/alias", set_alias),
    ("GET", f"{_UC}/registered-models:is-databricks-sdk-models-artifact-repository-enabled", sdk_enabled),
    ("GET", f"{_UC}/model-versions/get", get_version),
    ("POST", f"{_UC}/model-versions/create", create_version),
    ("POST", f"{_UC}/model-versions/finalize", finalize),
    ("POST", f"{_UC}/model-versions/set-tag", set_tag),
    ("GET", f"{_UC}/model-versions/get-download-uri", download_uri),
    ("POST", f"{_UC}/model-versions/generate-temporary-credentials", credentials),
    ("POST", f"{_UC}/model-versions/emit-lineage", lambda request: {}),
    ("GET", "/api/2.0/preview/scim/v2/Me", me),
    ("GET", r"/api/2\.1/unity-catalog/models/(?P<name>[^/]+)", model_info),
    ("GET", r"/api/2\.1/unity-catalog/effective-permissions/(?P<kind>\w+)/(?P<name>[^/]+)", permissions),
]
