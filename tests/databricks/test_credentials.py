"""Credentials from Secrets Manager: every kind, every way they can be wrong, and that they stay secret."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.databricks.conftest import Pull
from tests.databricks.runner import failed
from tests.databricks.test_routes import check
from tests.databricks.workspace import CLIENT_ID, CLIENT_SECRET, TOKEN, Workspace

REGION = "eu-central-1"


@pytest.fixture(scope="module")
def aws() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(workspace: Workspace, aws: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Store a secret's text and name it in the environment, which holds no other credentials."""
    for name in ("DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET"):
        monkeypatch.delenv(name)
    for name in ("DATABRICKS_TOKEN", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(
            name, "stale-very-secret-token"
        )  # what an image may have baked in; also undone at the end
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    client = boto3.client("secretsmanager", endpoint_url=aws, region_name=REGION)

    def store(text: str) -> str:
        name = f"databricks-{len(client.list_secrets()['SecretList'])}"
        arn = client.create_secret(Name=name, SecretString=text)["ARN"]
        monkeypatch.setenv("MLA_DATABRICKS_SECRET_ARN", arn)
        return arn

    return store


def test_a_service_principal(store, workspace: Workspace, folder: Path, pull: Pull) -> None:
    store(json.dumps({"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}))
    check(pull(), folder)
    assert workspace.count("POST /oidc/v1/token")


def test_a_token_with_its_host(store, workspace: Workspace, folder, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    store(json.dumps({"token": TOKEN, "host": workspace.url}))
    check(pull(), folder)
    assert not workspace.count("POST /oidc/v1/token")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dose-very-secret-client-secret", ("no JSON object", "client_id and client_secret")),
        ('["dose-very-secret-client-secret"]', ("no JSON object",)),
        ('{"client_id": "a", "password": "very-secret"}', ("has the keys client_id, password",)),
        ('{"client_id": "a", "client_secret": ""}', ("has the keys client_id, client_secret",)),
        ("{}", ("has the keys none",)),
    ],
)
def test_a_secret_of_another_shape(text: str, words: tuple, store, pull: Pull) -> None:
    arn = store(text)
    failed(pull(), arn, *words)


def test_a_secret_that_does_not_exist(store, pull: Pull, monkeypatch) -> None:
    arn = f"arn:aws:secretsmanager:{REGION}:123456789012:secret:absent-AbCdEf"
    monkeypatch.setenv("MLA_DATABRICKS_SECRET_ARN", arn)
    failed(pull(), arn, "ResourceNotFoundException", "MLA_DATABRICKS_SECRET_ARN")


def test_a_secret_that_may_not_be_read(store, workspace: Workspace, pull: Pull, monkeypatch) -> None:
    store("{}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", workspace.url)  # the workspace answers in Secrets Manager's place
    workspace.fail("POST /$", status=400, body={"__type": "AccessDeniedException"}, times=9)
    failed(pull(), "AccessDeniedException", "secretsmanager:GetSecretValue")


def test_secrets_manager_out_of_reach(store, pull: Pull, monkeypatch) -> None:
    store("{}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    failed(pull(), "Cannot reach Secrets Manager", "VPC endpoint")


def test_a_wrong_secret_is_not_shown(store, pull: Pull) -> None:
    store(json.dumps({"client_id": CLIENT_ID, "client_secret": "other-very-secret-value"}))
    failed(pull(), "refused the credentials (oauth-m2m)", "MLA_DATABRICKS_SECRET_ARN")
