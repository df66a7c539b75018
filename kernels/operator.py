"""The operator's public functions, with flash_mla's arguments."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.arguments import FP8_VIEWS, check_tensors
from kernels.backends import Backend, get_backend


@functools.cache
def _shared_backend(name: str, kernel_dir: Path | None = None) -> Backend:
    return get_backend(name, kernel_dir)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of new queries over a paged latent cache, in absorbed form.

    q [b, s_q, h_q, head_dim_v + rope] (bfloat16, float16 or float32); k_cache [num_blocks, page_size, 1,
    head_dim_v + rope] of the same kinds, or bytes [num_blocks, page_size, 1, 656] for fp8_ds_mla (uint8, int8
    or float8_e4m3fn, as flash_mla has it); block_table int32 [b, max_blocks]; cache_seqlens int32 [b], tokens
    in the cache with the new ones. `softmax_scale` defaults to 1/sqrt(head_dim_v + rope), which is not a
    model's: pass the model's. With `causal` query i sees the first cache_seqlens - s_q + 1 + i tokens.
    `tile_scheduler_metadata` and `num_splits` are taken for compatibility: every backend schedules by itself.
    The cache's dtype says whether it is FP8; `is_fp8_kvcache` may be left out, but not contradict it.
    `indices` and the arguments after it, flash_mla's sparse attention, have to be None.

    Returns out [b, s_q, h_q, head_dim_v] in q's dtype and lse [b, h_q, s_q] float32 (natural logarithm). A
    query that sees no token gives out 0 and lse +inf. No gradient flows through it, as in flash_mla;
    torch.ops.mla.decode (kernels.custom_op) raises on the way back. Raises ValueError naming the argument and
    both values, TypeError for what is no tensor, NotImplementedError when the backend cannot run the problem,
    BackendError when the backend cannot be had.
    """
    sparse = {
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in sparse.items():
        if value is not None:
            raise NotImplementedError(f"{name} (sparse attention) is not supported, expected None")
    check_tensors(q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens)
    if k_cache.dtype in FP8_VIEWS:
        k_cache = k_cache.view(torch.uint8)
    if is_fp8_kvcache and k_cache.dtype != torch.uint8:
        raise ValueError(f"is_fp8_kvcache is True, expected False for a k_cache of {k_cache.dtype}")
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if isinstance(backend, str):
        backend = _shared_backend(backend)
    return backend(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """flash_mla's scheduling call; what it returns is inert.

    Backends of this package compute their schedule from the lengths inside the call, so nothing need be
    precomputed. As in flash_mla's releases, with lengths it returns (tile_scheduler_metadata [0, 8] int32,
    num_splits [b + 1] int32), without them (the same, None). `num_heads_per_head_k` is the old name of
    `num_q_tokens_per_head_k`. Raises NotImplementedError for sparse attention.
    """
    if topk is not None:
        raise NotImplementedError(f"topk is {topk}: sparse attention is not supported, expected None")
    if cache_seqlens is None:
        return torch.empty(0, 8, dtype=torch.int32), None
    metadata = torch.empty(0, 8, dtype=torch.int32, device=cache_seqlens.device)
    return metadata, torch.zeros(cache_seqlens.shape[0] + 1, dtype=torch.int32, device=cache_seqlens.device)
