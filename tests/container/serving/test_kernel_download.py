"""The kernel from S3 (moto) instead of a mounted folder: fetched, verified, served with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.server import ThreadedMotoServer

from container.serving.kernel_download import KernelDownloadError, download_kernel
from container.serving.settings import ServerSettings
from kernels import build
from kernels.package import KernelIndex
from tests.container.serving.test_process import link_root, serving, wait_ready

URI = "s3://models/run/CompileKernel/kernel/"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that was really compiled."""
    folder = tmp_path_factory.mktemp("kernel")
    build.build("cpu", folder)
    return folder


def upload(s3: Any, artifact: Path) -> None:
    s3.create_bucket(Bucket="models")
    for path in artifact.rglob("*"):
        if path.is_file():
            key = f"run/CompileKernel/kernel/{path.relative_to(artifact).as_posix()}"
            s3.put_object(Bucket="models", Key=key, Body=path.read_bytes())


@pytest.fixture
def s3(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        client = boto3.client("s3")
        upload(client, artifact)
        yield client


def test_what_arrives_is_what_was_built(s3: Any, artifact: Path, tmp_path: Path) -> None:
    sha256 = KernelIndex.load(artifact).sha256
    for name, uri in (("a", URI), ("b", URI.rstrip("/"))):
        index = download_kernel(uri, tmp_path / name, sha256)
        assert index.sha256 == sha256
        assert index.packages["cpu"].folder == tmp_path / name / "cpu"


def damage(s3: Any) -> None:
    s3.put_object(Bucket="models", Key="run/CompileKernel/kernel/cpu/libmla_decode.so", Body=b"\x7fELF evil")


def outside(s3: Any) -> None:
    s3.put_object(Bucket="models", Key="run/CompileKernel/kernel/../../etc/cron.d/x", Body=b"evil")


def half(s3: Any) -> None:
    s3.delete_object(Bucket="models", Key="run/CompileKernel/kernel/index.json")


@pytest.mark.parametrize(
    ("change", "uri", "sha256", "words"),
    [
        (damage, URI, "", r"no whole kernel: .*libmla_decode\.so is damaged"),
        (half, URI, "", r"no whole kernel: .*index\.json is missing"),
        (outside, URI, "", r"object '\.\./\.\./etc/cron\.d/x' .* points outside"),
        (None, URI, "0" * 64, "was evaluated with 0000"),
        (None, "s3://models/elsewhere/", "", "no object lies below s3://models/elsewhere/"),
        (None, "s3://nobody/kernel/", "", r"cannot be downloaded from s3://nobody.*NoSuchBucket.*allow"),
    ],
)
def test_anything_else_is_refused(
    s3: Any, tmp_path: Path, change: Any, uri: str, sha256: str, words: str
) -> None:
    if change:
        change(s3)
    with pytest.raises(KernelDownloadError, match=words):
        download_kernel(uri, tmp_path / "kernel", sha256)
    assert not (tmp_path.parent / "etc").exists()


def test_a_mounted_folder_goes_before_an_address(tmp_path: Path) -> None:
    env = {"MLA_ML_ROOT": str(tmp_path), "MLA_KERNEL_S3_URI": URI}
    assert ServerSettings.from_environment(env).kernel_s3_uri == URI
    (tmp_path / "additional-model-data-sources" / "kernel").mkdir(parents=True)
    assert ServerSettings.from_environment(env).kernel_s3_uri is None


def test_the_server_starts_from_s3_and_says_why_when_it_cannot(tiny_folder: Path, artifact: Path) -> None:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )
        upload(client, artifact)
        env = {**KEYS, "AWS_ENDPOINT_URL": address, "MLA_KERNEL_S3_URI": URI, "MLA_KERNEL_BACKEND": "cpu"}
        root = link_root(tiny_folder)
        with serving(root, **env) as (process, url):
            wait_ready(process, url)
        with serving(root, **env, MLA_KERNEL_SHA256="0" * 64) as (process, _):
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert output.splitlines()[-1].startswith(
            f"error: KernelDownloadError: the kernel at {URI} has sha256"
        )
    finally:
        server.stop()
