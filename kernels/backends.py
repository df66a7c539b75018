"""One interface over every implementation of the operator, and the choice among them.

A backend is called with checked tensors; `unsupported` says beforehand, in words for a person, why it cannot
run a problem. `auto` measures the correct backends of a device on the problem at hand and keeps the fastest.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels import build
from kernels.arguments import Problem, check_arguments
from kernels.package import KernelIndex, KernelPackage
from kernels.reference import mla_decode_absorbed

COMPILED = ("cpu", "hopper")
# Written elsewhere in this package; listed by where they live, so that their imports are paid only when asked
# for.
OPTIONAL = {
    "triton": ("kernels.triton_mla", "TritonBackend"),
    "flash_mla": ("kernels.flash_mla_backend", "FlashMlaBackend"),
}
NAMES = ("auto", *COMPILED, *OPTIONAL, "reference")


class BackendError(RuntimeError):
    """A backend cannot be had here, or cannot run the problem it was given."""


@runtime_checkable
class Backend(Protocol):
    """One implementation of the operator."""

    name: str

    def unsupported(self, problem: Problem) -> str | None:
        """None when `problem` can run, else the reason."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """out [b, s_q, h_q, head_dim_v] in q's dtype, lse [b, h_q, s_q] float32; arguments as in kernels."""


@dataclass
class ReferenceBackend:
    """The operator by torch alone, float32 arithmetic: correct everywhere, on every device."""

    name: str = "reference"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        check_arguments(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)
        out, lse = mla_decode_absorbed(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            softmax_scale,
            causal,
            compute_dtype=torch.float32,
        )
        return out, lse


def get_backend(name: str, kernel_dir: Path | None = None) -> Backend:
    """The backend `name`; compiled ones come from the artifact `kernel_dir`, or are built into the cache
    without it.

    Raises BackendError naming what is missing; KernelPackageError and BuildError as their modules say.
    """
    if name == "auto":
        from kernels.auto import AutoBackend

        return AutoBackend(kernel_dir)
    if name == "reference":
        return ReferenceBackend()
    if name in COMPILED:
        from kernels.compiled import CompiledBackend

        return CompiledBackend(_package(name, kernel_dir))
    if name in OPTIONAL:
        module, attribute = OPTIONAL[name]
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"backend {name!r} is not part of this installation ({module} is missing)")
        return getattr(importlib.import_module(module), attribute)()
    raise BackendError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")


def _package(name: str, kernel_dir: Path | None) -> KernelPackage:
    if kernel_dir is None:
        return build.cached_package(name)
    index = KernelIndex.load(kernel_dir)
    if name not in index.packages:
        reason = index.skipped.get(name, "it was not asked for")
        raise BackendError(f"kernel artifact {kernel_dir} holds no target {name!r}: {reason}")
    return index.packages[name]


def available_backends(kernel_dir: Path | None, device: torch.device) -> dict[str, Backend]:
    """Every backend that can be had here for tensors on `device`, by name; without `kernel_dir` builds what
    it can.

    A missing compiler or library leaves its backend out; a damaged artifact raises.
    """
    names = ("cpu", "reference") if device.type == "cpu" else ("hopper", "triton", "flash_mla", "reference")
    found: dict[str, Backend] = {}
    for name in names:
        try:
            found[name] = get_backend(name, kernel_dir)
        except BackendError:
            continue
        except build.BuildError as error:
            if not error.unavailable:
                raise
    return found
