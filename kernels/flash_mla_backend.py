"""The backend `flash_mla`: any installed package that gives the module `flash_mla` FlashMLA's interface.

PyPI's `sgl-flash-mla` installs that module and keeps the Hopper kernels behind `use_legacy=True`. PyPI's own
`flash-mla` is a source archive without its headers and cannot be built.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import torch
from torch import Tensor

from kernels.arguments import Problem, check_arguments
from kernels.backends import BackendError

_LATENT, _ROPE, _PAGE_SIZE = 512, 64, 64


class FlashMlaBackend:
    """FlashMLA's dense decode. Raises BackendError where the package is missing or cannot be loaded."""

    name = "flash_mla"

    def __init__(self) -> None:
        self._module = _load()
        self._decode = self._module.flash_mla_with_kvcache
        # Releases differ: newer ones fill an empty schedule at the first call and keep Hopper as "legacy".
        self._schedule_takes_lengths = bool(
            inspect.signature(self._module.get_mla_metadata).parameters.keys() & {"cache_seqlens"}
        )
        self._legacy = {"use_legacy": True} if "use_legacy" in _parameters(self._decode) else {}

    def unsupported(self, problem: Problem) -> str | None:
        """None when `problem` can run, else the reason."""
        if problem.device_type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
            return "flash_mla needs a GPU of compute capability 9.0"
        if (problem.kv_lora_rank, problem.rope_dim) != (_LATENT, _ROPE):
            return f"flash_mla takes sizes 512 + 64, got {problem.kv_lora_rank} + {problem.rope_dim}"
        if problem.page_size != _PAGE_SIZE:
            return f"flash_mla takes pages of {_PAGE_SIZE} tokens, got {problem.page_size}"
        if problem.q_dtype != problem.kv_dtype or problem.q_dtype not in (torch.bfloat16, torch.float16):
            return f"flash_mla takes bfloat16 or float16, got {problem.q_dtype} and {problem.kv_dtype}"
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
        """As `kernels.flash_mla_with_kvcache`; the schedule is computed in the call, since lengths change."""
        check_arguments(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)
        if reason := self.unsupported(Problem.of(q, k_cache, head_dim_v, causal)):
            raise ValueError(reason)
        if self._schedule_takes_lengths:
            schedule = self._module.get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
        else:
            schedule = self._module.get_mla_metadata()
        out, lse = self._decode(
            q, k_cache, block_table, cache_seqlens, head_dim_v, *schedule,
            softmax_scale=softmax_scale, causal=causal, **self._legacy,
        )  # fmt: skip
        return out, lse


def _parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _load() -> ModuleType:
    try:
        module = importlib.import_module("flash_mla")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"backend 'flash_mla': module flash_mla cannot be loaded ({error}); install the flash_mla extra"
        ) from error
    for name in ("flash_mla_with_kvcache", "get_mla_metadata"):
        if not hasattr(module, name):
            raise BackendError(f"backend 'flash_mla': module {module.__file__} has no {name}")
    return module
