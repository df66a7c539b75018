"""RecordRelease and RecordPromotion against a real MLflow server."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from steps import record_release
from tests.databricks.mlflow_server import server_url
from tests.databricks.runner import Outcome, failed, run_step

ARN = "arn:aws:sagemaker:eu-central-1:123456789012:model-package/mla-demo/7"


@pytest.fixture(scope="module")
def client() -> mlflow.MlflowClient:
    url = server_url()
    return mlflow.MlflowClient(tracking_uri=url, registry_uri=url)


@pytest.fixture
def version(
    client: mlflow.MlflowClient, request: pytest.FixtureRequest
) -> mlflow.entities.model_registry.ModelVersion:
    """A fresh registered version with a finished run."""
    name = request.node.name
    run = client.create_run("0")
    client.set_terminated(run.info.run_id)
    client.create_registered_model(name)
    return client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_url())
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return tmp_path


def write(root: Path, channel: str, name: str, document: object) -> None:
    folder = root / "processing" / "input" / channel
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))


def give_release(root: Path, name: str, version: str, run_id: str) -> None:
    """The inputs of RecordRelease."""
    write(root, "provenance", "provenance.json", {"name": name, "version": version, "run_id": run_id})
    write(root, "kernel", "index.json", {"sha256": "ab" * 32})
    gate = {"correct": 1, "relative_error": 1.25e-3, "speedup": 2.5, "decode_latency_ms": 3.75}
    evaluation = {
        "backend": "cpu",
        "gate": gate | {"tokens_equal_percent": 100.0},
        "model": {"tokens_per_s": 250.0},
        "latency": {"cases": [{"name": "b=1, s_k=512", "p50_us": 42.0}]},
    }
    write(root, "evaluation", "evaluation.json", evaluation)
    write(root, "evaluation", "report.html", "<h1>passed</h1>")


def give_promotion(root: Path, name: str, version: str, run_id: str, arn: str = ARN) -> None:
    """The inputs of RecordPromotion."""
    metadata = {
        "MlflowModelName": name,
        "MlflowModelVersion": version,
        "MlflowRunId": run_id,
        "KernelSha256": "ab" * 32,
        "KernelBackend": "cpu",
        "RelativeError": "0.00125",
        "Speedup": "2.5",
        "DecodeLatencyMs": "3.75",
    }
    write(root, "package", "package.json", {"model_package_arn": arn, "customer_metadata": metadata})
    write(root, "deployment", "deployment.json", {"model_package_arn": arn, "endpoint_name": "live"})


def record(root: Path, stage: str) -> Outcome:
    argv = ["--model-package-arn", ARN, "--endpoint-name", f"{stage}-endpoint", "--stage", stage]
    argv += ["--register-accelerated", "-"] if stage == "staging" else []  # the pipeline parameter's default
    return run_step(record_release.main, record_release.arguments, argv, root)


def document(outcome: Outcome) -> dict:
    assert outcome.code == 0, outcome.message
    return json.loads((outcome.output("record") / "record.json").read_text())


def test_a_release_is_recorded_on_version_and_run(version, root: Path, client) -> None:
    give_release(root, version.name, version.version, version.run_id)
    written = document(record(root, "staging"))
    assert (written["name"], written["version"]) == (version.name, version.version)

    found = client.get_model_version_by_alias(version.name, "staging")
    assert found.version == version.version
    expected = {
        "mla.stage": "staging",
        "mla.verdict": "passed",
        "mla.model_package_arn": ARN,
        "mla.endpoint": "staging-endpoint",
        "mla.kernel_sha256": "ab" * 32,
        "mla.kernel_backend": "cpu",
        "mla.relative_error": "0.00125",
        "mla.speedup": "2.5",
        "mla.decode_latency_ms": "3.75",
    }
    assert found.tags == expected
    run = client.get_run(version.run_id)
    assert expected.items() <= run.data.tags.items()
    assert run.data.metrics == {
        "mla.relative_error": 1.25e-3,
        "mla.speedup": 2.5,
        "mla.decode_latency_ms": 3.75,
        "mla.tokens_equal_percent": 100.0,
        "mla.tokens_per_s": 250.0,
        "mla.kernel_p50_us.b_1_ s_k_512": 42.0,
    }
    artifacts = [file.path for file in client.list_artifacts(version.run_id, "mla-release")]
    assert artifacts == ["mla-release/evaluation.json", "mla-release/report.html"]
    assert run.info.status == "FINISHED"


def test_a_promotion_moves_the_alias_and_can_be_repeated(version, root: Path, client) -> None:
    older = client.create_model_version(version.name, version.source, version.run_id)
    client.set_registered_model_alias(version.name, "production", older.version)
    give_promotion(root, version.name, version.version, version.run_id)
    first, second = document(record(root, "production")), document(record(root, "production"))
    assert first["tags"] == second["tags"]
    found = client.get_model_version_by_alias(version.name, "production")
    assert found.version == version.version
    assert found.tags["mla.stage"] == "production"
    assert found.tags["mla.model_package_arn"] == ARN
    assert client.get_run(version.run_id).data.tags["mla.endpoint"] == "production-endpoint"


def test_a_model_given_by_its_run_is_recorded_there(version, root: Path, client) -> None:
    give_release(root, "-", "-", version.run_id)
    assert document(record(root, "staging"))["version"] == "-"
    assert client.get_run(version.run_id).data.tags["mla.stage"] == "staging"
    assert client.get_model_version(version.name, version.version).tags == {}


def test_a_run_that_is_gone_does_not_stop_the_version(version, root: Path, client) -> None:
    give_release(root, version.name, version.version, "0" * 32)
    written = document(record(root, "staging"))
    assert written["recorded"][0] == f"run {'0' * 32} not found"
    assert client.get_model_version(version.name, version.version).tags["mla.stage"] == "staging"


def test_a_deleted_run_does_not_stop_the_version(version, root: Path, client) -> None:
    """MLflow still answers for it, but lets nothing be written."""
    client.delete_run(version.run_id)
    give_release(root, version.name, version.version, version.run_id)
    assert document(record(root, "staging"))["recorded"][0] == f"run {version.run_id} not found"
    assert client.get_model_version_by_alias(version.name, "staging").tags["mla.stage"] == "staging"


def test_nothing_to_record_on(root: Path) -> None:
    give_release(root, "-", "-", "-")
    failed(record(root, "staging"), "neither an MLflow model version nor a run")


def test_a_version_that_is_gone(version, root: Path) -> None:
    give_release(root, version.name, "99", version.run_id)
    failed(record(root, "staging"), "Version 99", "does not exist")


def test_a_promotion_of_another_package_is_refused(version, root: Path, client) -> None:
    give_promotion(root, version.name, version.version, version.run_id, arn=ARN.replace("/7", "/8"))
    failed(record(root, "production"), "mla-demo/8", "mla-demo/7")
    assert client.get_model_version(version.name, version.version).tags == {}


def test_missing_input_is_named(root: Path) -> None:
    failed(record(root, "production"), "input channel 'package' is missing")
