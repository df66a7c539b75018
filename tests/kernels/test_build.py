"""The compile cache: content-addressed, atomic, clear about what is missing; and the artifact it writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import BuildError, KernelIndex, KernelPackage, KernelPackageError, get_backend
from kernels.build import build, cached_package, main
from kernels.package import combined_sha256

FakeCompiler = Callable[..., Path]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_artifact_layout(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    fake_compiler("echo a warning >&2")
    index = build("cpu", tmp_path / "kernel", tmp_path / "cache")
    assert visible(tmp_path / "kernel") == ["cpu", "index.json"]
    assert visible(tmp_path / "kernel" / "cpu") == ["compiler.log", "libmla_decode.so", "manifest.json"]
    assert "a warning" in (tmp_path / "kernel" / "cpu" / "compiler.log").read_text()
    manifest = json.loads((tmp_path / "kernel" / "cpu" / "manifest.json").read_text())
    assert manifest["compiler"] == "fake compiler 1.0"
    assert manifest["bytes"] == len("compiled\n")
    assert manifest["registers"] is None
    assert json.loads((tmp_path / "kernel" / "index.json").read_text()) == {
        "schema_version": 1,
        "requested": "cpu",
        "packages": {"cpu": {"sha256": manifest["sha256"]}},
        "skipped": {},
        "sha256": combined_sha256({"cpu": manifest["sha256"]}),
    }
    assert KernelIndex.load(tmp_path / "kernel") == index


def test_second_build_does_not_compile(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    runs = fake_compiler()
    build("cpu", tmp_path / "one", tmp_path / "cache")
    before = runs.read_text()
    build("cpu", tmp_path / "two", tmp_path / "cache")
    assert runs.read_text() == before


def test_another_compiler_is_another_cache_entry(
    tmp_path: Path, fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler()
    build("cpu", tmp_path / "one", tmp_path / "cache")
    script = Path(os.environ["CXX"])
    other = script.with_name("other-c++")
    other.write_text(script.read_text().replace("compiler 1.0", "compiler 2.0"))
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    build("cpu", tmp_path / "one", tmp_path / "cache")
    assert len(visible(tmp_path / "cache")) == 2


def test_another_option_of_the_compiler_is_another_cache_entry(
    tmp_path: Path, fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built with -march=native must not come out of the cache on another machine."""
    fake_compiler()
    plain = cached_package("cpu", tmp_path / "cache")
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -march=native")
    native = cached_package("cpu", tmp_path / "cache")
    assert native.folder != plain.folder
    assert "-march=native" in native.manifest["flags"]
    assert "-march=native" not in plain.manifest["flags"]


