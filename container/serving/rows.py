"""Triton kernels for the work between matrix products, a program or a few for each row of tokens.

Shapes that only depend on the model are constants of a kernel; the number of tokens is its grid. Arithmetic
is float32, rounded to the tensors' dtype where the torch versions in fused.py round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from container.serving.launch import DEPENDENT, release_dependents, wait_for_previous


@triton.jit
def rms_scale(x, size, eps):  # type: ignore[no-untyped-def]  # the language has no types to name
    """1 / root mean square of float32 values, zeros beyond `size`."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, weight_ptr, total_ptr, out_ptr, x_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * SIZE + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * SIZE + column, x, mask=inside)
    wide = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    value = wide * rms_scale(wide, SIZE, eps) * weight
    tl.store(out_ptr + row * SIZE + column, value.to(x.dtype), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, n] with rows of stride 1, delta [T, n] -> (x + delta, its norm); without delta (x, its norm)."""
    tokens, size = x.shape
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty_like(out)
    _norm_kernel[(tokens,)](
        x, x if delta is None else delta.contiguous(), weight, total, out, x.stride(0), eps,
        SIZE=size, BLOCK=triton.next_power_of_2(size), HAS_DELTA=delta is not None,
        num_warps=4 if size <= 4096 else 8,
    )  # fmt: skip
    return total, out


@triton.jit
def _silu_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def silu_product(x: Tensor) -> Tensor:
    """[T, 2 n] -> [T, n]: silu(first half) * second half."""
    x = x.contiguous()
    tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(size))
    _silu_kernel[(tokens, triton.cdiv(size, block))](x, out, SIZE=size, BLOCK=block)
    return out


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, pair, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of a rotary embedding, float32 [pairs]."""
    first = tl.load(x_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + pair, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + pair, mask=inside, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_latent(  # type: ignore[no-untyped-def]
    latent_ptr, norm_ptr, cos_ptr, sin_ptr, row_ptr, eps,
    ROPE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """The cache's row of a token: the normed latent, then the rotated key."""
    HALF: tl.constexpr = ROPE // 2
    kind: tl.constexpr = row_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_RANK)
    inside = column < RANK
    x = tl.load(latent_ptr + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    weight = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
    value = (wide * rms_scale(wide, RANK, eps) * weight).to(x.dtype)
    tl.store(row_ptr + column, value.to(kind), mask=inside)
    pair = tl.arange(0, BLOCK_PAIRS)
    first, second = _rotated(latent_ptr + RANK, cos_ptr, sin_ptr, pair, pair < HALF, HALF)
    tl.store(row_ptr + RANK + pair, first.to(x.dtype).to(kind), mask=pair < HALF)
    tl.store(row_ptr + RANK + HALF + pair, second.to(x.dtype).to(kind), mask=pair < HALF)


@triton.jit
def _absorb(  # type: ignore[no-untyped-def]
    query_ptr, weight_ptr, q_ptr, first,
    NOPE: tl.constexpr, RANK: tl.constexpr, BLOCK_PART: tl.constexpr, BLOCK_NOPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Values first.. of a head's query times its W_UK, whose rows are read before the query is waited for."""
    inner = tl.arange(0, BLOCK_NOPE)
    column = first + tl.arange(0, BLOCK_PART)
    mask = (inner[:, None] < NOPE) & (column[None, :] < RANK)
    weight = tl.load(weight_ptr + inner[:, None] * RANK + column[None, :], mask=mask, other=0.0)
    wait_for_previous(DEPENDENT)
    x = tl.load(query_ptr + inner, mask=inner < NOPE, other=0.0).to(tl.float32)
    value = tl.sum(weight.to(tl.float32) * x[:, None], axis=0)
    tl.store(q_ptr + column, value.to(q_ptr.dtype.element_ty), mask=column < RANK)


@triton.jit
def _attention_input_kernel(  # type: ignore[no-untyped-def]
    query_ptr, latent_ptr, norm_ptr, cos_ptr, sin_ptr, slot_ptr, weight_ptr, q_ptr, cache_ptr,
    query_stride, latent_stride, eps,
    NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_PART: tl.constexpr, BLOCK_NOPE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, ABSORB: tl.constexpr, HAS_SLOTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program 0 of a token writes its cache row; the others give `PARTS` parts of each head's query."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = ROPE // 2
    cos, sin = cos_ptr + token * HALF, sin_ptr + token * HALF
    release_dependents(DEPENDENT)
    if tl.program_id(1) == 0:
        wait_for_previous(DEPENDENT)
        slot = token
        if HAS_SLOTS:
            slot = tl.load(slot_ptr + token).to(tl.int64)
        row = cache_ptr + slot * (RANK + ROPE)
        latent = latent_ptr + token * latent_stride
        _store_latent(latent, norm_ptr, cos, sin, row, eps, ROPE, RANK, BLOCK_RANK, BLOCK_PAIRS)
    else:
        head = (tl.program_id(1) - 1) // PARTS
        part = (tl.program_id(1) - 1) % PARTS
        query = query_ptr + token * query_stride + head * (NOPE + ROPE)
        q = q_ptr + (token * HEADS + head) * (RANK + ROPE)
        if ABSORB:
            rows = weight_ptr + head * (NOPE + VALUE) * RANK
            _absorb(query, rows, q, part * BLOCK_PART, NOPE, RANK, BLOCK_PART, BLOCK_NOPE, DEPENDENT)
        else:
            wait_for_previous(DEPENDENT)
        if part == 0:
            pair = tl.arange(0, BLOCK_PAIRS)
            first, second = _rotated(query + NOPE, cos, sin, pair, pair < HALF, HALF)
            tl.store(q + RANK + pair, first.to(q_ptr.dtype.element_ty), mask=pair < HALF)
            tl.store(q + RANK + HALF + pair, second.to(q_ptr.dtype.element_ty), mask=pair < HALF)


def attention_input(
    query: Tensor,
    latent: Tensor,
    norm: Tensor,
    w_kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_rows: Tensor,
    slots: Tensor | None,
    q: Tensor,
    eps: float,
    absorb: bool,
) -> None:
    """Writes T rows of the cache and the T queries' rope halves, and with `absorb` the rest of the queries.

    query [T, heads * (nope + rope)] and latent [T, rank + rope], rows of stride 1; w_kv [heads * (nope + v),
    rank]; cache_rows [slots, rank + rope] at `slots` int64 [T], or [T, rank + rope] when slots is None; q
    [T, heads, rank + rope], contiguous.
    """
    tokens, heads, width = q.shape
    rope = 2 * cos.shape[1]
    rank = width - rope
    nope = query.shape[1] // heads - rope
    block = min(64, triton.next_power_of_2(rank))
    parts = triton.cdiv(rank, block) if absorb else 1
    _attention_input_kernel[(tokens, 1 + heads * parts)](
        query, latent, norm, cos, sin, cos if slots is None else slots, w_kv, q, cache_rows,
        query.stride(0), latent.stride(0), eps,
        NOPE=nope, ROPE=rope, RANK=rank, VALUE=w_kv.shape[0] // heads - nope, HEADS=heads, PARTS=parts,
        BLOCK_RANK=triton.next_power_of_2(rank), BLOCK_PART=block, BLOCK_NOPE=triton.next_power_of_2(nope),
        BLOCK_PAIRS=triton.next_power_of_2(rope // 2), ABSORB=absorb, HAS_SLOTS=slots is not None,
        **DEPENDENT,
    )  # fmt: skip


@triton.jit
def _greedy_kernel(logits_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = lane
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, SIZE, BLOCK):
        column = start + lane
        value = tl.load(logits_ptr + row * SIZE + column, mask=column < SIZE, other=float("-inf"))
        bad |= ((value != value) | (value == float("inf"))).to(tl.int32)
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, column, where)
    peak = tl.max(best, axis=0)
    first = tl.min(tl.where(best == peak, where, SIZE), axis=0)
    fine = (tl.max(bad, axis=0) == 0) & (peak > float("-inf"))
    tl.store(out_ptr + row, tl.where(fine, first, -1))


def greedy(logits: Tensor) -> Tensor:
    """float32 [R, vocabulary] -> int32 [R]: the first of the largest, -1 where the largest is not finite."""
    logits = logits.contiguous()
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    block = min(16384, triton.next_power_of_2(size))
    _greedy_kernel[(rows,)](logits, out, SIZE=size, BLOCK=block, num_warps=32 if block >= 8192 else 4)
    return out
