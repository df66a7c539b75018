"""SageMaker managed MLflow: the tracking URI is an ARN, requests are signed, files lie in S3.

The plug-in derives the service's address from the ARN; SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT leads it to a
stand-in that demands what the service demands and forwards to a real MLflow server. S3 is moto's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import mlflow
import pytest
import requests
from moto.server import ThreadedMotoServer

from tests.databricks.conftest import Pull
from tests.databricks.mlflow_server import server_url
from tests.databricks.runner import Outcome, failed
from tests.databricks.test_routes import check
from tests.steps.test_record_release import document, give_release, record

ROOT = Path(__file__).resolve().parents[2]
REGION = "eu-central-1"
ARN = f"arn:aws:sagemaker:{REGION}:123456789012:mlflow-tracking-server/models"
APP_ARN = f"arn:aws:sagemaker:{REGION}:123456789012:mlflow-app/app-1"
KEY = "AKIATESTING"
NAME = "tiny"
SIGNED_FOR = {  # service in the signature's scope, by the header that routes the request
    "x-mlflow-sm-tracking-server-arn": "sagemaker-mlflow",
    "x-sm-mlflow-app-arn": "sagemaker",
}


class Service(ThreadingHTTPServer):
    """Forwards to `server_url()` what is signed for the service and names the ARN; refuses the rest.

    Attributes:
        accepted: method and path of each forwarded request.
        denied: an action that the caller's role lacks, "" for none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.accepted: list[str] = []
        self.denied = ""
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        named = {header: self.headers.get(header) for header in SIGNED_FOR}
        [(header, arn)] = [(header, arn) for header, arn in named.items() if arn] or [("", "")]
        signed_for = SIGNED_FOR.get(header, "nothing")
        scope = rf"AWS4-HMAC-SHA256 Credential={KEY}/\d{{8}}/{REGION}/{signed_for}/aws4_request, "
        signed = re.match(scope, self.headers.get("Authorization", ""))
        if not signed or arn not in (ARN, APP_ARN):
            return self._answer(403, b'{"Message": "Missing Authentication Token"}')
        if self.server.denied:
            text = f"User is not authorized to perform: sagemaker-mlflow:{self.server.denied}"
            return self._answer(403, json.dumps({"Message": text}).encode())
        self.server.accepted.append(f"{self.command} {self.path.split('?')[0]}")
        kind = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        answer = requests.request(self.command, server_url() + self.path, data=body, headers=kind, timeout=60)
        self._answer(answer.status_code, answer.content)

    do_GET = do_POST = do_PATCH = do_DELETE = _forward

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # moto runs in this process, and logs each URL
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def service(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for name in (
        "MLFLOW_TRACKING_TOKEN",
        "MLA_DATABRICKS_SECRET_ARN",
        "MLFLOW_REGISTRY_URI",
        "AWS_SESSION_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    with Service() as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", ARN)
        monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", service.url)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3)
        monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-key")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        yield service
        service.shutdown()
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture
def version(service: Service, s3: str, folder: Path) -> mlflow.entities.model_registry.ModelVersion:
    """A registered model whose run keeps its artifacts in S3, as the service's runs do."""
    client = mlflow.MlflowClient(tracking_uri=server_url(), registry_uri=server_url())
    store = boto3.client("s3", endpoint_url=s3, region_name=REGION)
    bucket = f"mlflow-{uuid.uuid4().hex}"
    store.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    experiment = client.create_experiment(bucket, artifact_location=f"s3://{bucket}/{bucket}")
    run = client.create_run(experiment)
    prefix = run.info.artifact_uri.removeprefix(f"s3://{bucket}/")
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/model/{path.relative_to(folder).as_posix()}"
            store.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    name = f"{NAME}-{bucket}"
    client.create_registered_model(name)
    version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    client.set_registered_model_alias(name, "champion", version.version)
    return version


@pytest.mark.parametrize("arn", [ARN, APP_ARN])
def test_a_model_is_pulled(arn: str, service, version, folder, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", arn)
    written = check(pull(f"models:/{version.name}@champion"), folder)
    assert (written["version"], written["run_id"]) == (version.version, version.run_id)
    assert (written["tracking_uri"], written["registry_uri"]) == (arn, arn)
    assert any(call.endswith("/registered-models/alias") for call in service.accepted)


def test_a_run_is_pulled(service, version, folder, pull: Pull) -> None:
    check(pull(f"runs:/{version.run_id}/model"), folder)


def test_a_release_is_recorded(service, version, tmp_path: Path) -> None:
    give_release(tmp_path, version.name, version.version, version.run_id)
    document(record(tmp_path, "staging"))
    client = mlflow.MlflowClient(tracking_uri=server_url(), registry_uri=server_url())
    assert client.get_model_version_by_alias(version.name, "staging").tags["mla.speedup"] == "2.5"
    files = [file.path for file in client.list_artifacts(version.run_id, "mla-release")]
    assert files == ["mla-release/evaluation.json", "mla-release/report.html"]


def test_a_role_without_the_permission_is_told_which(service, pull: Pull) -> None:
    service.denied = "GetModelVersionByAlias"
    message = failed(
        pull(f"models:/{NAME}@champion"), "permission denied", service.denied, "sagemaker-mlflow:*"
    )
    assert "USE CATALOG" not in message


# The job image: the plug-in lies in a folder of its own. A process with other packages stands in for it.


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of links, as the image has: one without the plug-in (/opt/venv), one with nothing else."""
    installed = Path(mlflow.__file__).parents[1]
    environment, plugin = (tmp_path_factory.mktemp(name) for name in ("environment", "plugin"))
    for entry in installed.iterdir():
        folder = plugin if entry.name.startswith("sagemaker_mlflow") else environment
        (folder / entry.name).symlink_to(entry)
    return environment, plugin


def pull_in_the_image(
    packages: tuple[Path, Path], uri: str, root: Path, **variables: str
) -> tuple[Outcome, str]:
    """PullModel as a process that has only these packages. Returns its outcome and its log."""
    path = os.pathsep.join((str(ROOT), str(packages[0])))
    environment = {**os.environ, "PYTHONPATH": path, "MLA_ML_ROOT": str(root), **variables}
    code = (
        "import runpy, sys; sys.argv[0] = 'pull_model'\n"
        "try: runpy.run_module('steps.pull_model', run_name='__main__', alter_sys=True)\n"
        "finally: print('plug-in imported:', 'sagemaker_mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "--model-uri", uri],
        env=environment,
        capture_output=True,
        text=True,
    )
    message = root / "output" / "message"
    outcome = Outcome(done.returncode, message.read_text() if message.exists() else "", root)
    return outcome, done.stdout + done.stderr


@pytest.mark.slow
def test_the_image_loads_the_plug_in_for_an_arn(packages, service, version, folder, tmp_path: Path) -> None:
    outcome, log = pull_in_the_image(
        packages, f"models:/{version.name}@champion", tmp_path / "ml", MLA_SAGEMAKER_MLFLOW=str(packages[1])
    )
    assert outcome.code == 0, log
    assert check(outcome, folder)["tracking_uri"] == ARN
    assert "plug-in imported: True" in log


@pytest.mark.slow
def test_the_image_loads_it_for_nothing_else(packages, service, tmp_path: Path) -> None:
    outcome, log = pull_in_the_image(
        packages,
        "models:/absent@champion",
        tmp_path,
        MLFLOW_TRACKING_URI=server_url(),
        MLA_SAGEMAKER_MLFLOW=str(packages[1]),
    )
    failed(outcome, "absent", "does not exist")
    assert "plug-in imported: False" in log
    assert "list index out of range" not in log


@pytest.mark.slow
def test_an_image_without_the_plug_in_is_named(packages, service, tmp_path: Path) -> None:
    outcome, _ = pull_in_the_image(packages, "models:/a@b", tmp_path)
    failed(outcome, ARN, "lacks its plug-in", "package sagemaker-mlflow")
    assert not service.accepted


def test_a_workstation_that_has_it_hears_no_complaint(service, pull: Pull, monkeypatch, caplog) -> None:
    """The SageMaker SDK installs it beside mlflow, where it meddles with every server's requests."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_url())
    failed(pull("models:/absent@champion"), "does not exist")
    assert "list index out of range" not in caplog.text


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-tracking-server",
        "arn:aws:sagemaker:eu-central-1:123456789012:endpoint/x",
        "arn:aws:s3:::bucket",
    ],
)
def test_another_arn_is_refused(arn: str, service, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", arn)
    failed(pull("models:/a@b"), arn, "mlflow-tracking-server/NAME")
    assert not service.accepted
