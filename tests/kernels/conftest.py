"""Shared fixtures: the compiled cpu target, built once into the user's cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import Backend, BackendError, KernelPackage, get_backend
from kernels.build import cached_package
from kernels.compiled import CompiledBackend
from kernels.workloads import make_inputs

ISAS = ("portable", "avx2", "avx512", "avx512bf16")


@pytest.fixture(scope="session")
def cpu_package() -> KernelPackage:
    return cached_package("cpu")


@pytest.fixture(scope="session")
def cpu(cpu_package: KernelPackage) -> Backend:
    return CompiledBackend(cpu_package)


@pytest.fixture(scope="session")
def isa_backend(
    cpu_package: KernelPackage, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Backend]:
    """A cpu backend capped to one instruction set; the library decides once, so each gets its own copy."""

    def make(isa: str) -> Backend:
        folder = tmp_path_factory.mktemp("isa") / isa
        shutil.copytree(cpu_package.folder, folder)
        os.environ["MLA_CPU_ISA"] = isa
        try:
            backend = CompiledBackend(KernelPackage.load(folder))
            backend(*make_inputs([1], kv_lora_rank=16, rope_dim=16).arguments())  # decides while it is set
        finally:
            del os.environ["MLA_CPU_ISA"]
        return backend

    return make


GPU = torch.cuda.is_available()
# Here triton is its interpreter.
BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton", marks=[pytest.mark.gpu] if GPU else []),
    pytest.param("hopper", marks=pytest.mark.gpu),
    pytest.param("flash_mla", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend that the one correctness suite covers."""
    if request.param in ("hopper", "flash_mla") and not GPU:
        pytest.skip("no GPU")
    try:
        return get_backend(request.param)
    except BackendError as error:
        pytest.skip(str(error))


FAKE_COMPILER = """#!/bin/sh
# Stands for a compiler: answers --version, counts its runs, writes the output file.
if [ "$1" = --version ]; then echo "fake compiler 1.0"; exit 0; fi
echo run >> "{folder}/runs"
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo "compiled" > "$2"; fi
  shift
done
{extra}
"""


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Install a script as CXX; the argument is shell code it ends with. Returns the file counting runs."""

    def install(extra: str = "") -> Path:
        script = tmp_path / f"fake-c++-{len(list(tmp_path.iterdir()))}"
        script.write_text(FAKE_COMPILER.format(folder=tmp_path, extra=extra))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return tmp_path / "runs"

    return install
