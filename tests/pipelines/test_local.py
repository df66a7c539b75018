"""The servers of a local run, whatever the caller's shell holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from pipelines.local import Connection, MlflowServer, end, leashed


def test_the_servers_registry_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")  # nobody listens there
    server = MlflowServer(tmp_path / "mlflow")
    try:
        server.wait_until_healthy()
        models = f"{server.uri}/api/2.0/mlflow/registered-models"
        created = requests.post(f"{models}/create", json={"name": "mine"}, timeout=60)
        assert created.status_code == 200, created.text
        assert not server.has_alias("mine", "champion")
    finally:
        server.stop()


HERE = Connection("http://127.0.0.1:4599", "http://127.0.0.1:5000", os.getpid())


@pytest.mark.parametrize(
    "variable",
    [
        ("AWS_PROFILE", "nobody"),
        ("AWS_ENDPOINT_URL_SAGEMAKER", "http://127.0.0.1:9"),
        ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true"),
        ("AWS_USE_FIPS_ENDPOINT", "true"),
        ("AWS_SESSION_TOKEN", "real"),
    ],
)
def test_a_local_command_knows_no_other_aws(variable: tuple[str, str]) -> None:
    code = (
        "from pipelines.aws import Aws; from pipelines.local import Connection;"
        f"{HERE!r}.use(); client = Aws('us-east-1').sagemaker;"
        "print(client.meta.endpoint_url, client._get_credentials().get_frozen_credentials().token)"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = {**inherited, variable[0]: variable[1]}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.stdout.split() == [HERE.endpoint_url, "None"], ended.stderr


@pytest.mark.parametrize("given", [{}, {"NO_PROXY": "corp.example"}, {"no_proxy": "corp.example,localhost"}])
def test_a_proxy_of_the_shell_is_not_asked_for_loopback(given: dict[str, str]) -> None:
    code = (
        "import urllib.request; from botocore.utils import get_environ_proxies;"
        "from pipelines.local import without_proxy; without_proxy();"
        "print(get_environ_proxies('http://127.0.0.1:4599'), urllib.request.proxy_bypass('127.0.0.1:5000'),"
        "get_environ_proxies('https://far.example')['https'], get_environ_proxies('http://corp.example'))"
    )
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://proxy.example:3128")
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment = {**inherited, **proxies, **given}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    loopback, bypassed, far, *corp = ended.stdout.split(" ", 3)
    assert (loopback, bypassed, far) == ("{}", "True", "http://proxy.example:3128"), ended.stderr
    assert (corp[0].strip() == "{}") == bool(given)  # what the shell had excluded stays so


@pytest.mark.parametrize("content", ["", '{"endpoint_url', "{}", "[1]", '{"endpoint_url": "x", "port": 1}'])
def test_a_damaged_note_of_a_sandbox_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "sandbox.json").write_text(content)
    assert Connection.read(tmp_path) is None


def test_another_users_sandbox_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_yours(pid: int, number: int) -> None:
        raise PermissionError

    HERE.write(tmp_path)
    monkeypatch.setattr(os, "kill", not_yours)
    monkeypatch.setenv("MLA_STATE", str(tmp_path))
    assert Connection.read() == HERE
    assert [path.name for path in tmp_path.iterdir()] == ["sandbox.json"]


def test_a_leashed_command_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """The training of the demo model: whoever is killed with SIGKILL cannot stop it himself."""
    code = (
        "import pathlib, time; from pipelines.local import leashed;"
        "leashed(['sh', '-c', 'echo $$; exec sleep 600'], {}, pathlib.Path('log')); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().endswith("\n"))
    child = Path("/proc") / (tmp_path / "log").read_text().strip()
    parent.kill()
    parent.wait()
    wait_for(lambda: not child.exists())


def test_a_leashed_command_gives_its_exit_status(tmp_path: Path) -> None:
    process = leashed(["sh", "-c", "exit 7"], {}, tmp_path / "log")
    assert process.wait(20) == 7
    end(process)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
