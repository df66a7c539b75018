"""PullModel against a real MLflow server: every way to name a model, and every way it can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from steps import pull_model
from tests.databricks.mlflow_server import server_url
from tests.databricks.models import CONFIG, write_model_folder
from tests.databricks.runner import Outcome, failed, run_step

ROOT = Path(__file__).resolve().parents[2]
SAFETENSORS = "artifacts/checkpoint/model.safetensors"


class Server:
    """The session's MLflow server, with registered models made of given folders."""

    def __init__(self, url: str) -> None:
        import mlflow

        self.url = url
        self.client = mlflow.MlflowClient(tracking_uri=url, registry_uri=url)

    def register(self, name: str, folder: Path) -> tuple[str, str]:
        """Log `folder` as it is to a run and register it. Returns (version, run id)."""
        run_id = self.client.create_run("0").info.run_id
        self.client.log_artifacts(run_id, str(folder), "model")
        self.client.set_terminated(run_id)
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/model"
        version = self.client.create_model_version(name, source, run_id)
        return str(version.version), run_id


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(server_url())


@pytest.fixture(scope="module")
def registered(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A good model with the alias champion: its folder, version and run id."""
    folder = write_model_folder(tmp_path_factory.mktemp("good"), megabytes=5)
    version, run_id = server.register("good", folder)
    server.client.set_registered_model_alias("good", "champion", version)
    return folder, version, run_id


@pytest.fixture
def pull(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run PullModel for a URI against the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

    def run(uri: str, *options: str) -> Outcome:
        return run_step(
            pull_model.main, pull_model.arguments, ["--model-uri", uri, *options], tmp_path / "ml"
        )

    return run


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("form", ["models:/good@champion", "models:/good/{version}", "runs:/{run_id}/model"])
def test_every_form_of_uri_brings_the_whole_folder(form: str, registered, pull) -> None:
    folder, version, run_id = registered
    uri = form.format(version=version, run_id=run_id)
    outcome = pull(uri)
    assert outcome.code == 0, outcome.message
    assert hashes(outcome.output("model")) == hashes(folder)

    document = json.loads((outcome.output("provenance") / "provenance.json").read_text())
    named = uri.startswith("models:")
    assert document["model_uri"] == uri
    assert document["name"] == ("good" if named else "-")
    assert document["version"] == (version if named else "-")
    assert document["alias"] == ("champion" if "@" in uri else "-")
    assert document["run_id"] == run_id
    assert {file["path"]: file["sha256"] for file in document["files"]} == hashes(folder)
    assert document["total_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert document["checkpoint"] == "artifacts/checkpoint"
    assert document["mla"]["kv_lora_rank"] == CONFIG["kv_lora_rank"]
    assert document["mla"]["num_attention_heads"] == CONFIG["num_attention_heads"]
    assert document["requirements"] == ["mlflow==3.17.2", "safetensors>=0.6"]
    assert document["input_example"] == ["To be"]
    assert document["flavors"] == ["python_function"]


def test_a_model_logged_by_mlflow_itself(server: Server, pull, tmp_path: Path) -> None:
    """MLflow 3 keeps a logged model beside its run; the registry's source is then models:/m-…"""
    import mlflow

    folder = write_model_folder(tmp_path / "folder")
    mlflow.set_tracking_uri(server.url)
    with mlflow.start_run() as run:
        info = mlflow.pyfunc.log_model(
            name="tiny",
            python_model=str(folder / "model.py"),
            artifacts={"checkpoint": str(folder / "artifacts" / "checkpoint")},
            pip_requirements=["safetensors"],
        )
    version = mlflow.register_model(info.model_uri, "logged").version
    for uri in (f"models:/logged/{version}", f"runs:/{run.info.run_id}/tiny", info.model_uri):
        outcome = pull(uri)
        assert outcome.code == 0, outcome.message
        document = json.loads((outcome.output("provenance") / "provenance.json").read_text())
        assert document["run_id"] == run.info.run_id
        assert (outcome.output("model") / document["checkpoint"] / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/good@chamption", ("no alias 'chamption'", "champion (version")),
        ("models:/good/99", ("does not exist", "version=99")),
        ("models:/absent@champion", ("absent", "does not exist")),
        ("models:/absent/1", ("absent", "does not exist")),
        ("runs:/00000000000000000000000000000000/model", ("does not exist",)),
        ("runs:/{run_id}/absent", ("no model at 'absent'",)),
        ("models:/good/Production", ("stage", "@champion")),
        ("models:/good/latest", ("latest", "@champion")),
        ("s3://bucket/model", ("is no model URI", "models:/NAME@ALIAS")),
    ],
)
def test_what_does_not_exist_is_named(uri: str, words: tuple[str, ...], registered, pull) -> None:
    failed(pull(uri.format(run_id=registered[2])), *words)


def test_unreachable_server(pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter22@127.0.0.1:9")
    message = failed(pull("models:/good@champion"), "No answer", "127.0.0.1:9", "network")
    assert "hunter22" not in message


def test_no_tracking_uri(pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    failed(pull("models:/good@champion"), "MLFLOW_TRACKING_URI is not set")


def truncated(folder: Path) -> None:
    path = folder / SAFETENSORS
    path.write_bytes(path.read_bytes()[:-1000])


def pickled_by_name(folder: Path) -> None:
    (folder / "artifacts" / "checkpoint" / "pytorch_model.bin").write_bytes(b"harmless")


def pickled_by_content(folder: Path) -> None:
    (folder / "artifacts" / "scaler.dat").write_bytes(pickle.dumps({"a": 1}))


def without_mla(folder: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "kv_lora_rank"}
    (folder / "artifacts" / "checkpoint" / "config.json").write_text(json.dumps(config))


def another_architecture(folder: Path) -> None:
    config = CONFIG | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "artifacts" / "checkpoint" / "config.json").write_text(json.dumps(config))


def without_mlmodel(folder: Path) -> None:
    (folder / "MLmodel").unlink()


def broken_mlmodel(folder: Path) -> None:
    (folder / "MLmodel").write_text("flavors: [")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, (SAFETENSORS, "truncated", "Log the model again")),
        (pickled_by_name, ("pytorch_model.bin", "by its name", "--allow-pickle true")),
        (pickled_by_content, ("artifacts/scaler.dat", "begins as a pickle", "--allow-pickle true")),
        (without_mla, ("no multi-head latent attention", "kv_lora_rank")),
        (another_architecture, ("no multi-head latent attention", "llama")),
        (without_mlmodel, ("no MLmodel",)),
        (broken_mlmodel, ("MLmodel is no YAML",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_model_is_refused(damage, words, server: Server, pull, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "bad")
    damage(folder)
    version, _ = server.register("bad", folder)
    failed(pull(f"models:/bad/{version}"), *words)


@pytest.mark.parametrize("damage", [pickled_by_name, pickled_by_content])
def test_pickles_pass_when_allowed(damage, server: Server, pull, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "trusted")
    damage(folder)
    version, _ = server.register("trusted", folder)
    outcome = pull(f"models:/trusted/{version}", "--allow-pickle", "true")
    assert outcome.code == 0, outcome.message
    assert hashes(outcome.output("model")) == hashes(folder)


@pytest.mark.slow
def test_as_a_process(registered, server: Server, tmp_path: Path) -> None:
    """`python -m steps.pull_model`, as the pipeline's ContainerEntrypoint has it."""
    command = [sys.executable, "-m", "steps.pull_model", "--model-uri", "models:/good@champion"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.url, "MLA_ML_ROOT": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "processing" / "output" / "model" / SAFETENSORS).is_file()
    assert "list index out of range" not in result.stdout + result.stderr


def test_the_server_answers_ranges(registered, server: Server) -> None:
    """The downloader resumes by HTTP range; if MLflow's server stops answering them, large pulls suffer."""
    run = server.client.get_run(registered[2])
    path = run.info.artifact_uri.removeprefix("mlflow-artifacts:/")
    url = f"{server.url}/api/2.0/mlflow-artifacts/artifacts/{path}/model/{SAFETENSORS}"
    answer = requests.get(url, headers={"Range": "bytes=10-19"}, timeout=10)
    assert answer.status_code == 206
    assert len(answer.content) == 10
