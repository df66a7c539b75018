"""Compile the decode operator: source -> KernelPackage, content-addressed and atomic.

`build` compiles each target into a cache whose key is the compiler's version, the flags and the sources, then
copies the packages to the artifact folder. A package appears in one rename, so a reader sees all of it or
nothing; a build that loses a race against an equal one takes the winner's result.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.files import publish_folder, write_atomic
from kernels.package import (
    ABI_VERSION,
    INDEX,
    LIBRARY,
    LOG,
    MANIFEST,
    SCHEMA_VERSION,
    KernelIndex,
    KernelPackage,
    KernelPackageError,
    combined_sha256,
    file_sha256,
)
from kernels.targets import RECIPES, BuildError, Recipe

__all__ = ["BuildError", "build", "cached_package", "default_cache_dir", "write_index"]


def default_cache_dir() -> Path:
    """$MLA_KERNEL_CACHE, else ~/.cache/mla-pipeline/kernels."""
    configured = os.environ.get("MLA_KERNEL_CACHE")
    try:
        return Path(configured) if configured else Path.home() / ".cache" / "mla-pipeline" / "kernels"
    except RuntimeError:  # a user without an entry in the password database
        raise BuildError("no home folder for the compile cache; set MLA_KERNEL_CACHE to a folder") from None


def build(targets: str | Sequence[str], out_dir: Path, cache_dir: Path | None = None) -> KernelIndex:
    """Build `targets` into `out_dir` and return its verified index.

    "auto" builds every target that can be built here and records why another cannot; a target named by itself
    must build. Raises BuildError with the remedy (no compiler, compiler's error, nothing could be built, a
    folder that cannot be written).
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    automatic = names == ["auto"]
    wanted = list(RECIPES) if automatic else names
    packages: dict[str, KernelPackage] = {}
    skipped: dict[str, str] = {}
    for name in wanted:
        try:
            packages[name] = cached_package(name, cache_dir)
        except BuildError as error:
            if not automatic or not error.unavailable:
                raise
            skipped[name] = str(error)
    if not packages:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise BuildError(f"no kernel target can be built here: {reasons or 'none was asked for'}")
    out_dir = Path(out_dir)
    with _explained(f"artifact folder {out_dir}", "make room there, or give another folder"):
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, package in packages.items():
            publish_folder(out_dir / name, functools.partial(_copy_files, package.folder), replace=True)
        entries = {name: {"sha256": package.sha256} for name, package in packages.items()}
        return write_index(out_dir, ",".join(names), entries, skipped)


def write_index(
    folder: Path, requested: str, packages: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, str]
) -> KernelIndex:
    """Write index.json over what `folder` holds, and load it.

    `packages` maps a target to its entry, which has at least "sha256"; `skipped` maps one to the reason.
    """
    index = {
        "schema_version": SCHEMA_VERSION,
        "requested": requested,
        "packages": dict(packages),
        "skipped": dict(skipped),
        "sha256": combined_sha256({name: entry["sha256"] for name, entry in packages.items()}),
    }
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return KernelIndex.load(folder)


def cached_package(target: str, cache_dir: Path | None = None) -> KernelPackage:
    """The package of `target` from the cache, compiled first when it is missing or damaged."""
    if target not in RECIPES:
        raise BuildError(f"unknown kernel target {target!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[target]()
    key = recipe.key()
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache / f"{target}-{key[:32]}"
    with _explained(
        f"compile cache {cache}", "set MLA_KERNEL_CACHE or --cache to a folder that can be written"
    ):
        if folder.exists():
            try:
                return KernelPackage.load(folder)
            except KernelPackageError as error:
                print(f"kernels.build: cache entry rejected, compiling again: {error}", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        publish_folder(folder, lambda temporary: _compile(recipe, temporary), replace=folder.exists())
        return KernelPackage.load(folder)


@contextmanager
def _explained(where: str, fix: str) -> Iterator[None]:
    """BuildError instead of what the operating system says of a folder."""
    try:
        yield
    except OSError as error:
        raise BuildError(f"{where}: {error.strerror or error} ({error.filename}); {fix}") from error


def _compile(recipe: Recipe, folder: Path) -> None:
    """Run the compiler in `folder` and leave library, log and manifest there."""
    started = time.perf_counter()
    report = recipe.compile(folder, folder / LOG)
    library = folder / LIBRARY
    manifest: dict[str, Any] = {
        "abi_version": ABI_VERSION,
        "target": recipe.target,
        "machine": platform.machine(),
        "compiler": recipe.compiler_version,
        "flags": list(recipe.flags),
        "source_sha256": recipe.source_sha256(),
        "sha256": file_sha256(library),
        "bytes": library.stat().st_size,
        "build_seconds": round(time.perf_counter() - started, 3),
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _copy_files(source: Path, folder: Path) -> None:
    for name in (LIBRARY, MANIFEST, LOG):
        shutil.copyfile(source / name, folder / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m kernels.build --target auto|cpu|hopper --out DIR`."""
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="auto", choices=["auto", *RECIPES])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="artifact folder")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="compile cache, default $MLA_KERNEL_CACHE")
    options = parser.parse_args(arguments)
    try:
        index = build(options.target, options.out, options.cache)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, package in index.packages.items():
        manifest = package.manifest
        print(
            f"{name}: {manifest['bytes']} bytes, {manifest['build_seconds']} s, sha256 {package.sha256[:16]}"
        )
    for name, reason in index.skipped.items():
        print(f"{name}: skipped, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
