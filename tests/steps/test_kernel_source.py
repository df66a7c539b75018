"""CompileKernel with KernelSource: what is taken, what is refused. pip sees no network, S3 is moto's."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws

from kernels.package import KernelIndex
from kernels.targets import RECIPES
from kernels.workloads import Case
from steps import compile_kernel, kernel_source
from steps.evaluation.operator import Sizes, hold_contest
from steps.job import StepError
from steps.kernel_source import KernelSource
from tests import flash_mla_package as fake
from tests.steps.support import StepRun

REQUIREMENT = f"{fake.NAME}=={fake.VERSION}"


pytestmark = pytest.mark.usefixtures("shelf", "fresh_flash_mla")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which pip looks for packages."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts an object into s3://sources."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="sources")
        yield lambda key, body: s3.put_object(Bucket="sources", Key=key, Body=body)


def compiled(tmp_path: Path, source: str, backend: str = "flash_mla") -> KernelIndex:
    """CompileKernel's published output."""
    StepRun(compile_kernel, tmp_path).start(backend=backend, kernel_source=source)
    return KernelIndex.load(tmp_path / "processing" / "output" / "kernel")


def test_a_requirement_is_installed_indexed_and_measured(tmp_path: Path, shelf: Path) -> None:
    fake.wheel(shelf)
    index = compiled(tmp_path, f" {fake.NAME} >= 1")
    assert index.flash_mla is not None
    assert json.loads((index.folder / "index.json").read_text())["packages"]["flash_mla"] == {
        "sha256": index.flash_mla.sha256,
        "source": f"{fake.NAME}>=1",
        "name": fake.NAME,
        "version": fake.VERSION,
        "wheel": fake.WHEEL,
    }
    assert "Processing" in (index.folder / "flash_mla" / "compiler.log").read_text()
    bf16 = torch.bfloat16
    sizes = Sizes(4, 512, 64, bf16, bf16, 0.1)
    outcome = hold_contest("flash_mla", index.folder, sizes, [Case(1, 64)], torch.device("cpu"))
    assert outcome.backend == "flash_mla"
    assert outcome.correctness.passed


def test_auto_builds_ours_and_the_other(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["kernels.build"], "RECIPES", {"cpu": RECIPES["cpu"]})  # nvcc takes long
    fake.wheel(shelf)
    index = compiled(tmp_path, REQUIREMENT, backend="auto")
    assert "cpu" in index.packages
    assert index.flash_mla is not None
    assert index.requested == "auto"


@pytest.mark.parametrize("key", ["a/flash.tar.gz", "a/flash.zip", fake.WHEEL])
def test_an_archive_on_s3_is_built_or_installed(tmp_path: Path, bucket: Any, key: str) -> None:
    if key.endswith(".whl"):
        bucket(key, fake.wheel(tmp_path).read_bytes())
    else:
        bucket(key, (fake.zipped if key.endswith("zip") else fake.tar_gz)(fake.sources()))
    package = compiled(tmp_path, f"s3://sources/{key}").flash_mla
    assert package is not None
    assert package.label == "cpu-flash-mla 1.2"
    assert package.manifest["source"] == f"s3://sources/{key}"
    assert len(package.manifest["archive_sha256"]) == 64


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("--index-url=http://evil", "no pip requirement"),
        ("-e .", "no pip requirement"),
        ("a b", "no pip requirement"),
        ("a; touch /tmp/x", "no pip requirement"),
        ("a\n--pre", "no pip requirement"),
        ("./folder", "no pip requirement"),
        ("../x.whl", "no pip requirement"),
        ("", "no pip requirement"),
        ("a @ https://host/a.whl", "has a URL"),
        ("a @ file:///etc", "has a URL"),
        ("git+https://host/a", "no pip requirement"),
        ("a[extra]==1", "has extras"),
        ("a==1; python_version > '3'", "has a marker"),
        ("s3://sources/a.exe", "is no archive"),
        ("s3://sources", "is no archive"),
        ("s3:///x.zip", "is no S3 URI"),
    ],
)
def test_what_is_no_requirement_and_no_archive_is_refused(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(StepError, match=words):
        KernelSource.parse(source)


@pytest.mark.parametrize("text", ["builtin", " builtin ", "Builtin", "BUILTIN"])
def test_builtin_in_any_spelling_asks_no_index(text: str) -> None:
    assert KernelSource.parse(text) is None


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=30))
def test_whatever_passes_is_a_name_with_versions(text: str) -> None:
    try:
        source = KernelSource.parse(text)
    except StepError:
        return
    if source and not source.archived:
        assert source.text[0].isalnum()
        assert not set(source.text) & set(" \n\t/\\;@[]-") - {"-"}


