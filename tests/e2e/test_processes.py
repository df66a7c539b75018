"""Whatever ends `mla-pipeline`, nothing that it started goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.local import Connection
from pipelines.measure import tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def alive(pids: list[int]) -> list[int]:
    """Those that run; a zombie waits for its parent only."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_survives(tmp_path: Path, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "sandbox", "--port", "0", "--mlflow-port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    repository = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [*command, "--state", str(tmp_path)],
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(3)]
    assert "Ctrl-C" in lines[-1]
    assert Connection.read(tmp_path) is not None
    started = tree(process.pid)
    assert len(started) > 2  # the server and its workers
    process.send_signal(number)
    assert process.wait(30) == status
    deadline = time.monotonic() + 15
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(started) == []
    assert Connection.read(tmp_path) is None
