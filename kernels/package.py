"""Load and verify a kernel artifact (KernelIndex) and what is in it.

A KernelPackage is a target that `kernels.build` compiled; a FlashMlaPackage is somebody else's package, which
`kernels.flash_mla_install` put beside them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ABI_VERSION = 1
SCHEMA_VERSION = 1
LIBRARY = "libmla_decode.so"
MANIFEST = "manifest.json"
LOG = "compiler.log"
INDEX = "index.json"
FLASH_MLA = "flash_mla"  # the module's name, its backend's, and its folder's in an artifact
FLASH_MLA_INTERFACE = ("flash_mla_with_kvcache", "get_mla_metadata")


class KernelPackageError(ValueError):
    """A kernel package is missing, damaged, or made for another interface, target or machine."""


class DecodeParams(ctypes.Structure):
    """`mla_decode_params` of csrc/mla_decode.h; the library refuses another size."""

    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("q_dtype", ctypes.c_int32),
        ("kv_dtype", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("s_q", ctypes.c_int32),
        ("h_q", ctypes.c_int32),
        ("kv_lora_rank", ctypes.c_int32),
        ("rope_dim", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("max_blocks_per_seq", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("num_splits", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("q", ctypes.c_void_p),
        ("q_stride_batch", ctypes.c_int64),
        ("q_stride_seq", ctypes.c_int64),
        ("q_stride_head", ctypes.c_int64),
        ("kv_cache", ctypes.c_void_p),
        ("kv_stride_block", ctypes.c_int64),
        ("kv_stride_token", ctypes.c_int64),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("cache_seqlens", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride_batch", ctypes.c_int64),
        ("out_stride_seq", ctypes.c_int64),
        ("out_stride_head", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
    )


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; KernelPackageError when it is missing or is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise KernelPackageError(
            f"{path} is missing; build the kernel again (python -m kernels.build)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KernelPackageError(f"{path} is not JSON ({error}); build the kernel again") from None
    return _object(value, path)


def _object(value: object, where: object) -> dict[str, Any]:
    """`value`, if JSON gave an object."""
    if not isinstance(value, dict):
        raise KernelPackageError(
            f"{where} holds {type(value).__name__}, not an object; build the kernel again"
        )
    return value


@dataclass(frozen=True)
class KernelPackage:
    """A verified compiled target: `folder` with the library, its manifest and the compiler's output."""

    folder: Path
    target: str
    sha256: str
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path | str) -> KernelPackage:
        """Read and verify `folder`; opens no library. Raises KernelPackageError naming what differs."""
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST)
        missing = {"abi_version", "target", "sha256", "bytes", "machine"} - manifest.keys()
        if missing:
            raise KernelPackageError(
                f"{folder / MANIFEST} lacks {', '.join(sorted(missing))}; build the kernel again"
            )
        if manifest["abi_version"] != ABI_VERSION:
            raise KernelPackageError(
                f"kernel package {folder} has ABI version {manifest['abi_version']}, "
                f"this code speaks {ABI_VERSION}; build the kernel again with this version of the code"
            )
        _check_machine(folder, manifest)
        library = folder / LIBRARY
        if not library.is_file():
            raise KernelPackageError(
                f"{library} is missing; build the kernel again (python -m kernels.build)"
            )
        size, sha = library.stat().st_size, file_sha256(library)
        if size != manifest["bytes"] or sha != manifest["sha256"]:
            raise KernelPackageError(
                f"{library} is damaged: manifest says {manifest['bytes']} bytes, "
                f"sha256 {manifest['sha256']}; found {size} bytes, sha256 {sha}; copy or build it again"
            )
        return cls(folder, manifest["target"], sha, manifest)

    def open(self) -> ctypes.CDLL:
        """The library with argument types set; KernelPackageError when the file is not what it claims."""
        path = self.folder / LIBRARY
        try:
            library = ctypes.CDLL(str(path.resolve()))
            library.mla_decode_abi_version.restype = ctypes.c_uint32
            library.mla_decode_target.restype = ctypes.c_char_p
            library.mla_decode_workspace_bytes.argtypes = [ctypes.c_void_p]
            library.mla_decode_workspace_bytes.restype = ctypes.c_uint64
            library.mla_decode_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
            library.mla_decode_run.restype = ctypes.c_int32
        except (OSError, AttributeError) as error:
            raise KernelPackageError(
                f"{path} cannot be loaded: {error}; build the kernel on this machine"
            ) from None
        version, target = library.mla_decode_abi_version(), library.mla_decode_target().decode()
        if version != ABI_VERSION:
            raise KernelPackageError(
                f"{path} speaks ABI version {version}, this code {ABI_VERSION}; build it again"
            )
        if target != self.target:
            raise KernelPackageError(
                f"{path} is target {target!r}, its manifest says {self.target!r}; build it again"
            )
        return library


