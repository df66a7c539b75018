"""The sandbox as a process: starts, stops, and leaves no child behind; isolation gives an own /opt/ml."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipelines.sandbox.account import prepare_account
from pipelines.sandbox.isolation import choose
from pipelines.sandbox.server import REPOSITORY

KINDS = ("bubblewrap", "unshare", "environment")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.sandbox", *arguments]


def processes_with(mark: str) -> list[int]:
    """Python processes with this argument; wrappers that still have to exec do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_text().split("\0")
            if mark in arguments and arguments[0] == sys.executable:
                found.append(int(path.parent.name))
    return found


def eventually(condition, patience_s: float = 10) -> bool:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    try:
        choose(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def process(kind: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A sandbox process and its URL."""
    arguments = command("--port", "0", "--state", str(tmp_path), "--isolation", kind)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as running:
        assert running.stdout
        line = running.stdout.readline()
        yield running, re.search(r"AWS_ENDPOINT_URL=(\S+)", line)[1]  # type: ignore[index]
        running.kill()


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *((kind, signal.SIGKILL) for kind in KINDS),
        ("environment", signal.SIGTERM),
        ("bubblewrap", signal.SIGINT),
    ],
    indirect=["kind"],
)
def test_takes_its_jobs_along(process: tuple[subprocess.Popen[str], str], number: signal.Signals) -> None:
    running, url = process
    mark = f"mark-{uuid.uuid4()}"
    role = prepare_account(url, bucket="bucket", role_name="r", region="us-east-1")
    client = boto3.client(
        "sagemaker",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_processing_job(
        ProcessingJobName="long",
        ProcessingResources={
            "ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 1}
        },
        AppSpecification={
            "ImageUri": "i",
            "ContainerEntrypoint": ["python3", "-c", "import time; time.sleep(60)", mark],
        },
        RoleArn=role,
    )
    assert eventually(lambda: bool(processes_with(mark)))
    running.send_signal(number)
    running.wait(10)
    assert eventually(lambda: not processes_with(mark)), f"left behind: {processes_with(mark)}"
    if number != signal.SIGKILL:
        assert running.returncode == 0


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_isolation_gives_an_own_tree_and_passes_the_exit_status(kind: str, tmp_path: Path) -> None:
    isolation = choose(kind)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "x").write_text("original")
    script = """
root=${MLA_ML_ROOT:-/opt/ml}
test "$(ls $root)" = input || exit 10
test "$(cat $root/input/x)" = original || exit 11
test -d /usr/bin || exit 12
echo written > $root/output || exit 13
echo changed > $root/input/x
exit 5
"""
    wrapped = isolation.wrap(["sh", "-c", script], tmp_path, ["input"])
    done = subprocess.run(wrapped.argv, env=os.environ | wrapped.environment, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert (tmp_path / "output").read_text() == "written\n"
    if isolation.protects_inputs:
        assert (tmp_path / "input" / "x").read_text() == "original"


def test_a_taken_port_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = command("--port", str(port), "--state", str(tmp_path))
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"error: port {port} on 127.0.0.1: .*; choose another one, or 0 for a free one\n", done.stderr
    )
    assert not done.stdout
