"""One interface over every implementation of the operator, and the choice among them.

A backend is called with checked tensors; `unsupported` says beforehand, in words for a person, why it cannot
run a problem. `auto` measures the correct backends of a device on the problem at hand and keeps the fastest.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels import build
from kernels.arguments import Problem, check_arguments, check_contents
from kernels.package import KernelIndex, KernelPackage
from kernels.reference import mla_decode_absorbed

COMPILED = ("cpu", "hopper")
NAMES = ("auto", *COMPILED, "triton", "flash_mla", "reference")


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

    @torch.no_grad()
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
        check_contents(block_table, cache_seqlens, *k_cache.shape[:2])
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
    """The backend `name`.

    Compiled ones come from the artifact `kernel_dir`; without one they are built into the cache. `flash_mla`
    comes from the artifact when it holds one, else from the environment.

    Raises BackendError naming what is missing; KernelPackageError and BuildError as their modules say.
    """
    # Imported only when asked for: triton is optional, and the others import this module.
    if name == "auto":
        from kernels.auto import AutoBackend

        return AutoBackend(kernel_dir)
    if name == "reference":
        return ReferenceBackend()
    if name in COMPILED:
        from kernels.compiled import CompiledBackend

        return CompiledBackend(_package(name, kernel_dir))
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise BackendError("backend 'triton': package triton is not installed; install the triton extra")
        from kernels.triton_mla import TritonBackend

        return TritonBackend()
    if name == "flash_mla":
        from kernels.flash_mla_backend import FlashMlaBackend

        return FlashMlaBackend(KernelIndex.load(kernel_dir).flash_mla if kernel_dir else None)
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
    """Every backend that can be had here for tensors on `device`, by name; `kernel_dir` as in `get_backend`.

    A missing compiler or library leaves its backend out; a damaged artifact raises.
    """
    names = ("cpu",) if device.type == "cpu" else ("hopper", "triton")
    found: dict[str, Backend] = {}
    for name in (*names, "flash_mla", "reference"):
        try:
            found[name] = get_backend(name, kernel_dir)
        except BackendError:
            continue
        except build.BuildError as error:
            if not error.unavailable:
                raise
    return found
