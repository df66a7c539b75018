"""The MLA decode operator written in torch: its definition, and the fastest form that torch alone gives.

`mla_decode_reference` is the definition in float64, one query row at a time; every backend is compared with
it. `mla_decode_absorbed` is the baseline a user without this package would write: gather the pages, two
batched matrix products around a softmax (the absorbed form of DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

FP8_TOKEN_BYTES = 656
FP8_LATENT = 512
FP8_SCALE_GROUP = 128


def dequantize_fp8_ds_mla(cache: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack an fp8_ds_mla cache, uint8 [..., 656], to `dtype` [..., 576].

    A token holds 512 e4m3 latents, 4 float32 scales (one for each 128 latents) and 64 bfloat16 rope values;
    this is FlashMLA's layout. Raises ValueError on any other dtype or token size.
    """
    if cache.dtype != torch.uint8 or cache.shape[-1] != FP8_TOKEN_BYTES:
        raise ValueError(
            f"an fp8_ds_mla cache is uint8 [..., {FP8_TOKEN_BYTES}], got {cache.dtype} {list(cache.shape)}"
        )
    cache = cache.contiguous()
    groups = FP8_LATENT // FP8_SCALE_GROUP
    latent = cache[..., :FP8_LATENT].contiguous().view(torch.float8_e4m3fn).to(dtype)
    scales = cache[..., FP8_LATENT : FP8_LATENT + 4 * groups].contiguous().view(torch.float32).to(dtype)
    rope = cache[..., FP8_LATENT + 4 * groups :].contiguous().view(torch.bfloat16).to(dtype)
    latent = latent.unflatten(-1, (groups, FP8_SCALE_GROUP)) * scales.unsqueeze(-1)
    return torch.cat([latent.flatten(-2), rope], dim=-1)


