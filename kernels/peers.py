"""The public MLA decode kernels this package is measured against, behind one interface.

`flash_mla` is PyPI's `sgl-flash-mla` (FlashMLA's dense decode for Hopper, its legacy path), `fa3`
PyPI's `fa3-fwd` (FlashAttention-3 with `qv`). Both are optional: `unavailable` says why one cannot
be used. `prepare` does outside of the timed call what a serving engine can do once for all layers
of a step, the tile schedule; `fresh_schedule=True` puts it into the call, as happens when the
lengths have changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LATENT = 512
ROPE = 64

Run = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """One problem: q [b, s_q, h_q, 576], k_cache [blocks, 64, 1, 576], block_table [b, pages]."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    softmax_scale: float
    causal: bool = False


def _flash_mla(inputs: Inputs, fresh_schedule: bool) -> Run:
    module = importlib.import_module("flash_mla")
    metadata, _ = module.get_mla_metadata()

    def run() -> tuple[Tensor, Tensor]:
        schedule = module.get_mla_metadata()[0] if fresh_schedule else metadata
        return module.flash_mla_with_kvcache(
            inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, LATENT, schedule,
            softmax_scale=inputs.softmax_scale, causal=inputs.causal, use_legacy=True,
        )  # fmt: skip

    run()  # fills the metadata
    return run


def _fa3(inputs: Inputs, fresh_schedule: bool) -> Run:
    """The wheel has no paged path, so row i reads the i-th stretch of the pool, whatever its pages."""
    module = importlib.import_module("fa3_fwd_interface")
    b, s_q, h_q, _ = inputs.q.shape
    capacity = inputs.block_table.shape[1] * inputs.k_cache.shape[1]
    rows = inputs.k_cache.flatten(0, 2)[: b * capacity].view(b, capacity, 1, LATENT + ROPE)
    latent, rope = rows[..., :LATENT], rows[..., LATENT:]
    q_latent, q_rope = inputs.q[..., :LATENT].contiguous(), inputs.q[..., LATENT:].contiguous()
    schedule = None
    if not fresh_schedule:
        schedule = module.get_scheduler_metadata(
            b, s_q, capacity, h_q, 1, ROPE, inputs.cache_seqlens, qkv_dtype=inputs.q.dtype, headdim_v=LATENT,
            causal=inputs.causal,
        )  # fmt: skip

    def run() -> tuple[Tensor, Tensor]:
        out, lse, *_ = module.flash_attn_with_kvcache(
            q_rope, rope, latent, qv=q_latent, cache_seqlens=inputs.cache_seqlens,
            softmax_scale=inputs.softmax_scale, causal=inputs.causal, scheduler_metadata=schedule,
            return_softmax_lse=True,
        )  # fmt: skip
        return out, lse

    run()
    return run


_PREPARE: dict[str, tuple[str, Callable[[Inputs, bool], Run]]] = {
    "flash_mla": ("flash_mla", _flash_mla),
    "fa3": ("fa3_fwd_interface", _fa3),
}
NAMES = tuple(_PREPARE)


def unavailable(name: str) -> str | None:
    """None when the peer can be imported and a Hopper GPU is present, else the reason."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    try:
        importlib.import_module(_PREPARE[name][0])
    except (ImportError, OSError, RuntimeError) as error:
        return f"{_PREPARE[name][0]} cannot be imported: {error}"
    return None


def prepare(name: str, inputs: Inputs, *, fresh_schedule: bool = False) -> Run:
    """A call that runs peer `name` on `inputs` and returns (out, lse) in the peer's own shapes."""
    return _PREPARE[name][1](inputs, fresh_schedule)