def test_damaged_cache_entry_is_compiled_again(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    fake_compiler()
    package = cached_package("cpu", tmp_path / "cache")
    (package.folder / "libmla_decode.so").write_text("bit rot")
    assert cached_package("cpu", tmp_path / "cache").sha256 == package.sha256
    (package.folder / "manifest.json").unlink()
    assert cached_package("cpu", tmp_path / "cache").sha256 == package.sha256
    assert visible(tmp_path / "cache") == [package.folder.name]


def test_failed_compilation_leaves_nothing_and_shows_the_output(
    tmp_path: Path, fake_compiler: FakeCompiler
) -> None:
    fake_compiler("echo 'kernel.cc:7: error: no such thing' >&2; exit 3")
    with pytest.raises(BuildError, match=r"exit code 3(?s:.*)no such thing"):
        build("cpu", tmp_path / "kernel", tmp_path / "cache")
    assert visible(tmp_path / "cache") == []
    assert not (tmp_path / "kernel").exists()
    with pytest.raises(BuildError, match="no such thing"):
        build("auto", tmp_path / "kernel", tmp_path / "cache")


def test_rebuild_replaces_an_artifact(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    fake_compiler()
    build("cpu", tmp_path / "kernel", tmp_path / "cache")
    (tmp_path / "kernel" / "cpu" / "libmla_decode.so").write_text("old")
    build("cpu", tmp_path / "kernel", tmp_path / "cache")
    KernelIndex.load(tmp_path / "kernel")
    assert visible(tmp_path / "kernel") == ["cpu", "index.json"]


def test_builds_racing_for_one_entry_all_succeed(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    fake_compiler("sleep 0.05")
    with ThreadPoolExecutor(4) as pool:
        packages = list(pool.map(lambda _: cached_package("cpu", tmp_path / "cache"), range(4)))
    assert len({package.folder for package in packages}) == 1
    assert visible(tmp_path / "cache") == [packages[0].folder.name]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"g\+\+ not found on PATH; install .* or set CXX"):
        build("cpu", tmp_path / "kernel", tmp_path / "cache")
    with pytest.raises(
        BuildError, match=r"no kernel target can be built here: cpu: g\+\+ not found.*hopper: "
    ):
        build("auto", tmp_path / "kernel", tmp_path / "cache")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX='no-such-compiler' not found"):
        build("cpu", tmp_path / "kernel", tmp_path / "cache")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("not a program", "cannot be run: .*Exec format error"),
        ("#!/bin/sh\n", "wrote no libmla_decode.so, though it reported no error"),
        ("#!/bin/sh\necho 9.4.0; [ $1 = --version ]", "needs GCC 11 or Clang 14, or newer, with OpenMP"),
    ],
)
def test_unusable_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    path = tmp_path / "c++"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(BuildError, match=message):
        build("cpu", tmp_path / "kernel", tmp_path / "cache")


def test_compiler_command_that_no_shell_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(BuildError, match=r"CXX=.* is no command: No closing quotation; set CXX to"):
        build("cpu", tmp_path / "kernel", tmp_path / "cache")


def test_folders_that_cannot_be_written_are_named_with_the_remedy(
    tmp_path: Path, fake_compiler: FakeCompiler
) -> None:
    fake_compiler()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BuildError, match=f"compile cache {file}: File exists.*MLA_KERNEL_CACHE or --cache"):
        build("cpu", tmp_path / "kernel", file)
    with pytest.raises(BuildError, match=f"artifact folder {file}/kernel: Not a directory.*another folder"):
        build("cpu", file / "kernel", tmp_path / "cache")


def test_a_cache_is_read_where_it_cannot_be_written(
    tmp_path: Path, fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler()
    package = cached_package("cpu", tmp_path / "cache")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "cache"))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert cached_package("cpu", tmp_path / "cache").sha256 == package.sha256
    (package.folder / "libmla_decode.so").write_text("bit rot")
    with pytest.raises(BuildError, match=r"compile cache .*: Read-only file system"):
        cached_package("cpu", tmp_path / "cache")


def test_no_home_and_no_cache(monkeypatch: pytest.MonkeyPatch, fake_compiler: FakeCompiler) -> None:
    fake_compiler()
    monkeypatch.delenv("MLA_KERNEL_CACHE", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BuildError, match="no home folder for the compile cache; set MLA_KERNEL_CACHE"):
        cached_package("cpu")


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"unknown kernel target 'tpu'; known: cpu, hopper"):
        build("tpu", tmp_path, tmp_path)


