"""A real `mlflow server` on loopback (SQLite, artifacts served over HTTP), started once a test session."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests


@functools.cache
def server_url() -> str:
    """URL of the session's server."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-server-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = (folder / "log").open("w")
    # A variable that an earlier test's client left behind would give the server another registry.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    atexit.register(_stop, process, folder)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=10).ok:
                return url
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not start:\n{(folder / 'log').read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
    shutil.rmtree(folder, ignore_errors=True)
