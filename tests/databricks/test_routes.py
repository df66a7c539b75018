"""PullModel through the real mlflow client, by every registry and every route to the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.databricks.conftest import NAME, Pull
from tests.databricks.models import write_model_folder
from tests.databricks.runner import Outcome, failed
from tests.databricks.tracking import add_logged_model, add_run, add_workspace_model
from tests.databricks.workspace import TOKEN, Workspace


def check(outcome: Outcome, folder: Path) -> dict:
    """The folder came whole, and provenance says so. Returns provenance.json."""
    assert outcome.code == 0, outcome.message
    document = json.loads((outcome.output("provenance") / "provenance.json").read_text())
    for file in document["files"]:
        data = (folder / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert (outcome.output("model") / file["path"]).read_bytes() == data
    assert len(document["files"]) == sum(path.is_file() for path in folder.rglob("*"))
    assert len(document["files"]) == sum(path.is_file() for path in outcome.output("model").rglob("*"))
    return document


@pytest.mark.parametrize("route", ["vended", "files", "presigned"])
def test_unity_catalog(route: str, workspace: Workspace, folder: Path, pull: Pull) -> None:
    workspace.route = route
    document = check(pull(), folder)
    assert (document["name"], document["version"], document["alias"]) == (NAME, "1", "champion")
    assert document["registry_uri"] == "databricks-uc"
    used = {"vended": "GET /unity-managed/", "files": "GET /api/2.0/fs/files/", "presigned": "GET /signed/"}
    assert workspace.count(used[route]) >= len(document["files"])
    assert all(not workspace.count(other) for key, other in used.items() if key != route)


def test_the_lineage_of_a_files_api_download_is_recorded(workspace: Workspace, pull: Pull) -> None:
    assert pull().code == 0
    assert workspace.count("POST .*/model-versions/emit-lineage")


def test_a_personal_token(workspace: Workspace, folder: Path, pull: Pull, monkeypatch) -> None:
    monkeypatch.delenv("DATABRICKS_CLIENT_ID")
    monkeypatch.delenv("DATABRICKS_CLIENT_SECRET")
    monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
    check(pull(f"models:/{NAME}/1"), folder)
    assert not workspace.count("POST /oidc/v1/token")


def test_the_workspace_registry(workspace: Workspace, folder: Path, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks")
    version = add_workspace_model(workspace, "tiny", folder)
    document = check(pull(f"models:/tiny/{version}"), folder)
    assert document["name"] == "tiny"
    assert workspace.count("GET .*/get-signed-download-uri")


@pytest.mark.parametrize("run_files", [True, False])
def test_a_run(run_files: bool, workspace: Workspace, folder: Path, pull: Pull) -> None:
    """Artifacts of runs come by the Files API; in workspaces that refuse it, by signed URLs."""
    workspace.run_files = run_files
    run_id = add_run(workspace)
    (workspace.runs[run_id]["folder"] / "model").symlink_to(folder)
    document = check(pull(f"runs:/{run_id}/model"), folder)
    assert document["run_id"] == run_id
    assert bool(workspace.count("POST .*/artifacts/credentials-for-read")) is not run_files


def test_a_logged_model_among_many_of_its_name(workspace: Workspace, folder: Path, pull: Pull) -> None:
    """Every run of an experiment logs a "model": the registry answers in pages, the newest first."""
    run_id = add_run(workspace)
    model_id = add_logged_model(workspace, "model", folder, run_id)
    for _ in range(5):
        add_logged_model(workspace, "model", folder.parent, "0" * 32)
    for uri in (f"runs:/{run_id}/model", f"models:/{model_id}"):
        document = check(pull(uri), folder)
        assert (document["run_id"], document["route"]) == (run_id, "logged-model")
    assert workspace.count("POST .*/logged-models/search") == 3


def test_a_registry_before_logged_models(workspace: Workspace, pull: Pull) -> None:
    run_id = add_run(workspace)
    workspace.fail("/logged-models/", status=404, code="ENDPOINT_NOT_FOUND", times=9)
    failed(pull(f"runs:/{run_id}/model"), "has no model at 'model'")
    failed(pull(f"models:/m-{'0' * 32}"), "does not know a request", "MLflow 3")


ODD = [
    "a b.txt",
    "50%.txt",
    "%2e%2e.txt",
    "a#b?c&d=+;.txt",
    "größe-日本😀.txt",
    "e\u0301.txt",
    " [x]{y}'\".txt",
    "-rf",
]


@pytest.mark.parametrize("route", ["vended", "files", "presigned", "run", "run-signed", "workspace"])
def test_names_of_every_kind(
    route: str, workspace: Workspace, pull: Pull, tmp_path: Path, monkeypatch
) -> None:
    mine = write_model_folder(tmp_path / "mine")
    (mine / "ein Ordner").mkdir()
    for name in ODD:
        (mine / "ein Ordner" / name).write_text(name)
    if route == "workspace":
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks")
        uri = f"models:/odd/{add_workspace_model(workspace, 'odd', mine)}"
    elif route.startswith("run"):
        workspace.run_files, run_id = route == "run", add_run(workspace)
        (workspace.runs[run_id]["folder"] / "my model").symlink_to(mine)
        uri = f"runs:/{run_id}/my model"
    else:
        workspace.route = route
        uri = f"models:/{NAME}/{workspace.add_model(NAME, mine)}"
    check(pull(uri), mine)


def test_a_folder_that_mlflow_cannot_ask_for(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    """It does not quote the name, takes the 404 for an empty folder, and would leave the files out."""
    mine = write_model_folder(tmp_path / "mine")
    (mine / "part %41").mkdir()
    (mine / "part %41" / "file").write_text("x")
    workspace.route = "presigned"
    failed(pull(f"models:/{NAME}/{workspace.add_model(NAME, mine)}"), "lists nothing in", "part %41", "% # ?")


@pytest.mark.parametrize("registry", ["databricks", ""])
@pytest.mark.parametrize("uri", ["models:/tiny@champion", f"models:/{NAME}/1"])
def test_what_the_workspace_registry_lacks(
    registry: str, uri: str, workspace, pull: Pull, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    failed(pull(uri), "mlflow.registry_uri: databricks-uc")
