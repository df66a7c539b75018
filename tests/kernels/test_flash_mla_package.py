"""A foreign package in the artifact: installed by pip, verified file by file, correct as a backend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from kernels import BackendError, BuildError, KernelIndex, KernelPackageError, get_backend
from kernels.arguments import Problem
from kernels.backends import available_backends
from kernels.build import write_index
from kernels.checks import correctness_cases, run_case
from kernels.flash_mla_install import check_interface, install
from kernels.package import FlashMlaPackage
from kernels.reference import mla_decode_reference
from kernels.workloads import make_inputs
from tests import flash_mla_package as fake

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("fresh_flash_mla")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    lines: list[str] = []
    package = install(fake.wheel(folder), folder / "kernel", {"source": "here"}, lines.append)
    write_index(folder / "kernel", "flash_mla", {"flash_mla": {"sha256": package.sha256}}, {})
    assert "imported" in lines[-1]
    return folder / "kernel"


def damaged(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be changed."""
    return Path(shutil.copytree(artifact, tmp_path / "kernel"))


def test_the_manifest_says_what_was_installed(artifact: Path) -> None:
    index = KernelIndex.load(artifact)
    assert index.packages == {}
    assert index.flash_mla is not None
    manifest = index.flash_mla.manifest
    assert index.flash_mla.label == "cpu-flash-mla 1.2"
    assert (manifest["source"], manifest["wheel"]) == ("here", fake.WHEEL)
    assert manifest["wheel_tags"] == ["py3-none-any"]
    assert manifest["import"] == "imported"
    assert "flash_mla/__init__.py" in manifest["files"]
    assert not [path for path in manifest["files"] if "__pycache__" in path or "direct_url" in path]
    assert {path.name for path in (artifact / "flash_mla").iterdir()} == {
        "compiler.log", "manifest.json", "site",
    }  # fmt: skip


def test_equal_packages_have_equal_hashes(artifact: Path, tmp_path: Path) -> None:
    again = install(fake.wheel(tmp_path), tmp_path / "kernel", {}, lambda line: None)
    assert again.sha256 == FlashMlaPackage.load(artifact / "flash_mla").sha256


def test_it_is_a_correct_backend_and_auto_knows_it(artifact: Path) -> None:
    backend = get_backend("flash_mla", artifact)
    for case in correctness_cases(h_q=4, long=300):
        assert run_case(backend, case, seed=1).passed, case.name
    assert "flash_mla" in available_backends(artifact, CPU)


