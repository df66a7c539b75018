"""`torch.ops.mla.decode`: the operator as a torch.library custom op, for torch.compile and export."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import flash_mla_with_kvcache
from kernels.arguments import empty_result


@torch.library.custom_op("mla::decode", mutates_args=())
def decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kernels.flash_mla_with_kvcache` on the backend of that name; shapes, dtypes and errors as there."""
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        backend=backend,
    )


@decode.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return empty_result(q, head_dim_v)
