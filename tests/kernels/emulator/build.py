"""Compile the kernels' sources and the emulator into one library; both parts are cached by content."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.build import default_cache_dir
from kernels.files import publish_folder
from kernels.package import LIBRARY
from kernels.targets import SOURCE_ROOT

EMULATOR = Path(__file__).resolve().parent
RUNTIME = "libemulator.a"
FLAGS = ("-std=c++17", "-g1", "-march=native", "-fPIC", "-Wall", "-Wextra")
RUNTIME_FLAGS = ("-O3",)
# The sanitizers' calls are answered by runtime/sanitizer.cc: each plain access of a kernel is checked.
KERNEL_FLAGS = (
    "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fsanitize=thread", "-fsanitize=alignment",
    "--param=tsan-instrument-func-entry-exit=0",
)  # fmt: skip


def build(
    *more_flags: str,
    source: Path = SOURCE_ROOT / "hopper" / "mla_decode.cu",
    cache_dir: Path | None = None,
) -> Path:
    """The library with `source`, the hopper target, emulated; compiled unless the cache has it.

    `more_flags` are for that source. RuntimeError with the compiler's message when it fails.
    """
    compiler = ["g++", *FLAGS, f"-I{EMULATOR}"]
    cache = cache_dir or default_cache_dir()
    runtime = _cached(
        cache,
        "emulator-runtime",
        [*compiler, *RUNTIME_FLAGS],
        sorted((EMULATOR / "runtime").iterdir()),
        _compile_runtime,
    )
    sources = [
        *sorted((SOURCE_ROOT / "hopper").iterdir()),
        *sorted(SOURCE_ROOT.glob("*.h")),
        *sorted((EMULATOR / "cuda").iterdir()),
        *sorted((EMULATOR / "device").iterdir()),
    ]
    library = _cached(
        cache,
        "emulator",
        [*compiler, *KERNEL_FLAGS, *more_flags],
        [source, *sources, runtime / RUNTIME],
        lambda command, folder: _compile_kernels(command, folder, source, runtime / RUNTIME),
    )
    return library / LIBRARY


def _cached(
    cache: Path, name: str, command: list[str], inputs: list[Path], fill: Callable[[list[str], Path], None]
) -> Path:
    """The folder that `fill` made of `command` and `inputs`, by running it unless it is there."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, _machine(), command[1:])).encode())
    for path in inputs:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    folder = cache / f"{name}-{digest.hexdigest()[:32]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        publish_folder(folder, lambda temporary: fill(command, temporary), replace=False)
    return folder


def _machine() -> str:
    """What -march=native makes of this machine, as a shared cache may serve several."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile_runtime(command: list[str], folder: Path) -> None:
    units = {unit: folder / f"{unit.stem}.o" for unit in sorted((EMULATOR / "runtime").glob("*.cc"))}
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda unit: _run([*command, "-c", str(unit), "-o", str(units[unit])]), units))
    _run(["ar", "rcsD", str(folder / RUNTIME), *map(str, units.values())])
    for path in units.values():
        path.unlink()


def _compile_kernels(command: list[str], folder: Path, source: Path, runtime: Path) -> None:
    """In a folder with the kernels' files, so that includes in quotes find the device's where they differ."""
    sources = folder / "sources"
    sources.mkdir()
    for path in {source, *(SOURCE_ROOT / "hopper").iterdir()}:
        replaced = EMULATOR / "device" / path.name
        (sources / path.name).symlink_to(replaced if replaced.exists() else path)
    kernels = str(folder / "kernels.o")
    includes = [f"-I{EMULATOR / 'cuda'}", f"-I{SOURCE_ROOT}"]
    _run([*command, *includes, "-x", "c++", "-c", str(sources / source.name), "-o", kernels])
    whole_runtime = ["-Wl,--whole-archive", str(runtime), "-Wl,--no-whole-archive", "-ldl"]
    _run([command[0], "-shared", kernels, *whole_runtime, "-Wl,-z,defs", "-o", str(folder / LIBRARY)])
    Path(kernels).unlink()
    shutil.rmtree(sources)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