def quantize_fp8_ds_mla(cache: Tensor) -> Tensor:
    """Pack a cache [..., 576] into fp8_ds_mla, uint8 [..., 656]; a scale is a group's largest value / 448."""
    if cache.shape[-1] != FP8_LATENT + 64:
        raise ValueError(f"fp8_ds_mla needs {FP8_LATENT + 64} values a token, got {cache.shape[-1]}")
    latent = cache[..., :FP8_LATENT].float().unflatten(-1, (-1, FP8_SCALE_GROUP))
    scales = latent.abs().amax(-1).div(448.0).clamp_min(1e-12)
    codes = (latent / scales.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    rope = cache[..., FP8_LATENT:].to(torch.bfloat16).contiguous()
    return torch.cat(
        [codes.view(torch.uint8), scales.contiguous().view(torch.uint8), rope.view(torch.uint8)], dim=-1
    ).contiguous()


def visible_tokens(cache_seqlens: Tensor, s_q: int, causal: bool) -> Tensor:
    """Number of cache tokens that each query sees, int64 [b, s_q]; negative values are clamped to 0."""
    lengths = cache_seqlens.to(torch.int64)[:, None].expand(-1, s_q)
    if causal:
        lengths = lengths - s_q + 1 + torch.arange(s_q, device=cache_seqlens.device)
    return lengths.clamp_min(0)


def gather_tokens(k_cache: Tensor, block_table_row: Tensor, count: int) -> Tensor:
    """The first `count` tokens of one batch row, [count, width], unpacked when the cache is fp8_ds_mla."""
    page_size = k_cache.shape[1]
    pages = k_cache[block_table_row[: (count + page_size - 1) // page_size].long(), :, 0]
    tokens = pages.flatten(0, 1)[:count]
    return dequantize_fp8_ds_mla(tokens) if k_cache.dtype == torch.uint8 else tokens


def mla_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The operator's definition, in float64.

    q [b, s_q, h_q, width], k_cache [num_blocks, page_size, 1, width] (or uint8 [..., 656]), block_table int32
    [b, max_blocks], cache_seqlens int32 [b], width = head_dim_v + rope. Returns out [b, s_q, h_q, head_dim_v]
    and lse [b, h_q, s_q], both float64, on q's device. A query that sees no token gives out 0 and lse +inf.
    """
    b, s_q, h_q, width = q.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(b, s_q, h_q, head_dim_v, dtype=torch.float64, device=q.device)
    lse = torch.full((b, h_q, s_q), float("inf"), dtype=torch.float64, device=q.device)
    counts = visible_tokens(cache_seqlens, s_q, causal).tolist()
    for row in range(b):
        for i in range(s_q):
            n = counts[row][i]
            if n == 0:
                continue
            tokens = gather_tokens(k_cache, block_table[row], n).double()
            scores = (q[row, i].double() @ tokens.T) * scale
            lse[row, :, i] = torch.logsumexp(scores, dim=-1)
            out[row, i] = torch.softmax(scores, dim=-1) @ tokens[:, :head_dim_v]
    return out, lse


def mla_decode_absorbed(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    compute_dtype: torch.dtype | None = None,
    attend: Callable[..., tuple[Tensor, Tensor]] | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator as two batched matrix products in `compute_dtype` (default: the cache's, so the fastest).

    Shapes as in `mla_decode_reference`; out has q's dtype, lse is float32. Rows are padded to the longest one
    and masked only where lengths differ; pages that no row uses are never read. With a 16-bit `compute_dtype`
    torch rounds the scores to 16 bits: that is the baseline's speed and its error; torch.float32 is accurate.
    `attend` replaces the tensor part, for `compiled_absorbed`. `length` says that every row has that many
    tokens: nothing is then read back from a GPU.
    """
    b, s_q, h_q, width = q.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    page_size = k_cache.shape[1]
    longest = length if length is not None else int(cache_seqlens.max()) if b else 0
    if longest <= 0:
        return (
            torch.zeros(b, s_q, h_q, head_dim_v, dtype=q.dtype, device=q.device),
            torch.full((b, h_q, s_q), float("inf"), device=q.device),
        )
    table = block_table[:, : (longest + page_size - 1) // page_size]
    dtype = compute_dtype or (q.dtype if k_cache.dtype == torch.uint8 else k_cache.dtype)
    counts = visible_tokens(cache_seqlens, s_q, causal)  # [b, s_q]
    masked = int(counts.min()) < longest if length is None else causal and s_q > 1
    if not masked:
        return (attend or _attend)(q, k_cache, table, longest, head_dim_v, scale, dtype)
    position = torch.arange(longest, device=q.device)
    stale = position[None] >= cache_seqlens[:, None]
    table = table.masked_fill(stale[:, ::page_size], 0)
    hidden = (position >= counts[..., None]).repeat_interleave(h_q, 1)
    out, lse = (attend or _attend)(q, k_cache, table, longest, head_dim_v, scale, dtype, stale, hidden)
    empty = counts == 0
    out = out.masked_fill(empty[:, :, None, None], 0)
    return out, lse.masked_fill(empty[:, None], float("inf"))


def _attend(
    q: Tensor,
    k_cache: Tensor,
    table: Tensor,
    longest: int,
    head_dim_v: int,
    scale: float,
    dtype: torch.dtype,
    stale: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather, unpack, score, softmax, sum.

    `stale` [b, longest] is memory that may hold NaN, `hidden` [b, s_q * h_q, longest] what a query must skip.
    """
    b, s_q, h_q, width = q.shape
    keys = k_cache[table.long(), :, 0].flatten(1, 2)[:, :longest]
    keys = dequantize_fp8_ds_mla(keys, dtype) if keys.dtype == torch.uint8 else keys.to(dtype)
    if stale is not None:  # 0 * NaN is NaN, so weights of 0 do not suffice
        keys = keys.masked_fill(stale[..., None], 0)
    scores = torch.bmm(q.reshape(b, s_q * h_q, width).to(dtype), keys.transpose(1, 2)).float() * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = torch.bmm(torch.exp(scores - lse).to(dtype), keys[..., :head_dim_v]).to(q.dtype)
    return out.view(b, s_q, h_q, head_dim_v), lse.view(b, s_q, h_q).transpose(1, 2).contiguous()


@functools.cache
def compiled_absorbed() -> Callable[..., tuple[Tensor, Tensor]]:
    """`mla_decode_absorbed` with its tensor part under torch.compile; dynamic shapes serve a whole bench."""
    return functools.partial(mla_decode_absorbed, attend=torch.compile(_attend, dynamic=True))
