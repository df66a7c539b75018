"""Faults that a server meets as a whole: each ends in a clear error, and those beside it go on."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from container.serving.engine import Engine
from kernels import BackendError, BuildError, KernelPackageError, build
from tests.container.serving.test_server import Server, post


def started(folder: Path) -> Server:
    gate = threading.Event()
    gate.set()
    server = Server(folder, gate)
    server.wait_ready()
    return server


@pytest.fixture
def without_tokenizer(tiny_folder: Path, tmp_path: Path) -> Iterator[Server]:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    server = started(tmp_path)
    yield server
    server.stop()


def test_a_model_without_a_tokenizer_takes_token_ids(without_tokenizer: Server) -> None:
    server = without_tokenizer
    refused = [
        post(server, prompt="text"),
        post(server, messages=[{"role": "user", "content": "text"}]),
        post(server, prompt=[5], stop="a"),
        post(server, inputs=["text"]),
    ]
    for answer in refused:
        assert answer.status_code == 400
        assert "tokenizer" in answer.json()["error"]["message"]
    answer = post(server, prompt=[5, 6], max_tokens=3, return_token_ids=True)
    assert len(answer.json()["choices"][0]["token_ids"]) == 3


def test_bad_requests_leave_a_running_stream_alone(tiny_folder: Path) -> None:
    server = started(tiny_folder)
    body = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True, "return_token_ids": True}
    alone = post(server, **body).json()["choices"][0]["token_ids"]
    bad = [b"{", b'{"prompt": [99999]}', b'{"prompt": "a", "max_tokens": 99999}', b'{"prompt": "a", "n": 99}']
    seen: list[int] = []
    with server.client.stream("POST", "/invocations", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                seen += json.loads(line[6:])["choices"][0]["token_ids"]
                if len(seen) % 8 == 1:
                    content = bad[len(seen) // 8 % len(bad)]
                    assert server.client.post("/invocations", content=content).status_code == 400
    assert seen == alone
    server.wait_idle()
    server.stop()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A compiled kernel of this machine."""
    try:
        build.build("cpu", tmp_path / "kernel")
    except BuildError as error:
        pytest.skip(str(error))
    return tmp_path / "kernel"


def test_a_kernel_of_another_machine_is_refused(tiny_folder: Path, artifact: Path) -> None:
    path = artifact / "cpu" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "machine": "riscv64"}))
    with pytest.raises(KernelPackageError, match="compiled for riscv64, this machine is"):
        Engine.load(tiny_folder, artifact, backend="cpu")


def test_a_kernel_of_another_target_is_refused(tiny_folder: Path, artifact: Path) -> None:
    shutil.move(artifact / "cpu", artifact / "hopper")
    index = json.loads((artifact / "index.json").read_text())
    (artifact / "index.json").write_text(
        json.dumps({**index, "packages": {"hopper": index["packages"]["cpu"]}})
    )
    with pytest.raises((KernelPackageError, BackendError), match="hopper"):
        Engine.load(tiny_folder, artifact, backend="hopper")
