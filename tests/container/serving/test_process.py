"""`python -m container.serving` as SageMaker runs it: environment, port, SIGTERM."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(root: Path, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    environment = {
        **os.environ,
        "MLA_ML_ROOT": str(root),
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "MLA_KERNEL_BACKEND": "reference",
        **env,
    }
    command = [sys.executable, "-m", "container.serving", "serve"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_ready(process: subprocess.Popen[str], url: str) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ping").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


def test_sigterm_lets_a_running_stream_finish(tiny_folder: Path) -> None:
    with serving(link_root(tiny_folder)) as (process, url):
        wait_ready(process, url)
        body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
        lines: list[str] = []
        started = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{url}/invocations", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(30)
        process.send_signal(signal.SIGTERM)
        reader.join(30)
        assert lines[-2:] == ["data: [DONE]", ""]
        assert process.wait(30) == 0


def test_a_folder_without_a_model_ends_with_one_clear_line(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, _):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        expected = f"error: NotMlaModel: {tmp_path / 'model'} is not a folder; "
        assert output.splitlines()[-1].startswith(expected)


def test_a_port_in_use_ends_with_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(tmp_path, SAGEMAKER_BIND_TO_PORT=port) as (process, _):
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith(
        f"error: cannot listen on 0.0.0.0 port {port}: Address already in use"
    )


def test_ctrl_c_ends_without_a_traceback(tiny_folder: Path) -> None:
    with serving(link_root(tiny_folder)) as (process, url):
        wait_ready(process, url)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in output


def test_a_kernel_folder_without_the_backend(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    root = str(link_root(tiny_folder))
    with serving(
        tmp_path, MLA_ML_ROOT=root, MLA_KERNEL_DIR=str(tmp_path / "kernel"), MLA_KERNEL_BACKEND="cpu"
    ) as (
        process,
        _,
    ):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert str(tmp_path / "kernel") in output.splitlines()[-1]


def link_root(folder: Path) -> Path:
    """A root whose `model` is the MLflow model folder around the checkpoint."""
    root = folder.parents[1].parent / "root"
    root.mkdir(exist_ok=True)
    if not (root / "model").exists():
        (root / "model").symlink_to(folder.parents[1])
    return root
