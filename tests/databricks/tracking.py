"""What the workspace's MLflow tracking answers about runs, and its own (not Unity Catalog's) registry."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import Any

from tests.databricks import storage
from tests.databricks.workspace import Model, Refusal, Route, Version, Workspace, now_ms


def add_run(workspace: Workspace) -> str:
    """A finished training run with an artifact folder. Returns its id."""
    run_id = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="run-"))
    workspace.runs[run_id] = {"folder": folder, "tags": {}, "metrics": {}}
    return run_id


def _run(request: Any, run_id: str) -> dict[str, Any]:
    if run_id not in request.workspace.runs:
        raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Run '{run_id}' not found.")
    return request.workspace.runs[run_id]


def get_run(request: Any) -> Any:
    run_id = request.arguments()["run_id"]
    run = _run(request, run_id)
    info = {
        "run_id": run_id,
        "run_uuid": run_id,
        "experiment_id": "1",
        "status": "FINISHED",
        "lifecycle_stage": "active",
        "start_time": now_ms(),
        "artifact_uri": f"dbfs:/databricks/mlflow-tracking/1/{run_id}/artifacts",
    }
    data = {
        "tags": [{"key": key, "value": value} for key, value in run["tags"].items()],
        "metrics": [{"key": key, "value": value, "timestamp": 1} for key, value in run["metrics"].items()],
    }
    return {"run": {"info": info, "data": data}}


def log_batch(request: Any) -> Any:
    arguments = request.arguments()
    run = _run(request, arguments["run_id"])
    run["tags"] |= {tag["key"]: tag["value"] for tag in arguments.get("tags", [])}
    run["metrics"] |= {metric["key"]: metric["value"] for metric in arguments.get("metrics", [])}
    return {}


def list_run_artifacts(request: Any) -> Any:
    arguments = request.arguments()
    return _listing(_run(request, arguments["run_id"])["folder"], arguments.get("path", ""))


def run_credentials(request: Any) -> Any:
    """Presigned URLs for reading or writing artifacts of a run."""
    arguments = request.arguments()
    paths = arguments["path"] if isinstance(arguments["path"], list) else [arguments["path"]]
    folder = _run(request, arguments["run_id"])["folder"]
    infos = []
    for path in paths:
        given = storage.sign(request.workspace, folder / path)
        infos.append(
            {
                "run_id": arguments["run_id"],
                "path": path,
                "signed_uri": given["url"],
                "headers": given["headers"],
                "type": "AWS_PRESIGNED_URL",
            }
        )
    return {"credential_infos": infos}


def add_logged_model(workspace: Workspace, name: str, folder: Path, run_id: str) -> str:
    """A model that a run logged, as MLflow 3 keeps it: beside the run. Returns its id."""
    model_id = f"m-{secrets.token_hex(16)}"
    workspace.logged_models[model_id] = {"name": name, "folder": folder, "run_id": run_id}
    return model_id


def _logged_model(request: Any, model_id: str) -> dict[str, Any]:
    found = request.workspace.logged_models.get(model_id)
    if found is None:
        raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Logged model '{model_id}' not found.")
    info = {
        "model_id": model_id,
        "experiment_id": "1",
        "name": found["name"],
        "source_run_id": found["run_id"],
        "status": "LOGGED_MODEL_READY",
        "artifact_uri": f"dbfs:/databricks/mlflow-tracking/1/logged_models/{model_id}",
    }
    return {"info": info, "data": {}}


def get_logged_model(request: Any, model_id: str) -> Any:
    return {"model": _logged_model(request, model_id)}


def search_logged_models(request: Any) -> Any:
    """Newest first, two a page; of the filters only name = '…'."""
    arguments, size = request.arguments(), 2
    name = arguments.get("filter", "").partition("name = '")[2].rstrip("'")
    known = request.workspace.logged_models
    ids = [model_id for model_id in reversed(known) if name in ("", known[model_id]["name"])]
    start = int(arguments.get("page_token") or 0)
    page: dict[str, Any] = {
        "models": [_logged_model(request, model_id) for model_id in ids[start : start + size]]
    }
    if start + size < len(ids):
        page["next_page_token"] = str(start + size)
    return page


def add_workspace_model(workspace: Workspace, name: str, folder: Path, run_id: str = "") -> str:
    """Register `folder` in the workspace registry. Returns the version."""
    model = workspace.models.setdefault(f"workspace/{name}", Model())
    version = str(len(model.versions) + 1)
    model.versions[version] = Version(folder, run_id)
    return version


def _workspace_version(request: Any, name: str, version: str) -> Version:
    model = request.workspace.models.get(f"workspace/{name}")
    if model is None or version not in model.versions:
        raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"Model version '{name}' {version} not found")
    return model.versions[version]


def get_workspace_version(request: Any) -> Any:
    arguments = request.arguments()
    found = _workspace_version(request, arguments["name"], str(arguments["version"]))
    return {
        "model_version": {
            "name": arguments["name"],
            "version": arguments["version"],
            "run_id": found.run_id,
            "status": "READY",
            "source": f"dbfs:/databricks/mlflow-tracking/1/{found.run_id}/artifacts/model",
        }
    }


def list_version_artifacts(request: Any) -> Any:
    arguments = request.arguments()
    found = _workspace_version(request, arguments["name"], str(arguments["version"]))
    return _listing(found.folder, arguments.get("path", ""))


def sign_version_artifact(request: Any) -> Any:
    arguments = request.arguments()
    found = _workspace_version(request, arguments["name"], str(arguments["version"]))
    given = storage.sign(request.workspace, found.folder / arguments["path"])
    return {"signed_uri": given["url"], "headers": given["headers"]}


def _listing(folder: Path, path: str) -> Any:
    base = folder / path
    files: list[dict[str, Any]] = []
    for entry in sorted(base.iterdir()) if base.is_dir() else []:
        item: dict[str, Any] = {"path": entry.relative_to(folder).as_posix(), "is_dir": entry.is_dir()}
        if entry.is_file():
            item["file_size"] = entry.stat().st_size
        files.append(item)
    return {"files": files}


_API = "/api/2.0/mlflow"
ROUTES: list[Route] = [
    ("GET", f"{_API}/runs/get", get_run),
    ("POST", f"{_API}/runs/log-batch", log_batch),
    ("GET", f"{_API}/artifacts/list", list_run_artifacts),
    ("POST", f"{_API}/artifacts/credentials-for-read", run_credentials),
    ("POST", f"{_API}/artifacts/credentials-for-write", run_credentials),
    ("POST", f"{_API}/logged-models/search", search_logged_models),
    ("GET", f"{_API}/logged-models/(?P<model_id>m-[0-9a-f]+)", get_logged_model),
    ("GET", f"{_API}/model-versions/get", get_workspace_version),
    ("GET", f"{_API}/model-versions/list-artifacts", list_version_artifacts),
    ("GET", f"{_API}/model-versions/get-signed-download-uri", sign_version_artifact),
]