@dataclass(frozen=True)
class FlashMlaPackage:
    """A verified package with flash_mla's interface: `folder` with site/, its manifest and pip's output."""

    folder: Path
    sha256: str
    manifest: Mapping[str, Any]

    @property
    def site(self) -> Path:
        """The folder to import `flash_mla` from."""
        return self.folder / "site"

    @property
    def label(self) -> str:
        """Name and version, e.g. "sgl-flash-mla 1.0.0"."""
        return f"{self.manifest['name']} {self.manifest['version']}"

    @classmethod
    def load(cls, folder: Path | str) -> FlashMlaPackage:
        """Verify every file below site/; imports nothing. Raises KernelPackageError naming what differs."""
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST)
        missing = {"name", "version", "machine", "files", "sha256"} - manifest.keys()
        if missing:
            raise KernelPackageError(
                f"{folder / MANIFEST} lacks {', '.join(sorted(missing))}; run CompileKernel again"
            )
        _check_machine(folder, manifest)
        check_files(
            folder / "site",
            _object(manifest["files"], f"files of {folder / MANIFEST}"),
            site_files(folder / "site"),
        )
        sha = combined_sha256(manifest["files"])
        if sha != manifest["sha256"]:
            raise KernelPackageError(
                f"{folder / MANIFEST} has sha256 {manifest['sha256']}, its files give {sha}; install it again"
            )
        return cls(folder, sha, manifest)


def site_files(site: Path) -> dict[str, str]:
    """SHA-256 of each file below `site` by its path there; Python's own caches are left out."""
    return {
        path.relative_to(site).as_posix(): file_sha256(path)
        for path in sorted(site.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_files(where: object, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise KernelPackageError naming the first file of `where` that is missing, additional or different."""
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise KernelPackageError(
                f"{path} in {where} has sha256 {found.get(path, 'none (it is missing)')}, "
                f"the manifest says {expected.get(path, 'nothing of it')}; copy or install it again"
            )


def _check_machine(folder: Path, manifest: Mapping[str, Any]) -> None:
    if manifest["machine"] != platform.machine():
        raise KernelPackageError(
            f"kernel package {folder} was compiled for {manifest['machine']}, this machine is "
            f"{platform.machine()}; build the kernel on this kind of machine"
        )


@dataclass(frozen=True)
class KernelIndex:
    """A kernel artifact: the compiled packages, somebody else's (or None), and why others are not in it."""

    folder: Path
    requested: str
    packages: Mapping[str, KernelPackage]
    skipped: Mapping[str, str]
    sha256: str
    flash_mla: FlashMlaPackage | None = None

    @classmethod
    def load(cls, folder: Path | str) -> KernelIndex:
        """Read and verify `folder`/index.json and every package in it."""
        folder = Path(folder)
        index = read_json(folder / INDEX)
        if index.get("schema_version") != SCHEMA_VERSION:
            raise KernelPackageError(
                f"{folder / INDEX} has schema_version {index.get('schema_version')}, "
                f"this code reads {SCHEMA_VERSION}"
            )
        packages: dict[str, KernelPackage] = {}
        flash_mla: FlashMlaPackage | None = None
        hashes: dict[str, str] = {}
        for target, entry in _object(index.get("packages", {}), f"packages of {folder / INDEX}").items():
            if target == FLASH_MLA:
                flash_mla = FlashMlaPackage.load(folder / target)
                hashes[target] = flash_mla.sha256
            else:
                package = packages[target] = KernelPackage.load(folder / target)
                hashes[target] = package.sha256
                if package.target != target:
                    raise KernelPackageError(
                        f"{folder / target} holds target {package.target!r}, expected {target!r}"
                    )
            claimed = _object(entry, f"{target} of {folder / INDEX}").get("sha256")
            if hashes[target] != claimed:
                raise KernelPackageError(
                    f"{folder / target} has sha256 {hashes[target]}, {INDEX} says {claimed}; "
                    "the artifact was mixed from two builds, build it again"
                )
        expected = combined_sha256(hashes)
        if index.get("sha256") != expected:
            raise KernelPackageError(
                f"{folder / INDEX} has sha256 {index.get('sha256')}, its packages give {expected}"
            )
        skipped = _object(index.get("skipped", {}), f"skipped of {folder / INDEX}")
        return cls(folder, index.get("requested", ""), packages, skipped, expected, flash_mla)


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """One hash over the targets' hashes, independent of their order."""
    text = "".join(f"{target} {sha}\n" for target, sha in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()
