"""doctor, provenance, image requirements: the real modules as processes, with the environment's settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner, Result

from pipelines import registry
from pipelines.cli import app
from pipelines.settings import Settings

NOWHERE = "http://127.0.0.1:9"
ARN = "arn:aws:sagemaker:us-east-1:123456789012:model-package/mla-models/7"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose sandbox.json names an empty MLflow store and no AWS."""
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # what the command sets is undone after the test
        monkeypatch.delenv(name)
    (tmp_path / "steps").mkdir()  # must not take the place of the repository's
    point(tmp_path, NOWHERE)
    return tmp_path


def point(folder: Path, endpoint_url: str) -> None:
    (folder / ".mla").mkdir(exist_ok=True)
    there = {
        "endpoint_url": endpoint_url,
        "mlflow_uri": f"sqlite:///{folder}/mlflow.db",
        "pid": os.getpid(),
    }
    (folder / ".mla" / "sandbox.json").write_text(json.dumps(there))


@pytest.fixture
def aws(folder: Path) -> Iterator[None]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    point(folder, f"http://{host}:{port}")
    yield
    server.stop()


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_doctor_tries_the_environments_registry(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "--json").exit_code == 1
    checks = {one["name"]: one for one in json.loads(capfd.readouterr().out)}
    assert checks["model URI"]["detail"] == Settings.load("local").parameters.release["ModelUri"]
    assert checks["registry"] == {
        "name": "registry",
        "state": "ok",
        "detail": f"sqlite:///{folder}/mlflow.db answers",
        "fix": "",
    }
    assert checks["model"]["state"] == "failed"


def test_doctor_takes_another_model(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "models:/a/b/c").exit_code == 1
    assert "FAILED" in capfd.readouterr().out


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize(("start", "words"), [(ARN, "Reading model package"), ("models:/gone/1", "gone")])
def test_provenance_of_what_is_not_there_is_one_line(
    start: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("provenance", start).exit_code == 2
    said = capfd.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if " INFO " not in line]
    assert len(lines) == 1
    assert words in lines[0]


def test_image_requirements_writes_what_the_image_lacks(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = folder / "model"
    model.mkdir()
    (model / "requirements.txt").write_text("torch==1.0\nno-such-thing>=2\n")
    assert command("image", "requirements", "model", "--write", "wanted.txt").exit_code == 1
    assert "conflicting" in capfd.readouterr().out
    assert (folder / "wanted.txt").read_text() == "torch==1.0\nno-such-thing>=2\n"
    (model / "requirements.txt").write_text("uvicorn\n")
    assert command("image", "requirements", "model").exit_code == 0


def test_without_a_sandbox_or_mlflow_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    result = command("provenance", ARN)
    assert result.exit_code == 1
    assert result.output.startswith("mla-pipeline: mlflow is not installed: ")
    assert "pip install" in result.output
    (folder / ".mla" / "sandbox.json").unlink()
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    result = command("doctor")
    assert result.exit_code == 1
    assert result.output.strip().splitlines() == [result.output.strip()]
    assert "no sandbox is running" in result.output


def test_no_secret_is_handed_over() -> None:
    variables = Settings.load("dev").mlflow.variables()
    assert variables["MLA_DATABRICKS_SECRET_ARN"].startswith("arn:aws:secretsmanager:")
    assert set(variables) == {
        "MLFLOW_TRACKING_URI",
        "MLFLOW_REGISTRY_URI",
        "DATABRICKS_HOST",
        "MLA_DATABRICKS_SECRET_ARN",
    }
