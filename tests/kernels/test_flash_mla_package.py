"""A foreign package in the artifact: installed by pip, verified file by file, correct as a backend."""

from __future__ import annotations

import importlib.util
import json
import marshal
import shutil
from pathlib import Path

import pytest
import torch

from kernels import BackendError, BuildError, KernelIndex, KernelPackageError, get_backend
from kernels.arguments import Problem
from kernels.backends import available_backends
from kernels.build import write_index
from kernels.checks import correctness_cases, run_case
from kernels.flash_mla_backend import FlashMlaBackend
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


def test_code_beside_the_verified_files_does_not_run(artifact: Path, tmp_path: Path) -> None:
    """Python would run a cache that carries its source's time and size, and no hash covers caches."""
    kernel = damaged(artifact, tmp_path)
    source = kernel / "flash_mla" / "site" / "flash_mla" / "__init__.py"
    times = source.stat()
    stamp = b"".join(value.to_bytes(4, "little") for value in (0, int(times.st_mtime), times.st_size))
    other = compile("flash_mla_with_kvcache = get_mla_metadata = exit", str(source), "exec")
    cache = Path(importlib.util.cache_from_source(str(source)))
    cache.parent.mkdir()
    cache.write_bytes(importlib.util.MAGIC_NUMBER + stamp + marshal.dumps(other))
    backend = get_backend("flash_mla", kernel)
    assert run_case(backend, correctness_cases(h_q=4, long=300)[0], seed=1).passed


def test_importing_leaves_the_artifact_as_it_was(artifact: Path, tmp_path: Path) -> None:
    kernel = damaged(artifact, tmp_path)
    before = sorted(kernel.rglob("*"))
    get_backend("flash_mla", kernel)
    assert sorted(kernel.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise AssertionError('needs two GPUs')", "AssertionError: needs two GPUs"),
        ("import sys\nsys.exit('no GPU')", "SystemExit: no GPU"),
        ("get_mla_metadata = flash_mla_with_kvcache = None", "has no flash_mla_with_kvcache"),
    ],
)
def test_a_module_that_does_not_load_is_said_by_its_backend_alone(
    tmp_path: Path, source: str, words: str
) -> None:
    """On a machine with a GPU it may load, so it is in the artifact."""
    module = fake.MODULE + ("" if "None" in source else source)
    package = install(fake.wheel(tmp_path, module), tmp_path / "kernel", {}, lambda line: None)
    init = package.site / "flash_mla" / "__init__.py"
    init.write_text(init.read_text() + (source if "None" in source else ""))
    with pytest.raises(BackendError, match=words):
        FlashMlaBackend(package)


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


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os\nos._exit(0)", "cannot be imported here: it ended the process"),
        ("import sys\nsys.exit('no GPU here')", "cannot be imported here: no GPU here"),
        ("import atexit\natexit.register(print, 'bye')\nprint('hello', end='')", "imported"),
    ],
)
def test_what_a_module_prints_or_ends_is_no_obstacle(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "flash_mla").mkdir()
    functions = "\ndef get_mla_metadata(): ...\ndef flash_mla_with_kvcache(): ...\n"
    (tmp_path / "flash_mla" / "__init__.py").write_text(source + functions)
    assert check_interface(tmp_path, tmp_path) == said


def test_a_wheel_that_pip_trips_over_is_explained_by_its_last_word(tmp_path: Path) -> None:
    wheel = fake.wheel(tmp_path)
    content = bytearray(wheel.read_bytes())
    content[60] ^= 255
    wheel.write_bytes(content)
    with pytest.raises(BuildError, match=r"pip install failed: .*(CRC|invalid|decompress)"):
        install(wheel, tmp_path / "kernel", {}, lambda line: None)


def test_a_module_that_kills_its_process_is_only_recorded(tmp_path: Path) -> None:
    (tmp_path / "flash_mla").mkdir()
    source = "import os\nos.abort()\nget_mla_metadata = flash_mla_with_kvcache = None"
    (tmp_path / "flash_mla" / "__init__.py").write_text(source)
    assert check_interface(tmp_path, tmp_path) == "cannot be imported here: exit code -6"


def test_a_second_package_needs_another_process(artifact: Path, tmp_path: Path) -> None:
    get_backend("flash_mla", artifact)
    with pytest.raises(BackendError, match="loaded already"):
        get_backend("flash_mla", damaged(artifact, tmp_path))
