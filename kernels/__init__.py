"""Multi-head latent attention decode over a paged latent cache: one operator, several backends.

`flash_mla_with_kvcache` and `get_mla_metadata` take the arguments of flash_mla's Python interface, so a
program written for flash_mla runs on any backend of this package by changing its import.

Names load when they are first used: a step that only compiles or verifies a kernel never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.arguments import Problem, check_arguments
    from kernels.backends import Backend, BackendError, available_backends, get_backend
    from kernels.operator import flash_mla_with_kvcache, get_mla_metadata
    from kernels.package import KernelIndex, KernelPackage, KernelPackageError
    from kernels.targets import BuildError

__all__ = [
    "Backend",
    "BackendError",
    "BuildError",
    "KernelIndex",
    "KernelPackage",
    "KernelPackageError",
    "Problem",
    "available_backends",
    "check_arguments",
    "flash_mla_with_kvcache",
    "get_backend",
    "get_mla_metadata",
]
_MODULES = {
    "arguments": ("Problem", "check_arguments"),
    "backends": ("Backend", "BackendError", "available_backends", "get_backend"),
    "operator": ("flash_mla_with_kvcache", "get_mla_metadata"),
    "package": ("KernelIndex", "KernelPackage", "KernelPackageError"),
    "targets": ("BuildError",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"kernels.{module}"), name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
