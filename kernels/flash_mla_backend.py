"""The backend `flash_mla`: any package that gives the module `flash_mla` FlashMLA's interface.

It comes from the kernel artifact where CompileKernel installed one (KernelSource), else from the environment:
PyPI's `sgl-flash-mla` installs that module and keeps the Hopper kernels behind `use_legacy=True`. PyPI's own
`flash-mla` is a source archive without its headers and cannot be built.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.arguments import Problem, check_arguments, check_contents, empty_result
from kernels.backends import BackendError
from kernels.package import FLASH_MLA, FLASH_MLA_INTERFACE, FlashMlaPackage
from kernels.site_import import import_from
from kernels.workloads import make_inputs

_LATENT, _ROPE, _PAGE_SIZE = 512, 64, 64


class FlashMlaBackend:
    """FlashMLA's dense decode. Raises BackendError where the package is missing or cannot be loaded."""

    name = FLASH_MLA

    def __init__(self, package: FlashMlaPackage | None = None) -> None:
        self._module = _load(package.site.resolve() if package else None)
        self._decode = self._module.flash_mla_with_kvcache
        # Releases differ: newer ones fill an empty schedule at the first call and keep Hopper as "legacy".
        self._schedule_takes_lengths = "cache_seqlens" in _parameters(self._module.get_mla_metadata)
        self._legacy = {"use_legacy": True} if "use_legacy" in _parameters(self._decode) else {}
        self._refusals: dict[Problem, str | None] = {}

    def unsupported(self, problem: Problem) -> str | None:
        """None when `problem` can run, else the reason.

        Hopper is what the known packages are made for. What else a package runs on only it knows: there one
        small call decides.
        """
        if (problem.kv_lora_rank, problem.rope_dim) != (_LATENT, _ROPE):
            return f"flash_mla takes sizes 512 + 64, got {problem.kv_lora_rank} + {problem.rope_dim}"
        if problem.page_size != _PAGE_SIZE:
            return f"flash_mla takes pages of {_PAGE_SIZE} tokens, got {problem.page_size}"
        if problem.q_dtype != problem.kv_dtype or problem.q_dtype not in (torch.bfloat16, torch.float16):
            return f"flash_mla takes bfloat16 or float16, got {problem.q_dtype} and {problem.kv_dtype}"
        if problem.device_type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            return None
        small = dataclasses.replace(problem, batch=1)
        if small not in self._refusals:
            self._refusals[small] = self._try(small)
        return self._refusals[small]

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
        """As `kernels.flash_mla_with_kvcache`; the schedule is computed in the call, since lengths change."""
        check_arguments(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)
        if reason := self.unsupported(Problem.of(q, k_cache, head_dim_v, causal)):
            raise NotImplementedError(f"backend flash_mla: {reason}")
        if q.device.type == "cpu":
            check_contents(block_table, cache_seqlens, *k_cache.shape[:2])
        if not len(q):  # FlashMLA refuses a batch without rows
            return empty_result(q, head_dim_v)
        if softmax_scale <= 0:  # FlashMLA takes the maximum before it scales, so its scale must be positive
            q = -q if softmax_scale < 0 else torch.zeros_like(q)
            softmax_scale = -softmax_scale or 1.0
        schedule = self.schedule(q, cache_seqlens)
        return self.run(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, schedule)

    def schedule(self, q: Tensor, cache_seqlens: Tensor) -> tuple[Any, ...]:
        """What `run` takes for these shapes and lengths; releases that leave it empty fill it in there."""
        if self._schedule_takes_lengths:
            return tuple(self._module.get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1))
        return tuple(self._module.get_mla_metadata())

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
        schedule: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        """The call alone, with a schedule made for the same lengths; arguments are not checked."""
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "causal": causal, **self._legacy}
        out, lse = self._decode(q, k_cache, block_table, cache_seqlens, head_dim_v, *schedule, **options)
        return out, lse

    def _try(self, problem: Problem) -> str | None:
        inputs = make_inputs(
            [problem.s_q],
            s_q=problem.s_q,
            h_q=problem.h_q,
            q_dtype=problem.q_dtype,
            kv_dtype=problem.kv_dtype,
            causal=problem.causal,
            device=problem.device_type,
        )
        try:
            self.run(*inputs.arguments(), self.schedule(inputs.q, inputs.cache_seqlens))
            if problem.device_type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a package of unknown origin raises, its text is the reason
            return f"flash_mla does not run on this {problem.device_type}: {type(error).__name__}: {error}"
        return None


def _parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _load(site: Path | None) -> ModuleType:
    """Module flash_mla of the folder `site`, or of the environment."""
    where = site or "the environment"
    try:
        module = import_from(site, FLASH_MLA) if site else importlib.import_module(FLASH_MLA)
    except (Exception, SystemExit) as error:  # a package of unknown origin may raise anything
        fix = "the image lacks what it needs" if site else "install the package or set KernelSource"
        raise BackendError(
            f"backend 'flash_mla': module flash_mla of {where} cannot be loaded "
            f"({type(error).__name__}: {error}); {fix}"
        ) from error
    if site and not Path(str(module.__file__)).resolve().is_relative_to(site):
        raise BackendError(
            f"backend 'flash_mla': {module.__file__} is loaded already, {site} needs a process of its own"
        )
    for name in FLASH_MLA_INTERFACE:
        if not callable(getattr(module, name, None)):
            raise BackendError(f"backend 'flash_mla': module {module.__file__} has no {name}")
    return module
