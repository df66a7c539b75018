"""`doctor`: what is missing is said before a pipeline runs into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steps.registry import doctor
from steps.registry.doctor import diagnose
from tests.databricks.conftest import NAME
from tests.databricks.workspace import PRINCIPAL, Workspace

URI = f"models:/{NAME}@champion"


def states(uri: str = URI) -> dict[str, str]:
    return {check.name: check.state for check in diagnose(uri)}


def test_all_is_well(workspace: Workspace) -> None:
    assert states() == {
        "model URI": "ok",
        "credentials": "ok",
        "registry": "ok",
        "model": "ok",
        "files": "ok",
        f"APPLY TAG on {NAME}": "ok",
        f"ownership of {NAME}": "ok",
    }


@pytest.mark.parametrize(
    ("privilege", "securable", "grant"),
    [
        ("USE_CATALOG", "main", "GRANT USE CATALOG ON CATALOG main"),
        ("USE_SCHEMA", "main.ml", "GRANT USE SCHEMA ON SCHEMA main.ml"),
        ("EXECUTE", NAME, f"GRANT EXECUTE ON FUNCTION {NAME}"),
        ("APPLY_TAG", NAME, f"GRANT APPLY TAG ON FUNCTION {NAME}"),
    ],
)
def test_a_missing_grant(privilege: str, securable: str, grant: str, workspace: Workspace) -> None:
    if privilege in ("EXECUTE", "APPLY_TAG"):  # an owner would hold it
        workspace.models[NAME].owner = "data-scientists"
        workspace.groups = ["data-engineers"]
    workspace.missing_grants.add((privilege, securable))
    failed = [check for check in diagnose(URI) if check.state == "failed"]
    assert f"{grant} TO `{PRINCIPAL}`" in [check.fix for check in failed]
    missing = {f"{privilege.replace('_', ' ')} on {securable}"}
    ownership = {f"ownership of {NAME}"} if privilege == "APPLY_TAG" else set()
    assert {check.name for check in failed} - {"model"} == missing | ownership


def test_another_owner(workspace: Workspace) -> None:
    """Tags may be written with APPLY TAG; the alias may not."""
    workspace.models[NAME].owner = "data-scientists"
    [check] = [check for check in diagnose(URI) if check.state == "failed"]
    assert check.name == f"ownership of {NAME}"
    assert "data-scientists" in check.detail
    assert PRINCIPAL in check.detail
    assert check.fix.startswith(f"databricks registered-models update {NAME} --owner ")


def test_an_owner_holds_every_privilege(workspace: Workspace) -> None:
    """Which the list of effective privileges does not say."""
    workspace.missing_grants.add(("APPLY_TAG", NAME))
    workspace.models[NAME].owner = "data-scientists"
    workspace.groups = ["data-scientists"]
    found = states()
    assert (found[f"APPLY TAG on {NAME}"], found[f"ownership of {NAME}"]) == ("ok", "ok")


def test_an_owner_that_is_not_told(workspace: Workspace) -> None:
    workspace.fail("GET /api/2.1/unity-catalog/models/", status=403, times=99)
    assert states()[f"ownership of {NAME}"] == "unknown"


def test_grants_that_may_not_be_asked_are_unknown(workspace: Workspace) -> None:
    workspace.missing_grants.add(("EXECUTE", NAME))
    workspace.fail("GET .*/effective-permissions/", status=403, times=99)
    found = states()
    assert found["model"] == "failed"
    assert found[f"EXECUTE on {NAME}"] == "unknown"


def test_storage_that_refuses(workspace: Workspace) -> None:
    workspace.fail("GET /api/2.0/fs/files/", status=403, times=99)
    assert states()["files"] == "failed"


@pytest.mark.parametrize(
    ("status", "words"), [(403, "read access to the storage"), (500, "network route to the storage")]
)
def test_storage_that_fails_says_how(status: int, words: str, workspace: Workspace) -> None:
    workspace.fail("GET /api/2.0/fs/files/", status=status, times=99)
    [check] = [check for check in diagnose(URI) if check.state == "failed"]
    assert f"answered {status}" in check.detail
    assert words in check.fix


def test_a_name_of_one_level(workspace: Workspace) -> None:
    [check] = [check for check in diagnose("models:/tiny@champion") if check.state == "failed"]
    assert "catalog.schema.model" in check.detail


def test_a_folder_without_a_model(workspace: Workspace, tmp_path: Path) -> None:
    workspace.add_model("main.ml.empty", tmp_path)
    [check] = [check for check in diagnose("models:/main.ml.empty/1") if check.state == "failed"]
    assert (check.name, check.detail) == ("files", "0 files, but no MLmodel")


@pytest.mark.parametrize("address", ["htp://x", "http://[::1", "http://host:port", "file:///nowhere"])
def test_an_address_that_mlflow_does_not_take(address: str, workspace: Workspace, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    [check] = [check for check in diagnose("models:/a/1") if check.state == "failed"]
    assert check.name == "registry"
    assert "mlflow.tracking_uri" in check.fix


def test_nothing_works(monkeypatch, workspace: Workspace, capsys) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    assert doctor.main([URI]) == 1
    assert "FAILED   registry: No answer" in capsys.readouterr().out
    assert states("nonsense") == {"registry": "failed"}


def test_the_command(workspace: Workspace, capsys) -> None:
    assert doctor.main([URI, "--json"]) == 0
    assert {check["state"] for check in json.loads(capsys.readouterr().out)} == {"ok"}
    assert doctor.main([URI]) == 0
    assert "ok       files: 7 files" in capsys.readouterr().out
