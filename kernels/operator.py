"""The operator's public functions, with flash_mla's arguments."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

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
    tile_scheduler_metadata: Tensor | None = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    *,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of new queries over a paged latent cache, in absorbed form.

    q [b, s_q, h_q, head_dim_v + rope] (bfloat16, float16 or float32); k_cache [num_blocks, page_size, 1,
    head_dim_v + rope] of the same kinds, or uint8 [num_blocks, page_size, 1, 656] for fp8_ds_mla; block_table
    int32 [b, max_blocks]; cache_seqlens int32 [b], tokens in the cache with the new ones. `softmax_scale`
    defaults to 1/sqrt(head_dim_v + rope), which is not a model's: pass the model's. With `causal` query i
    sees the first cache_seqlens - s_q + 1 + i tokens. `tile_scheduler_metadata`, `num_splits` and
    `is_fp8_kvcache` are taken for compatibility: every backend schedules by itself, and the cache's dtype
    says whether it is FP8.

    Returns out [b, s_q, h_q, head_dim_v] in q's dtype and lse [b, h_q, s_q] float32 (natural logarithm). A
    query that sees no token gives out 0 and lse +inf. Raises ValueError naming the argument and both values,
    NotImplementedError when the backend cannot run the sizes, BackendError when the backend cannot be had.
    """
    if indices is not None:
        raise NotImplementedError("indices (sparse attention) is not supported, expected None")
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if isinstance(backend, str):
        backend = _shared_backend(backend)
    return backend(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)


def get_mla_metadata(
    cache_seqlens: Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """flash_mla's scheduling call: (tile_scheduler_metadata [0, 8] int32, num_splits [b + 1] int32), both
    inert.

    Backends of this package compute their schedule from the lengths inside the call, so nothing need be
    precomputed.
    """
    if topk is not None:
        raise NotImplementedError(f"topk is {topk}: sparse attention is not supported, expected None")
    metadata = torch.empty(0, 8, dtype=torch.int32, device=cache_seqlens.device)
    return metadata, torch.zeros(cache_seqlens.shape[0] + 1, dtype=torch.int32, device=cache_seqlens.device)
