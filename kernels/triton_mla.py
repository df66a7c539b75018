"""MLA decode in Triton: the portable GPU fallback (sm_80 and newer), any kv_lora_rank and rope dimension.

Flash-decoding in two launches: `_split_kernel` walks one part of one sequence's pages for a tile of query
rows and leaves an unnormalised accumulator with its running maximum and sum; `_merge_kernel` combines the
parts of each row in a fixed order, so equal inputs give equal bits. csrc/mla_decode.h defines the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.arguments import FLOAT_DTYPES, Problem, check_arguments, check_contents, empty_result

PAGE_SIZE = 64
_ROWS = 16  # query rows (query x head) a tile: the least that the tensor cores take as M
_LOG2_E = 1.4426950408889634


@triton.jit
def _split_kernel(  # type: ignore[no-untyped-def]  # the language has no types to name
    q_ptr, kv_ptr, table_ptr, seqlens_ptr, acc_ptr, stats_ptr,
    q_stride_b, q_stride_s, q_stride_h, kv_stride_block, kv_stride_token, table_stride,
    scale_log2, h_q, rows, s_q, num_splits,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_LATENT: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One (sequence, row tile, split): unnormalised acc [ROWS, LATENT] and stats (maximum, sum), base 2."""
    batch = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)

    row = tile * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    query = row // h_q
    head = row % h_q
    latent = tl.arange(0, BLOCK_LATENT)
    rope = tl.arange(0, BLOCK_ROPE)
    latent_ok = latent < LATENT
    rope_ok = rope < ROPE

    seqlen = tl.load(seqlens_ptr + batch)
    # How many tokens a row sees; without causality all see the whole cache.
    visible = seqlen - s_q + 1 + query if CAUSAL else tl.zeros_like(query) + seqlen

    q_row = q_ptr + batch.to(tl.int64) * q_stride_b + query * q_stride_s + head * q_stride_h
    q_latent = tl.load(q_row[:, None] + latent[None, :], mask=row_ok[:, None] & latent_ok[None, :], other=0.0)
    q_rope = tl.load(
        q_row[:, None] + LATENT + rope[None, :], mask=row_ok[:, None] & rope_ok[None, :], other=0.0
    )

    if UPCAST:
        q_latent = q_latent.to(tl.float32)
        q_rope = q_rope.to(tl.float32)

    # Splits are whole pages, evenly spread over the pages that this sequence really has.
    pages = (seqlen + PAGE - 1) // PAGE
    pages_a_split = (pages + num_splits - 1) // num_splits
    start = split * pages_a_split * PAGE
    end = tl.minimum(start + pages_a_split * PAGE, seqlen)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_LATENT], tl.float32)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        token_ok = token < end
        page = tl.load(table_ptr + batch.to(tl.int64) * table_stride + token // PAGE, mask=token_ok, other=0)
        kv_row = kv_ptr + page.to(tl.int64) * kv_stride_block + (token % PAGE) * kv_stride_token
        # Masked loads, not masked scores alone: 0 * NaN of an unused token would poison the accumulator.
        kv_latent = tl.load(
            kv_row[:, None] + latent[None, :], mask=token_ok[:, None] & latent_ok[None, :], other=0.0
        )
        kv_rope = tl.load(
            kv_row[:, None] + LATENT + rope[None, :], mask=token_ok[:, None] & rope_ok[None, :], other=0.0
        )
        weight_dtype = kv_latent.dtype
        if UPCAST:
            kv_latent = kv_latent.to(tl.float32)
            kv_rope = kv_rope.to(tl.float32)
        score = tl.dot(q_latent, tl.trans(kv_latent), input_precision="ieee")
        score = tl.dot(q_rope, tl.trans(kv_rope), score, input_precision="ieee") * scale_log2
        score = tl.where(token_ok[None, :] & (token[None, :] < visible[:, None]), score, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen nothing yet keeps -inf; subtracting it from itself would give NaN.
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - safe_peak[:, None])
        decay = tl.exp2(peak - safe_peak)
        total = total * decay + tl.sum(weight, 1)
        weight = weight.to(weight_dtype).to(kv_latent.dtype)
        acc = tl.dot(weight, kv_latent, acc * decay[:, None], input_precision="ieee")
        peak = new_peak

    slot = (batch.to(tl.int64) * rows + row) * num_splits + split
    tl.store(stats_ptr + slot * 2, peak, mask=row_ok)
    tl.store(stats_ptr + slot * 2 + 1, total, mask=row_ok)
    tl.store(
        acc_ptr + slot[:, None] * LATENT + latent[None, :], acc, mask=row_ok[:, None] & latent_ok[None, :]
    )


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    acc_ptr, stats_ptr, out_ptr, lse_ptr,
    out_stride_b, out_stride_s, out_stride_h, h_q, rows, s_q, num_splits,
    LATENT: tl.constexpr, BLOCK_LATENT: tl.constexpr,
):  # fmt: skip
    """Combines the splits of one row; out 0 and lse +inf where the row saw no token."""
    batch = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    latent = tl.arange(0, BLOCK_LATENT)
    latent_ok = latent < LATENT
    base = (batch * rows + row) * num_splits

    peak = tl.full([], float("-inf"), tl.float32)
    for split in range(num_splits):
        peak = tl.maximum(peak, tl.load(stats_ptr + (base + split) * 2))
    safe_peak = tl.where(peak == float("-inf"), 0.0, peak)

    total = tl.zeros([], tl.float32)
    out = tl.zeros([BLOCK_LATENT], tl.float32)
    for split in range(num_splits):
        weight = tl.exp2(tl.load(stats_ptr + (base + split) * 2) - safe_peak)
        total += weight * tl.load(stats_ptr + (base + split) * 2 + 1)
        part = tl.load(acc_ptr + (base + split) * LATENT + latent, mask=latent_ok, other=0.0)
        out += weight * part

    empty = total == 0.0
    out = tl.where(empty, 0.0, out / tl.where(empty, 1.0, total))
    lse = tl.where(
        empty, float("inf"), (safe_peak + tl.log2(tl.where(empty, 1.0, total))) / 1.4426950408889634
    )
    query = row // h_q
    head = row % h_q
    out_row = out_ptr + batch * out_stride_b + query * out_stride_s + head * out_stride_h
    tl.store(out_row + latent, out.to(out_ptr.dtype.element_ty), mask=latent_ok)
    tl.store(lse_ptr + (batch * h_q + head) * s_q + query, lse)


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@dataclass
class TritonBackend:
    """`mla_decode_triton` behind the interface of kernels/backends.py."""

    name: str = "triton"

    def unsupported(self, problem: Problem) -> str | None:
        """None when `problem` can run, else the reason."""
        if problem.device_type != "cuda" and not interpreted():
            return f"triton needs an NVIDIA GPU, the tensors are on {problem.device_type}"
        if problem.device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            return "triton's kernel needs compute capability 8.0 or newer"
        if problem.kv_dtype != problem.q_dtype or problem.q_dtype not in FLOAT_DTYPES:
            return f"triton takes q and cache of one dtype, got {problem.q_dtype} and {problem.kv_dtype}"
        if problem.page_size != PAGE_SIZE:
            return f"triton takes pages of {PAGE_SIZE} tokens, got {problem.page_size}"
        if problem.kv_lora_rank % 16 or problem.rope_dim % 16 or problem.rope_dim == 0:
            sizes = f"{problem.kv_lora_rank} and {problem.rope_dim}"
            return f"kv_lora_rank and rope dimension must be multiples of 16, got {sizes}"
        return None

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `mla_decode_triton`; raises NotImplementedError for what it cannot run."""
        check_arguments(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)
        if reason := self.unsupported(Problem.of(q, k_cache, head_dim_v, causal)):
            raise NotImplementedError(f"backend triton: {reason}")
        if q.device.type == "cpu":  # the interpreter follows a wrong index out of the process's memory
            check_contents(block_table, cache_seqlens, *k_cache.shape[:2])
        return mla_decode_triton(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)


def mla_decode_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decode over a paged latent cache.

    Args:
        q: [b, s_q, h_q, head_dim_v + rope], float32, bfloat16 or float16; last dimension contiguous.
        k_cache: [num_blocks, 64, 1, head_dim_v + rope], q's dtype; last dimension contiguous.
        block_table: [b, max_blocks_per_seq] int32, page numbers of each sequence.
        cache_seqlens: [b] int32, tokens of each sequence, the new ones included.
        head_dim_v: latent size (kv_lora_rank), a multiple of 16.
        softmax_scale: multiplies the scores.
        causal: query i sees the first `cache_seqlens - s_q + 1 + i` tokens.

    Returns:
        out [b, s_q, h_q, head_dim_v] of q's dtype, 0 where a row sees nothing, and
        lse [b, h_q, s_q] float32, +inf there.

    The launch shape depends on shapes only, never on the lengths, so that a CUDA graph can hold it.
    """
    batch, s_q, h_q, width = q.shape
    rope = width - head_dim_v
    rows = s_q * h_q
    out, lse = empty_result(q, head_dim_v)
    if batch == 0:
        return out, lse

    tiles = triton.cdiv(rows, _ROWS)
    num_splits = _num_splits(batch * tiles, block_table.shape[1], q.device)
    acc = torch.empty(batch, rows, num_splits, head_dim_v, dtype=torch.float32, device=q.device)
    stats = torch.empty(batch, rows, num_splits, 2, dtype=torch.float32, device=q.device)
    block_latent = triton.next_power_of_2(head_dim_v)
    tokens = 16 if q.dtype == torch.float32 else 32
    _split_kernel[(batch, tiles, num_splits)](
        q, k_cache, block_table, cache_seqlens, acc, stats,
        q.stride(0), q.stride(1), q.stride(2), k_cache.stride(0), k_cache.stride(1), block_table.stride(0),
        softmax_scale * _LOG2_E, h_q, rows, s_q, num_splits,
        LATENT=head_dim_v, ROPE=rope, BLOCK_LATENT=block_latent,
        BLOCK_ROPE=max(16, triton.next_power_of_2(rope)),
        ROWS=_ROWS, TOKENS=tokens, PAGE=PAGE_SIZE, CAUSAL=causal,
        # The interpreter multiplies bfloat16 as bit patterns; its values are exact in float32.
        UPCAST=interpreted() and q.dtype == torch.bfloat16, num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge_kernel[(batch, rows)](
        acc, stats, out, lse, out.stride(0), out.stride(1), out.stride(2), h_q, rows, s_q, num_splits,
        LATENT=head_dim_v, BLOCK_LATENT=block_latent, num_warps=4,
    )  # fmt: skip
    return out, lse


def _num_splits(programs: int, max_pages: int, device: torch.device) -> int:
    """Enough splits for two waves of the device, at least four pages each; from shapes alone."""
    if device.type != "cuda":
        return max(1, min(4, max_pages))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(max_pages, 4), 64))
