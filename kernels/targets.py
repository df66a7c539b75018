"""How each target is compiled: its compiler, flags and sources, as data that the cache key covers."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kernels.package import ABI_VERSION, LIBRARY

SOURCE_ROOT = Path(__file__).resolve().parent / "csrc"

# Optimised but strict IEEE arithmetic: the kernels rely on NaN and infinities. No -march: each translation
# unit names the instruction sets it needs and the library picks one at run time, so the artifact runs on any
# machine of its kind.
CPU_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
    "-Wno-unknown-warning-option",  # to Clang the two before are unknown
    "-Werror=return-type",
)
CPU_LINK_FLAGS = (
    "-shared",
    "-fopenmp",
    "-static-libstdc++",
    "-static-libgcc",
    "-Wl,-z,defs",
    "-Wl,--exclude-libs,ALL",
    "-Wl,--build-id=none",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
CPU_UNIT_FLAGS: Mapping[str, tuple[str, ...]] = {
    "kernel_avx2.cc": _AVX2,
    "kernel_avx512.cc": _AVX512,
    "kernel_avx512bf16.cc": (*_AVX512, "-mavx512bf16"),
}
X86 = ("x86_64", "AMD64")
CPU_NEEDS = "GCC 11 or Clang 14, or newer, with OpenMP"  # older ones were not tried
HOPPER_CUDA = (12, 4)
HOPPER_NEEDS = "the CUDA toolkit {}.{} or newer".format(*HOPPER_CUDA)

HOPPER_FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a",
    "-std=c++17",
    "-O3",
    "-shared",
    "-lineinfo",
    "--resource-usage",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC",
    "-Xcompiler",
    "-fvisibility=hidden",
)


CANNOT_RUN = 126  # as a shell's exit code


class BuildError(RuntimeError):
    """A target cannot be built; `unavailable` when the machine lacks something, not the code."""

    def __init__(self, message: str, *, unavailable: bool = False) -> None:
        super().__init__(message)
        self.unavailable = unavailable


@dataclass(frozen=True)
class CompilerReport:
    """What the compiler said: largest register count and spilled bytes, None where it says nothing."""

    registers: int | None = None
    spill_bytes: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a target's library."""

    target: str
    compiler: tuple[str, ...]
    compiler_version: str
    flags: tuple[str, ...]
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    needs: str  # for a person whose compiler fails
    runner: Callable[[Recipe, Path, Path], CompilerReport] = field(repr=False)

    def source_sha256(self) -> str:
        """One hash over names and contents of sources and headers."""
        digest = hashlib.sha256()
        for path in sorted({*self.sources, *self.headers}):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(SOURCE_ROOT)} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    def key(self) -> str:
        """Cache key: target, machine, compiler version, flags, sources and ABI."""
        parts = [
            self.target,
            platform.machine(),
            self.compiler_version,
            *self.flags,
            self.source_sha256(),
            ABI_VERSION,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def compile(self, folder: Path, log: Path) -> CompilerReport:
        """Write `folder`/libmla_decode.so and `log`; BuildError with the end of the compiler's output."""
        report = self.runner(self, folder, log)
        if not (folder / LIBRARY).is_file():
            name = self.compiler[0]
            raise BuildError(f"{name} wrote no {LIBRARY}, though it reported no error; is it a compiler?")
        return report


def cpu_recipe() -> Recipe:
    """C++17 and OpenMP by $CXX, else g++."""
    configured = os.environ.get("CXX", "")
    try:
        command = tuple(shlex.split(configured)) or ("g++",)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise BuildError(
            f"CXX={configured!r} is no command: {reason}; set CXX to a C++ compiler", unavailable=True
        ) from None
    compiler = shutil.which(command[0])
    if compiler is None:
        where = f"CXX={configured!r}" if configured else "g++"
        raise BuildError(
            f"{where} not found on PATH; install {CPU_NEEDS} (package g++) or set CXX", unavailable=True
        )
    folder = SOURCE_ROOT / "cpu"
    sources = sorted(folder.glob("*.cc"))
    if platform.machine() not in X86:
        sources = [path for path in sources if path.name not in CPU_UNIT_FLAGS]
    unit_flags = [f"{name}:{' '.join(flags)}" for name, flags in CPU_UNIT_FLAGS.items()]
    return Recipe(
        target="cpu",
        compiler=command,
        compiler_version=_version((compiler, *command[1:]))[0],
        flags=(*command[1:], *CPU_FLAGS, *CPU_LINK_FLAGS, *unit_flags),
        sources=tuple(sources),
        headers=(*sorted(SOURCE_ROOT.glob("*.h")), *sorted(folder.glob("*.h"))),
        needs=CPU_NEEDS,
        runner=_compile_cpu,
    )


def _compile_cpu(recipe: Recipe, folder: Path, log: Path) -> CompilerReport:
    units = [(source, folder / f"{source.stem}.o") for source in recipe.sources]
    common = [*recipe.compiler, *CPU_FLAGS, f"-I{SOURCE_ROOT}"]
    commands = [
        [*common, *CPU_UNIT_FLAGS.get(source.name, ()), "-c", str(source), "-o", str(unit)]
        for source, unit in units
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        output = list(pool.map(_run, commands))
    link = [*recipe.compiler, *(str(unit) for _, unit in units), *CPU_LINK_FLAGS, "-o", str(folder / LIBRARY)]
    if all(code == 0 for code, _ in output):
        output.append(_run(link))
    log.write_text("".join(text for _, text in output))
    for _, unit in units:
        unit.unlink(missing_ok=True)
    _raise_on_failure(recipe, output)
    return CompilerReport()


def hopper_recipe() -> Recipe:
    """CUDA C++ for sm_90a by nvcc, with no headers but the toolkit's; $MLA_KERNEL_DEBUG adds checks."""
    folder = SOURCE_ROOT / "hopper"
    debug = ("-DMLA_DEBUG",) if os.environ.get("MLA_KERNEL_DEBUG", "0") not in ("", "0") else ()
    sources = sorted(folder.glob("*.cu"))
    if not sources:
        raise BuildError("csrc/hopper holds no sources", unavailable=True)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError(f"nvcc not found on PATH; install {HOPPER_NEEDS}", unavailable=True)
    version = _version((nvcc,))[-1]
    release = re.search(r"cuda_(\d+)\.(\d+)", version)
    if release and tuple(map(int, release.groups())) < HOPPER_CUDA:
        raise BuildError(
            f"nvcc is of CUDA {release[1]}.{release[2]}; install {HOPPER_NEEDS}", unavailable=True
        )
    headers = [*sorted(SOURCE_ROOT.glob("*.h")), *sorted(folder.glob("*.h")), *sorted(folder.glob("*.cuh"))]
    return Recipe(
        target="hopper",
        compiler=("nvcc", f"-I{SOURCE_ROOT}"),
        compiler_version=version,
        flags=(*HOPPER_FLAGS, *debug),
        sources=tuple(sources),
        headers=tuple(headers),
        needs=HOPPER_NEEDS,
        runner=_compile_hopper,
    )


def _compile_hopper(recipe: Recipe, folder: Path, log: Path) -> CompilerReport:
    command = [*recipe.compiler, *recipe.flags, *map(str, recipe.sources), "-o", str(folder / LIBRARY)]
    output = [_run(command)]
    log.write_text(output[0][1])
    _raise_on_failure(recipe, output)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", output[0][1])]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", output[0][1])]
    return CompilerReport(max(registers, default=None), sum(spills) if registers else None)


RECIPES: Mapping[str, Callable[[], Recipe]] = {"cpu": cpu_recipe, "hopper": hopper_recipe}


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code, and the command with what it printed."""
    line = f"$ {shlex.join(command)}\n"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return CANNOT_RUN, f"{line}{error}\n"
    return done.returncode, f"{line}{done.stdout}{done.stderr}"


def _raise_on_failure(recipe: Recipe, output: list[tuple[int, str]]) -> None:
    for code, text in output:
        if code != 0:
            tail = "\n".join(text.splitlines()[-20:])
            raise BuildError(
                f"{recipe.compiler[0]} failed with exit code {code} on target {recipe.target}, "
                f"which needs {recipe.needs}:\n{tail}"
            )


@functools.cache
def _version(command: tuple[str, ...]) -> tuple[str, ...]:
    """The lines that a compiler prints about its version."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{shlex.join(command)} cannot be run: {error}", unavailable=True) from None
    if done.returncode != 0:
        raise BuildError(
            f"{shlex.join(command)} --version failed: {done.stderr.strip()[-300:]}", unavailable=True
        )
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) or ("unknown version",)
