"""Compile the kernels' sources with the emulator into one library, cached by content."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.build import default_cache_dir
from kernels.files import publish_folder
from kernels.package import LIBRARY
from kernels.targets import SOURCE_ROOT

EMULATOR = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-g1", "-march=native", "-fPIC", "-Wall", "-Wextra")
RUNTIME_FLAGS = ("-O3",)
# The sanitizers' calls are answered by runtime/memory.cc: each plain access of a kernel is checked.
KERNEL_FLAGS = (
    "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fsanitize=thread", "-fsanitize=alignment",
    "--param=tsan-instrument-func-entry-exit=0",
)  # fmt: skip


def build(cache_dir: Path | None = None) -> Path:
    """The library with the emulated hopper target; compiled when the cache has none of the same content.

    RuntimeError with the compiler's message when it fails.
    """
    compiler = tuple(shlex.split(os.environ.get("CXX", ""))) or ("g++",)
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, _machine(), FLAGS, RUNTIME_FLAGS, KERNEL_FLAGS)).encode())
    for path in _sources():
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    folder = (cache_dir or default_cache_dir()) / f"emulator-{digest.hexdigest()[:32]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        publish_folder(folder, functools.partial(_compile, compiler), replace=False)
    return folder / LIBRARY


def _sources() -> list[Path]:
    product = [SOURCE_ROOT / "mla_decode.h", *(SOURCE_ROOT / "hopper").iterdir()]
    return sorted([*product, *(path for path in EMULATOR.rglob("*") if path.suffix in (".h", ".cuh", ".cc"))])


def _machine() -> str:
    """What -march=native makes of this machine, as a shared cache may serve several."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: tuple[str, ...], folder: Path) -> None:
    """In a folder with the kernels' files, so that includes in quotes find the device's where they differ."""
    sources = folder / "sources"
    sources.mkdir()
    for path in (SOURCE_ROOT / "hopper").iterdir():
        replaced = EMULATOR / "device" / path.name
        (sources / path.name).symlink_to(replaced if replaced.exists() else path)
    common = [*compiler, *FLAGS, f"-I{EMULATOR / 'cuda'}", f"-I{EMULATOR}", f"-I{SOURCE_ROOT}"]
    kernel = [*common, *KERNEL_FLAGS, "-x", "c++", str(sources / "mla_decode.cu")]
    commands = [[*kernel, "-c", "-o", str(folder / "kernel.o")]]
    for unit in sorted((EMULATOR / "runtime").glob("*.cc")):
        commands.append([*common, *RUNTIME_FLAGS, "-c", str(unit), "-o", str(folder / f"{unit.stem}.o")])
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(_run, commands))
    objects = sorted(folder.glob("*.o"))
    _run([*compiler, "-shared", *map(str, objects), "-ldl", "-Wl,-z,defs", "-o", str(folder / LIBRARY)])
    for path in objects:
        path.unlink()
    shutil.rmtree(sources)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