def test_a_source_that_would_not_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="would not be measured: KernelBackend is 'cpu'"):
        compiled(tmp_path, REQUIREMENT, backend="cpu")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere-to-be-found==9", "No matching distribution found for nowhere-to-be-found==9.*set builtin"),
        ("flash-mla==1.0.0.dev0", "take sgl-flash-mla"),
    ],
)
def test_a_requirement_that_pip_cannot_satisfy_leaves_nothing(
    tmp_path: Path, source: str, words: str
) -> None:
    with pytest.raises(StepError, match=words):
        compiled(tmp_path, source)
    assert not [path for path in (tmp_path / "processing" / "output").rglob("*") if path.is_file()]


def test_a_failing_build_shows_the_compilers_words(tmp_path: Path, bucket: Any) -> None:
    files = fake.sources() | {"flash-mla/setup.py": "raise SystemExit('no header flash.h')"}
    bucket("x.tar.gz", fake.tar_gz(files))
    with pytest.raises(StepError, match=r"cannot be used: pip wheel failed: no header flash\.h\. Give"):
        compiled(tmp_path, "s3://sources/x.tar.gz")


def link(target: str) -> bytes:
    """A .tar.gz with a symbolic link to `target`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, target
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("key", "body", "words"),
    [
        ("x.tar.gz", fake.tar_gz({"../../evil": "x"}), "outside the destination"),
        ("x.tar.gz", link("/etc/passwd"), "absolute path"),
        ("x.tgz", b"no archive", "cannot be unpacked"),
        ("x.tar.gz", fake.tar_gz(fake.sources())[:100], "cannot be unpacked"),
        ("x.zip", fake.zipped({"../evil": "x"}), "member outside of it: ../evil"),
        ("x.zip", fake.zipped({"/evil": "x"}), "member outside of it: /evil"),
        ("a-1-py3-none-any.whl", fake.zipped({"..\\evil": "x"}), "member outside of it"),
        ("x.zip", b"PK", "cannot be unpacked"),
        ("x.zip", fake.zipped({"readme": "x"}), r"no pyproject\.toml or setup\.py"),
    ],
)
def test_a_bad_archive_is_refused(tmp_path: Path, bucket: Any, key: str, body: bytes, words: str) -> None:
    bucket(key, body)
    with pytest.raises(StepError, match=words):
        compiled(tmp_path, f"s3://sources/{key}")
    assert not (tmp_path / "evil").exists()


def test_sizes_are_limited(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket("x.tar.gz", fake.tar_gz(fake.sources()))
    bucket("x.zip", fake.zipped(fake.sources()))
    monkeypatch.setattr(kernel_source, "MAX_UNPACKED_BYTES", 500)
    for key in ("x.tar.gz", "x.zip"):
        with pytest.raises(StepError, match="unpacks to more than 500 bytes"):
            compiled(tmp_path, f"s3://sources/{key}")
    monkeypatch.setattr(kernel_source, "MAX_ARCHIVE_BYTES", 100)
    with pytest.raises(StepError, match=r"has \d+ bytes, 100 are allowed"):
        compiled(tmp_path, "s3://sources/x.zip")


def test_a_missing_object_is_named(tmp_path: Path, bucket: Any) -> None:
    with pytest.raises(StepError, match=r"Reading KernelSource s3://sources/none\.zip failed: 404"):
        compiled(tmp_path, "s3://sources/none.zip")
