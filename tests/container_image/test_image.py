"""Both images, built from the Dockerfile and started as SageMaker starts them, without Docker."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container_image import buildah
from tests.container_image.buildah import Engine

REASON = buildah.obstacle()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("images"))
    engine.make_base(buildah.bases())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def job_image(engine: Engine) -> str:
    return engine.build("job")


@pytest.fixture(scope="module")
def serve_image(engine: Engine) -> str:
    return engine.build("serve")


@pytest.fixture(scope="module")
def kernel(engine: Engine, job_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CompileKernel writes in the job image: the folder kernel/."""
    processing = tmp_path_factory.mktemp("processing")
    (processing / "output" / "kernel").mkdir(parents=True)
    log = processing / "log"
    job = engine.start(
        job_image,
        *("python3", "-m", "steps.compile_kernel", "--backend", "cpu"),
        volumes={processing / "output": "/opt/ml/processing/output"},
        environment={},
        log=log,
    )
    assert job.wait(timeout=600) == 0, log.read_text()
    return processing / "output" / "kernel"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow model folder with an untrained checkpoint."""
    from examples.tiny_mla import TinyConfig, TinyMla, save_checkpoint

    folder = tmp_path_factory.mktemp("model")
    checkpoint = folder / "artifacts" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n")
    save_checkpoint(TinyMla(TinyConfig()), checkpoint)
    return folder


def test_job_image_compiles_the_cpu_kernel(kernel: Path) -> None:
    index = json.loads((kernel / "index.json").read_text())
    assert list(index["packages"]) == ["cpu"]
    assert (kernel / "cpu" / "libmla_decode.so").stat().st_size > 0


def test_images_leave_out_what_belongs_to_the_workstation(
    engine: Engine, job_image: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    listing = engine.start(
        job_image, *("python3", "-m", "pip", "list", "--format=freeze"), volumes={}, environment={}, log=log
    )
    assert listing.wait(timeout=120) == 0, log.read_text()
    installed = {line.split("==")[0].lower() for line in log.read_text().splitlines()}
    assert {"torch", "mlflow", "boto3", "safetensors"} <= installed
    assert not {name for name in installed if name.startswith("sagemaker")} | installed & {"moto", "pytest"}


def test_job_image_keeps_the_plug_in_of_managed_mlflow_aside(
    engine: Engine, job_image: str, tmp_path: Path
) -> None:
    """Where mlflow does not load it for every server; steps/registry/managed.py does, for an ARN."""
    code = (
        "import importlib.util as u; from steps.registry import managed; "
        "assert not u.find_spec('sagemaker_mlflow'); "
        "managed.prepare('arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/x'); "
        "import sagemaker_mlflow"
    )
    log = tmp_path / "log"
    process = engine.start(job_image, "python3", "-c", code, volumes={}, environment={}, log=log)
    assert process.wait(timeout=120) == 0, log.read_text()


def test_labels_say_what_it_is(engine: Engine, serve_image: str) -> None:
    labels = engine.labels(serve_image)
    assert labels["org.opencontainers.image.title"] == "mla-pipeline serve"
    assert labels["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"


def test_serve_image_answers_as_an_endpoint(
    engine: Engine, serve_image: str, kernel: Path, model: Path, tmp_path: Path
) -> None:
    port = _free_port()
    log = tmp_path / "log"
    _open_to_readers(model, kernel)
    server = engine.start(
        serve_image,
        "serve",
        volumes={model: "/opt/ml/model", kernel: "/opt/ml/additional-model-data-sources/kernel"},
        environment={"SAGEMAKER_BIND_TO_PORT": str(port), "MLA_KERNEL_BACKEND": "cpu"},
        log=log,
    )
    try:
        _until_healthy(port, server, log)
        answer = _post(port, {"prompt": "MLA", "max_tokens": 4, "return_token_ids": True})
        assert len(answer["choices"][0]["token_ids"]) == 4
        assert _user_of(server.pid) == 10001
    finally:
        _child(server.pid, signal.SIGTERM)
        code = server.wait(timeout=30)
    assert code == 0, log.read_text()  # SIGTERM reached the server, which drained and ended


def _open_to_readers(*folders: Path) -> None:
    """pytest's folders are private to their owner; the service mounts readable ones."""
    for folder in folders:
        for parent, _, files in os.walk(folder):
            os.chmod(parent, 0o755)
            for name in files:
                os.chmod(Path(parent, name), 0o644)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_healthy(port: int, server: Any, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as response:
                assert response.status == 200
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"never healthy:\n{log.read_text()}")


def _post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _child(pid: int, number: signal.Signals) -> None:
    """Signal the container's process 1, which bubblewrap's process waits for."""
    for child in _children(pid):
        os.kill(child, number)


def _user_of(pid: int) -> int:
    """Real user of the container's process 1."""
    (child,) = _children(pid)
    lines = Path(f"/proc/{child}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Uid:")).split()[1])
