"""A workspace with one model, the environment that points at it, and the rule that no secret gets out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steps import pull_model
from tests.databricks.models import write_model_folder
from tests.databricks.runner import Outcome, run_step
from tests.databricks.workspace import CLIENT_ID, CLIENT_SECRET, TOKEN, Workspace

NAME = "main.ml.tiny"
Pull = Callable[..., Outcome]
_SECRETS = (CLIENT_SECRET, TOKEN, "very-secret", "X-Amz-Signature=", "X-Amz-Security-Token=")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of 8 MB: its weights come in two parts when a part is 4 MiB."""
    return write_model_folder(tmp_path_factory.mktemp("model"), megabytes=8)


@pytest.fixture
def workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace that holds NAME with the alias champion; the environment authenticates by OAuth M2M."""
    import mlflow

    for name in (
        "DATABRICKS_TOKEN",
        "MLFLOW_TRACKING_TOKEN",
        "MLA_DATABRICKS_SECRET_ARN",
        "AWS_ENDPOINT_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    with Workspace() as workspace:
        workspace.add_model(NAME, folder, alias="champion")
        monkeypatch.setenv("DATABRICKS_HOST", workspace.url)
        monkeypatch.setenv("DATABRICKS_CLIENT_ID", CLIENT_ID)
        monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", CLIENT_SECRET)
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks-uc")
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", workspace.url)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        monkeypatch.setenv("MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT", "2")
        monkeypatch.setattr("steps.registry.download.PART_BYTES", 4 << 20)
        yield workspace
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture
def pull(tmp_path: Path) -> Pull:
    """Run PullModel; a URI and further options."""

    def run(uri: str = f"models:/{NAME}@champion", *options: str) -> Outcome:
        return run_step(
            pull_model.main, pull_model.arguments, ["--model-uri", uri, *options], tmp_path / "ml"
        )

    return run


@pytest.fixture(autouse=True)
def no_secret_escapes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Neither the log, nor the exit message, nor a file below the outputs holds a secret."""
    capture = request.getfixturevalue("capsys" if "capsys" in request.fixturenames else "capfd")
    yield
    captured = capture.readouterr()
    texts = {"stdout": captured.out, "stderr": captured.err}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            texts[path.name] = path.read_text(errors="replace")
    for name, text in texts.items():
        for secret in _SECRETS:
            assert secret not in text, f"{name} holds {secret}: {text}"
