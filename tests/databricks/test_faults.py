"""What a workspace may do to a download: what can be survived is survived, the rest is explained."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from tests.databricks import storage
from tests.databricks.conftest import NAME, Pull
from tests.databricks.models import write_model_folder
from tests.databricks.runner import failed
from tests.databricks.test_routes import check
from tests.databricks.workspace import TOKEN, Workspace

WEIGHTS = {
    "vended": r"GET /unity-managed/.*safetensors",
    "files": r"GET /api/2.0/fs/files/.*safetensors",
    "presigned": r"GET /signed/model.safetensors",
}
ROUTES = sorted(WEIGHTS)
MIB = 1 << 20


@pytest.fixture(params=ROUTES)
def weights(request: pytest.FixtureRequest, workspace: Workspace) -> str:
    """Each route in turn: the pattern of its requests for the weights."""
    workspace.route = request.param
    return WEIGHTS[request.param]


# What a download survives


def test_a_body_that_breaks_off_is_resumed(weights: str, workspace: Workspace, folder, pull: Pull) -> None:
    workspace.fail(weights, cut=3 * MIB, times=2)
    check(pull(), folder)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert workspace.sent <= total + 2 * MIB, "what had come was fetched again"


def test_an_error_in_the_middle_is_retried(weights: str, workspace: Workspace, folder, pull: Pull) -> None:
    workspace.fail(weights, status=500, skip=1)
    check(pull(), folder)


def test_a_limited_rate_is_waited_for(weights: str, workspace: Workspace, folder, pull: Pull) -> None:
    workspace.fail(weights, status=429, times=2, headers={"Retry-After": "0.2"})
    check(pull(), folder)


def test_a_redirect_is_followed_without_credentials(
    weights: str, workspace: Workspace, folder: Path, pull: Pull
) -> None:
    """Another host gets the request, but not the token."""
    with Workspace() as elsewhere:
        url = storage.sign(elsewhere, folder / "artifacts" / "checkpoint" / "model.safetensors")["url"]
        workspace.fail(weights, status=307, times=99, headers={"Location": f"{url}&from=redirect"})
        check(pull(), folder)
        assert elsewhere.count("GET /signed/") >= 2
        assert elsewhere.authorizations == {""}


def test_expired_credentials_are_renewed(weights: str, workspace: Workspace, folder, pull: Pull) -> None:
    workspace.fail(weights, status=403, code="ExpiredToken", skip=1)
    check(pull(), folder)


def test_registry_calls_are_retried(workspace: Workspace, folder, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT", "20")
    workspace.fail("GET .*registered-models/alias", status=429)
    workspace.fail("POST .*/generate-temporary-credentials", status=503)
    workspace.route = "vended"
    check(pull(), folder)


# What it does not


def test_a_body_that_always_breaks_off(weights: str, workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.setattr("steps.registry.download.ATTEMPTS", 3)
    workspace.fail(weights, cut=0, times=99)
    failed(pull(), "download failed 3 times", "model.safetensors")


def test_an_error_that_stays(weights: str, workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.setattr("steps.registry.download.ATTEMPTS", 2)
    workspace.fail(weights, status=500, times=99)
    failed(pull(), "download failed 2 times", "model.safetensors", "answered 500")


def test_a_file_shorter_than_listed(weights: str, workspace: Workspace, pull: Pull) -> None:
    """A truncation that HTTP does not notice: the answer is consistent, the listing says more."""
    workspace.fail(weights, short=1000, times=99)
    failed(pull(), "model.safetensors", "in its listing")


CHECKSUMS = {"azure": "x-ms-blob-content-md5", "google": "x-goog-hash", "whole": "Content-MD5"}


@pytest.mark.parametrize("store", CHECKSUMS)
def test_a_checksum_in_a_header_is_checked(
    store: str, workspace: Workspace, folder: Path, pull: Pull
) -> None:
    """Content-MD5 of a part says nothing about the file, so there the small file is the one to look at."""
    name = "config.json" if store == "whole" else "model.safetensors"
    content = (folder / "artifacts" / "checkpoint" / name).read_bytes()
    prefix = "crc32c=AAAAAA==,md5=" if store == "google" else ""

    def give(data: bytes) -> None:
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        workspace.faults.clear()
        workspace.fail(f"GET .*{name}", times=99, headers={CHECKSUMS[store]: prefix + md5})

    give(b"another")
    failed(pull(), f"{name} has the MD5", "Register the model again")
    give(content)
    check(pull(), folder)


def test_credentials_refused_again_and_again(weights: str, workspace: Workspace, pull: Pull) -> None:
    workspace.fail(weights, status=403, times=99)
    failed(pull(), "refused the credentials again", "read access")


def test_a_redirect_in_a_circle(weights: str, workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.setattr("steps.registry.download.ATTEMPTS", 2)
    path = "/api/2.0/fs/files/Models/main/ml/tiny/1/artifacts/checkpoint/model.safetensors"
    workspace.fail(r"GET .*safetensors", status=302, times=999, headers={"Location": workspace.url + path})
    failed(pull(), "redirected in a circle")


def test_a_file_that_is_gone(weights: str, workspace: Workspace, pull: Pull) -> None:
    workspace.fail(weights, status=404, times=99)
    failed(pull(), "model.safetensors is listed but", "Register the model again")


@pytest.mark.parametrize(
    ("privilege", "securable"),
    [("USE_CATALOG", "main"), ("USE_SCHEMA", "main.ml"), ("EXECUTE", NAME)],
)
def test_a_missing_grant_is_named(privilege: str, securable: str, workspace: Workspace, pull: Pull) -> None:
    workspace.missing_grants.add((privilege, securable))
    failed(pull(), "permission denied", privilege.replace("_", " "), f"'{securable}'", "mla-pipeline doctor")


def test_a_wrong_client_secret(workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", "wrong-very-secret-one")
    failed(pull(), "credentials", "MLA_DATABRICKS_SECRET_ARN")


def test_an_expired_token(workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.delenv("DATABRICKS_CLIENT_ID")
    monkeypatch.delenv("DATABRICKS_CLIENT_SECRET")
    monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
    workspace.tokens.clear()
    failed(pull(), "refused the credentials", "MLA_DATABRICKS_SECRET_ARN")


def test_no_credentials_at_all(workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.delenv("DATABRICKS_CLIENT_ID")
    monkeypatch.delenv("DATABRICKS_CLIENT_SECRET")
    failed(pull(), "No credentials", "MLA_DATABRICKS_SECRET_ARN")


def test_no_host(workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.delenv("DATABRICKS_HOST")
    failed(pull(), "DATABRICKS_HOST is not set")


def test_a_host_that_does_not_answer(workspace: Workspace, pull: Pull, monkeypatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    failed(pull(), "No answer", "127.0.0.1:9")


def test_a_registry_that_limits_forever(workspace: Workspace, pull: Pull) -> None:
    workspace.fail("GET .*unity-catalog", status=429, times=999)
    failed(pull(), "limits the rate")


def test_a_registry_that_is_broken(workspace: Workspace, pull: Pull) -> None:
    workspace.fail("GET .*unity-catalog", status=500, times=999)
    failed(pull(), "databricks-uc failed", "Start the step again")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (f"models:/{NAME}@absent", ("no alias 'absent'", "champion (version 1)")),
        (f"models:/{NAME}/9", ("does not exist", "'9'")),
        ("models:/main.ml.absent@champion", ("main.ml.absent", "does not exist")),
        ("models:/tiny@champion", ("catalog.schema.model", "MLFLOW_REGISTRY_URI=databricks")),
    ],
)
def test_what_does_not_exist_is_named(uri: str, words: tuple, workspace: Workspace, pull: Pull) -> None:
    failed(pull(uri), *words)


def test_a_version_that_is_not_ready(workspace: Workspace, folder: Path, pull: Pull) -> None:
    version = workspace.add_model(NAME, folder)
    workspace.models[NAME].versions[version].status = "PENDING_REGISTRATION"
    failed(pull(f"models:/{NAME}/{version}"), "PENDING_REGISTRATION", "READY")


@pytest.mark.parametrize(
    ("entry", "words"),
    [("../evil", "leaves the model folder"), ("a\\b", "backslash"), ("artifacts/../../x", "leaves")],
)
def test_a_listing_that_leaves_the_folder(entry: str, words: str, workspace: Workspace, pull: Pull) -> None:
    workspace.extra_entries.append(entry)
    failed(pull(), words)
    assert not workspace.count(WEIGHTS["files"])


def test_a_file_replaced_during_the_download(
    workspace: Workspace, pull: Pull, tmp_path: Path, monkeypatch
) -> None:
    """The second part has another ETag than the first: two contents must not be glued together."""
    mine = write_model_folder(tmp_path / "mine", megabytes=8)
    version = workspace.add_model(NAME, mine)
    weights = mine / "artifacts" / "checkpoint" / "model.safetensors"
    original = workspace.fault_for

    def replace_after_first(line: str):
        if "safetensors" in line and workspace.count(WEIGHTS["files"]) == 3:  # after a byte for ranges
            weights.write_bytes(weights.read_bytes())
        return original(line)

    monkeypatch.setattr(workspace, "fault_for", replace_after_first)
    failed(pull(f"models:/{NAME}/{version}", "--workers", "1"), "another content in the store")


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1000"])
def test_a_number_of_transfers_that_makes_no_sense(workers: str, workspace: Workspace, pull: Pull) -> None:
    failed(pull(f"models:/{NAME}@champion", f"--workers={workers}"), "--workers", workers)
