"""RecordRelease and RecordPromotion against Unity Catalog, whose tags have rules of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steps import record_release
from tests.databricks.conftest import NAME
from tests.databricks.runner import failed, run_step
from tests.databricks.tracking import add_run
from tests.databricks.workspace import Workspace
from tests.steps.test_record_release import ARN, document, give_promotion, give_release, record


@pytest.fixture
def run_id(workspace: Workspace, folder: Path) -> str:
    run_id = add_run(workspace)
    workspace.models[NAME].versions["1"].run_id = run_id
    return run_id


@pytest.mark.parametrize("run_files", [True, False])
def test_a_release(run_files: bool, workspace: Workspace, run_id: str, tmp_path: Path) -> None:
    workspace.run_files = run_files
    give_release(tmp_path, NAME, "1", run_id)
    document(record(tmp_path, "staging"))
    model = workspace.models[NAME]
    assert model.aliases == {"champion": "1", "staging": "1"}
    assert model.versions["1"].tags["mla_model_package_arn"] == ARN, (
        "Unity Catalog takes no '.' in a tag's key"
    )
    run = workspace.runs[run_id]
    assert run["tags"]["mla.model_package_arn"] == ARN
    assert run["metrics"]["mla.speedup"] == 2.5
    assert sorted(path.name for path in (run["folder"] / "mla-release").iterdir()) == [
        "evaluation.json",
        "report.html",
    ]


def test_a_promotion(workspace: Workspace, run_id: str, tmp_path: Path) -> None:
    give_promotion(tmp_path, NAME, "1", run_id)
    document(record(tmp_path, "production"))
    assert workspace.models[NAME].aliases["production"] == "1"
    assert workspace.models[NAME].versions["1"].tags["mla_endpoint"] == "production-endpoint"


def test_the_right_to_tag_is_missing(workspace: Workspace, run_id: str, tmp_path: Path) -> None:
    workspace.missing_grants.add(("APPLY_TAG", NAME))
    give_release(tmp_path, NAME, "1", run_id)
    failed(record(tmp_path, "staging"), "APPLY TAG", NAME)
    assert "staging" not in workspace.models[NAME].aliases


def test_the_model_belongs_to_somebody_else(workspace: Workspace, run_id: str, tmp_path: Path) -> None:
    workspace.models[NAME].owner = "data-scientists"
    give_release(tmp_path, NAME, "1", run_id)
    failed(record(tmp_path, "staging"), "not an owner", NAME, "says who owns it")


def test_the_registry_is_busy_for_a_moment(
    workspace: Workspace, run_id: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT", "20")
    workspace.fail("POST .*/set-tag", status=429)
    give_release(tmp_path, NAME, "1", run_id)
    document(record(tmp_path, "staging"))


def test_the_registry_stays_broken(workspace: Workspace, run_id: str, tmp_path: Path) -> None:
    workspace.fail("POST .*/registered-models/alias", status=500, times=99)
    give_release(tmp_path, NAME, "1", run_id)
    failed(record(tmp_path, "staging"), "failed with 500", "Start the step again")


def test_the_accelerated_model(workspace: Workspace, run_id: str, tmp_path: Path) -> None:
    """Unity Catalog copies the files, and takes no model without a signature."""
    give_release(tmp_path, NAME, "1", run_id)
    inputs = tmp_path / "processing" / "input"
    origin = {"name": NAME, "version": "1", "run_id": run_id, "model_uri": f"models:/{NAME}@champion"}
    origin |= {"checkpoint": "artifacts/checkpoint", "files": [], "signature": None}
    (inputs / "provenance" / "provenance.json").write_text(json.dumps(origin))
    evaluation = json.loads((inputs / "evaluation" / "evaluation.json").read_text())
    evaluation["requested"] = {"kv_cache_dtype": "float32"}
    (inputs / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    argv = ["--model-package-arn", ARN, "--endpoint-name", "e", "--stage", "staging"]
    argv += ["--register-accelerated", "main.ml.fast"]
    document(run_step(record_release.main, record_release.arguments, argv, tmp_path))
    model = workspace.models["main.ml.fast"]
    assert model.aliases == {"staging": "1"}
    assert model.versions["1"].status == "READY"
    assert (model.versions["1"].folder / "artifacts" / "kernel" / "index.json").is_file()
    assert workspace.models[NAME].versions["1"].tags["mla_accelerated"] == "models:/main.ml.fast/1"

    give_promotion(tmp_path, NAME, "1", run_id)
    document(record(tmp_path, "production"))
    assert model.aliases == {"staging": "1", "production": "1"}