def test_what_flash_mla_refuses_is_asked_of_it_in_another_way(tmp_path: Path) -> None:
    """FlashMLA's kernels need a positive scale and a row."""
    strict = fake.MODULE.replace(
        "    b, s_q, h_q, _ = q.shape", "    b, s_q, h_q, _ = q.shape\n    assert b > 0 and softmax_scale > 0"
    )
    package = install(fake.wheel(tmp_path, strict), tmp_path / "kernel", {}, lambda line: None)
    write_index(tmp_path / "kernel", "flash_mla", {"flash_mla": {"sha256": package.sha256}}, {})
    backend = get_backend("flash_mla", tmp_path / "kernel")
    for scale in (-0.05, 0.0):
        inputs = make_inputs([130, 5, 0], softmax_scale=scale)
        out, lse = backend(*inputs.arguments())
        expected, expected_lse = mla_decode_reference(*inputs.arguments())
        torch.testing.assert_close(out.double(), expected.double(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-3, atol=1e-3)
    nothing = make_inputs([], h_q=8)
    assert [tensor.shape for tensor in backend(*nothing.arguments())] == [(0, 1, 8, 512), (0, 8, 1)]


def test_what_a_package_cannot_run_is_found_by_trying(tmp_path: Path) -> None:
    module = fake.MODULE.replace('if q.device.type != "cpu"', "if s_q_limit(q)")
    module += "\ndef s_q_limit(q):\n    return q.shape[1] > 1\n"
    package = install(fake.wheel(tmp_path, module), tmp_path / "kernel", {}, lambda line: None)
    write_index(tmp_path / "kernel", "flash_mla", {"flash_mla": {"sha256": package.sha256}}, {})
    backend = get_backend("flash_mla", tmp_path / "kernel")
    bf16 = torch.bfloat16
    assert backend.unsupported(Problem("cpu", bf16, bf16, 8, 1, 4, 512, 64, 64)) is None
    reason = backend.unsupported(Problem("cpu", bf16, bf16, 8, 2, 4, 512, 64, 64))
    assert reason is not None
    assert "this flash_mla runs on a CPU only" in reason
    assert "sizes 512 + 64" in (backend.unsupported(Problem("cpu", bf16, bf16, 8, 1, 4, 256, 64, 64)) or "")


@pytest.mark.parametrize("change", ["edited", "added", "removed", "manifest", "index"])
def test_a_changed_artifact_is_refused(artifact: Path, tmp_path: Path, change: str) -> None:
    kernel = damaged(artifact, tmp_path)
    site = kernel / "flash_mla" / "site"
    if change == "edited":
        (site / "flash_mla" / "__init__.py").write_text("print('other')")
    elif change == "added":
        (site / "sitecustomize.py").write_text("")
    elif change == "removed":
        (site / "flash_mla" / "__init__.py").unlink()
    else:
        file = kernel / ("index.json" if change == "index" else "flash_mla/manifest.json")
        sha = json.loads(file.read_text())["sha256"]
        file.write_text(file.read_text().replace(sha, "0" * 64))
    names = {"added": "sitecustomize.py", "index": "index.json"}
    with pytest.raises(KernelPackageError, match=names.get(change, "sha256")):
        KernelIndex.load(kernel)


def test_pythons_caches_are_no_change(artifact: Path, tmp_path: Path) -> None:
    kernel = damaged(artifact, tmp_path)
    cache = kernel / "flash_mla" / "site" / "flash_mla" / "__pycache__"
    cache.mkdir()
    (cache / "__init__.cpython-312.pyc").write_bytes(b"")
    assert KernelIndex.load(kernel).flash_mla


@pytest.mark.parametrize(
    ("module", "package", "words"),
    [
        ("x = 1", "flash_mla", "no flash_mla_with_kvcache and no get_mla_metadata"),
        (fake.MODULE, "other", "no module flash_mla; it installs cpu_flash_mla-1.2.dist-info, other"),
        ("import nowhere\ndef get_mla_metadata(): ...", "flash_mla", "has no flash_mla_with_kvcache"),
        ("def (", "flash_mla", "is not Python"),
    ],
)
def test_another_package_is_refused_and_leaves_nothing(
    tmp_path: Path, module: str, package: str, words: str
) -> None:
    with pytest.raises(BuildError, match=words):
        install(fake.wheel(tmp_path, module, package), tmp_path / "kernel", {}, lambda line: None)
    assert list((tmp_path / "kernel").iterdir()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from nowhere import get_mla_metadata, flash_mla_with_kvcache",
        "import nowhere\nfrom flash_mla.ops import *",
    ],
)
def test_what_needs_a_gpu_to_be_imported_is_read_instead(tmp_path: Path, source: str) -> None:
    (tmp_path / "flash_mla").mkdir()
    (tmp_path / "flash_mla" / "__init__.py").write_text(source)
    said = check_interface(tmp_path, tmp_path)
    assert said == "cannot be imported here: ModuleNotFoundError: No module named 'nowhere'"


def test_a_module_that_kills_its_process_is_only_recorded(tmp_path: Path) -> None:
    (tmp_path / "flash_mla").mkdir()
    source = "import os\nos.abort()\nget_mla_metadata = flash_mla_with_kvcache = None"
    (tmp_path / "flash_mla" / "__init__.py").write_text(source)
    assert check_interface(tmp_path, tmp_path) == "cannot be imported here: exit code -6"


def test_a_second_package_needs_another_process(artifact: Path, tmp_path: Path) -> None:
    get_backend("flash_mla", artifact)
    with pytest.raises(BackendError, match="loaded already"):
        get_backend("flash_mla", damaged(artifact, tmp_path))