def test_auto_says_why_a_target_is_skipped(
    tmp_path: Path, fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler()
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    index = build("auto", tmp_path / "kernel", tmp_path / "cache")
    assert index.requested == "auto"
    assert set(index.packages) | set(index.skipped) == {"cpu", "hopper"}
    assert all(index.skipped.values())


def test_auto_goes_on_beside_a_cuda_toolkit_that_is_too_old(
    tmp_path: Path, fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Build cuda_11.8.r11.8/compiler.31833905_0'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:/bin:/usr/bin")
    index = build("auto", tmp_path / "kernel", tmp_path / "cache")
    assert set(index.packages) == {"cpu"}
    assert index.skipped == {"hopper": "nvcc is of CUDA 11.8; install the CUDA toolkit 12.4 or newer"}
    with pytest.raises(BuildError, match=r"nvcc is of CUDA 11\.8"):
        build("hopper", tmp_path / "kernel", tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "cpu" / "libmla_decode.so").unlink(), "libmla_decode.so is missing"),
        (lambda d: (d / "cpu" / "libmla_decode.so").write_text("x"), "is damaged: manifest says 9 bytes"),
        (lambda d: (d / "index.json").unlink(), "index.json is missing"),
        (lambda d: (d / "index.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "index.json").write_text("[]"), "holds list, not an object"),
        (lambda d: edit(d / "cpu/manifest.json", abi_version=99), "has ABI version 99, this code speaks 1"),
        (lambda d: edit(d / "cpu/manifest.json", machine="riscv64"), "compiled for riscv64, this machine is"),
        (lambda d: edit(d / "cpu/manifest.json", target="hopper"), "holds target 'hopper', expected 'cpu'"),
        (lambda d: edit(d / "cpu/manifest.json", target=None), "lacks target"),
        (lambda d: edit(d / "index.json", schema_version=2), "schema_version 2, this code reads 1"),
        (lambda d: (d / "index.json").write_text("[" * 100_000), "is not JSON"),
        (lambda d: edit(d / "index.json", packages=["cpu"]), "index.json holds list, not an object"),
        (lambda d: edit(d / "index.json", packages={"cpu": "x"}), "cpu of"),
        (lambda d: edit(d / "index.json", skipped=7), "index.json holds int, not an object"),
        (lambda d: edit(d / "index.json", sha256="00"), "has sha256 00"),
        (lambda d: edit(d / "index.json", packages={"cpu": {"sha256": "00"}}), "mixed from two builds"),
    ],
)
def test_damaged_artifact_is_refused(
    tmp_path: Path, fake_compiler: FakeCompiler, change: Callable[[Path], object], message: str
) -> None:
    fake_compiler()
    build("cpu", tmp_path / "kernel", tmp_path / "cache")
    change(tmp_path / "kernel")
    with pytest.raises(KernelPackageError) as error:
        KernelIndex.load(tmp_path / "kernel")
    assert message in str(error.value)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_library_that_is_no_library(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    fake_compiler()
    build("cpu", tmp_path / "kernel", tmp_path / "cache")
    with pytest.raises(KernelPackageError, match="cannot be loaded"):
        get_backend("cpu", tmp_path / "kernel")


def test_library_of_another_target(tmp_path: Path, cpu_package: KernelPackage) -> None:
    claimed = KernelPackage(cpu_package.folder, "hopper", cpu_package.sha256, cpu_package.manifest)
    with pytest.raises(KernelPackageError, match="is target 'cpu', its manifest says 'hopper'"):
        claimed.open()


def test_target_missing_from_the_artifact(tmp_path: Path, fake_compiler: FakeCompiler) -> None:
    fake_compiler()
    build("cpu", tmp_path / "kernel", tmp_path / "cache")
    with pytest.raises(RuntimeError, match="holds no target 'hopper': it was not asked for"):
        get_backend("hopper", tmp_path / "kernel")


def test_command_line(
    tmp_path: Path, fake_compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compiler()
    assert main(["--target", "cpu", "--out", str(tmp_path / "k"), "--cache", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.startswith("cpu: 9 bytes")
    fake_compiler("exit 1")
    assert main(["--target", "cpu", "--out", str(tmp_path / "k"), "--cache", str(tmp_path / "c2")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_real_artifact_serves_from_its_folder(tmp_path: Path, cpu_package: KernelPackage) -> None:
    index = build("cpu", tmp_path / "kernel")
    assert index.packages["cpu"].sha256 == cpu_package.sha256
    assert get_backend("cpu", tmp_path / "kernel").name == "cpu"
    text = subprocess.run(["nm", "-D", "--defined-only", index.packages["cpu"].folder / "libmla_decode.so"],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    exported = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert exported == {
        "mla_decode_abi_version",
        "mla_decode_target",
        "mla_decode_workspace_bytes",
        "mla_decode_run",
    }


def test_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "kernels.build", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--target" in done.stdout
