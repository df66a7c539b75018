"""Matrix times vector for the decode step of a single token: Triton kernels bound by reading weights.

A program takes a few whole rows of the matrix, requests all of their bytes at once, and keeps the small work
around the product (residual, norm, silu) in its own prologue and epilogue: each kernel less is two to three
microseconds less of an idle memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from container.serving.launch import DEPENDENT, release_dependents, wait_for_previous
from container.serving.rows import rms_scale

TILE = 8192  # weights a program has in flight: 64 a thread
ROUTER_ROWS = 4
DOWN_ROWS, DOWN_COLUMNS = 2, 512


@triton.jit
def _input(  # type: ignore[no-untyped-def]  # the language has no types to name
    x_ptr, delta_ptr, column, inside, HAS_DELTA: tl.constexpr
):  # fmt: skip
    """x + delta at `column`, rounded as the sum that is stored."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _normed(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, norm_ptr, column, inside, scale, HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr
):  # fmt: skip
    """The product's input at `column` in float32, rounded to x's dtype."""
    x = _input(x_ptr, delta_ptr, column, inside, HAS_DELTA)
    wide = x.to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
        wide = (wide * scale * weight).to(x.dtype).to(tl.float32)
    return wide


@triton.jit
def _router_rows(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, norm_ptr, router_ptr, scores_ptr, first, scale,
    IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Router logits first.. of the normed input, in float32."""
    expert = first + tl.arange(0, ROWS)
    score = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, IN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < IN
        x = _normed(x_ptr, delta_ptr, norm_ptr, column, inside, scale, HAS_DELTA, HAS_NORM)
        rows = router_ptr + expert[:, None] * IN + column[None, :]
        router = tl.load(rows, mask=(expert < EXPERTS)[:, None] & inside[None, :], other=0.0)
        score += tl.sum(router.to(tl.float32) * x[None, :], axis=1)
    tl.store(scores_ptr + expert, score, mask=expert < EXPERTS)


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, norm_ptr, weight_ptr, router_ptr, out_ptr, scores_ptr, total_ptr, normed_ptr, eps,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    EXPERTS: tl.constexpr, ROUTER_ROWS: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_NORM: tl.constexpr,
    GATED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The first programs take ROUTER_ROWS rows of the router each, the others ROWS rows of the matrix."""
    release_dependents(DEPENDENT)
    ROUTERS: tl.constexpr = (EXPERTS + ROUTER_ROWS - 1) // ROUTER_ROWS
    program = tl.program_id(0)
    row = (program - ROUTERS) * ROWS + tl.arange(0, ROWS)
    fits = ((row >= 0) & (row < OUT))[:, None]
    column = tl.arange(0, COLUMNS)
    weights = weight_ptr + row[:, None].to(tl.int64) * IN + column[None, :]
    # on their way before the kernel before this one has ended
    first = tl.load(weights, mask=fits & (column < IN)[None, :], other=0.0)
    if GATED:
        second = tl.load(weights + OUT * IN, mask=fits & (column < IN)[None, :], other=0.0)
    wait_for_previous(DEPENDENT)
    scale = 1.0
    if HAS_NORM or HAS_DELTA:
        whole = tl.arange(0, WHOLE)
        summed = _input(x_ptr, delta_ptr, whole, whole < IN, HAS_DELTA)
        if HAS_NORM:
            scale = rms_scale(summed.to(tl.float32), IN, eps)
        if program == 0:
            if HAS_DELTA:
                tl.store(total_ptr + whole, summed, mask=whole < IN)
            if EXPERTS > 0:
                normed = _normed(x_ptr, delta_ptr, norm_ptr, whole, whole < IN, scale, HAS_DELTA, HAS_NORM)
                tl.store(normed_ptr + whole, normed.to(normed_ptr.dtype.element_ty), mask=whole < IN)
    if program < ROUTERS:
        _router_rows(
            x_ptr, delta_ptr, norm_ptr, router_ptr, scores_ptr, program * ROUTER_ROWS, scale,
            IN, ROUTER_ROWS, COLUMNS, EXPERTS, HAS_DELTA, HAS_NORM,
        )  # fmt: skip
    else:
        value = tl.zeros((ROWS,), tl.float32)
        up = tl.zeros((ROWS,), tl.float32)
        for start in tl.static_range(0, IN, COLUMNS):
            inside = start + column < IN
            x = _normed(x_ptr, delta_ptr, norm_ptr, start + column, inside, scale, HAS_DELTA, HAS_NORM)
            if start > 0:
                first = tl.load(weights + start, mask=fits & inside[None, :], other=0.0)
                if GATED:
                    second = tl.load(weights + OUT * IN + start, mask=fits & inside[None, :], other=0.0)
            value += tl.sum(first.to(tl.float32) * x[None, :], axis=1)
            if GATED:
                up += tl.sum(second.to(tl.float32) * x[None, :], axis=1)
        if GATED:
            value = value / (1.0 + tl.exp(-value)) * up
        tl.store(out_ptr + row, value.to(out_ptr.dtype.element_ty), mask=row < OUT)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    delta: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """weight @ norm(x + delta) of one row: x [1, in], weight [out, in] -> [1, out], and x + delta.

    `gated` takes weight [2 out, in] and gives silu(first half) * second half.
    """
    out, total, _, _ = _linear(x, weight, delta, norm, eps, gated, out_dtype or x.dtype, None)
    return out, total


def linear_and_router(
    x: Tensor, weight: Tensor, delta: Tensor, norm: Tensor, eps: float, router: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gated `linear` of shared experts and, in the same launch, router [E, in] @ the same input.

    -> [1, out], x + delta, router logits float32 [1, E], norm(x + delta)
    """
    return _linear(x, weight, delta, norm, eps, True, x.dtype, router)


def _linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    out_dtype: torch.dtype,
    router: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = weight.shape[1]
    outputs = weight.shape[0] // (2 if gated else 1)
    experts = 0 if router is None else router.shape[0]
    out = torch.empty(1, outputs, dtype=out_dtype, device=x.device)
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x) if experts else x
    scores = torch.empty(1, experts, dtype=torch.float32, device=x.device) if experts else out
    columns, rows = _tile(size, 2 if gated else 1)
    programs = triton.cdiv(experts, ROUTER_ROWS) + triton.cdiv(outputs, rows)
    _linear_kernel[(programs,)](
        x, x if delta is None else delta, x if norm is None else norm, weight,
        weight if router is None else router, out, scores, total, normed, eps,
        OUT=outputs, IN=size, ROWS=rows, COLUMNS=columns, WHOLE=triton.next_power_of_2(size),
        EXPERTS=experts, ROUTER_ROWS=ROUTER_ROWS, HAS_DELTA=delta is not None, HAS_NORM=norm is not None,
        GATED=gated, num_warps=4, **DEPENDENT,
    )  # fmt: skip
    return out, total, scores, normed


def _tile(size: int, matrices: int) -> tuple[int, int]:
    """Columns and rows of a program's tile for rows of `size` weights of each of `matrices` matrices."""
    columns = min(2048, triton.next_power_of_2(size))
    return columns, max(1, min(16, TILE // (columns * matrices)))


@triton.jit
def _heads_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr,
    NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_dependents(DEPENDENT)
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    rows = weight_ptr + (head * (NOPE + VALUE) + NOPE + row[:, None]) * RANK
    mask = (row < VALUE)[:, None] & (column < RANK)[None, :]
    weight = tl.load(rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDENT)
    x = tl.load(x_ptr + head * RANK + column, mask=column < RANK, other=0.0).to(tl.float32)
    value = tl.sum(weight * x[None, :], axis=1)
    tl.store(out_ptr + head * VALUE + row, value.to(out_ptr.dtype.element_ty), mask=row < VALUE)


def head_values(x: Tensor, w_kv: Tensor, nope: int, dtype: torch.dtype) -> Tensor:
    """W_UV of each head: x [1, heads, rank], w_kv [heads * (nope + v), rank] -> `dtype` [1, heads * v]."""
    _, heads, rank = x.shape
    value = w_kv.shape[0] // heads - nope
    out = torch.empty(1, heads * value, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(rank)
    rows = max(1, min(16, TILE // block))
    _heads_kernel[(triton.cdiv(value, rows), heads)](
        x, w_kv, out, NOPE=nope, VALUE=value, RANK=rank, ROWS=rows, BLOCK=block, num_warps=4, **DEPENDENT
    )
    return out


@triton.jit
def _expert_gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, expert_ptr, out_ptr,
    WIDTH: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_dependents(DEPENDENT)
    choice = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wait_for_previous(DEPENDENT)
    expert = tl.load(expert_ptr + choice).to(tl.int64)
    weights = weight_ptr + (expert * 2 * WIDTH + row[:, None]) * IN + column[None, :]
    gate = tl.zeros((ROWS,), tl.float32)
    up = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, IN, COLUMNS):
        inside = start + column < IN
        mask = (row < WIDTH)[:, None] & inside[None, :]
        first = tl.load(weights + start, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(weights + WIDTH * IN + start, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(first * x, axis=1)
        up += tl.sum(second * x, axis=1)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + choice * WIDTH + row, value.to(out_ptr.dtype.element_ty), mask=row < WIDTH)


@triton.jit
def _expert_down_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, expert_ptr, share_ptr, shared_x_ptr, shared_weight_ptr, out_ptr,
    OUT: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, CHOICES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Products add up lane by lane over all experts and are summed once: each sum costs a barrier."""
    release_dependents(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    fits = (row < OUT)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weights = shared_weight_ptr + row[:, None] * SHARED + column[None, :]
    # on their way before the kernel before this one has ended, unlike those that depend on the router
    weight = tl.load(weights, mask=fits & (column < SHARED)[None, :], other=0.0)
    wait_for_previous(DEPENDENT)
    for start in tl.static_range(0, SHARED, COLUMNS):
        inside = start + column < SHARED
        if start > 0:
            weight = tl.load(weights + start, mask=fits & inside[None, :], other=0.0)
        x = tl.load(shared_x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * x[None, :]
    for choice in tl.static_range(CHOICES):
        expert = tl.load(expert_ptr + choice).to(tl.int64)
        share = tl.load(share_ptr + choice)
        chosen = weight_ptr + (expert * OUT + row[:, None]) * WIDTH + column[None, :]
        for start in tl.static_range(0, WIDTH, COLUMNS):
            inside = start + column < WIDTH
            part = tl.load(chosen + start, mask=fits & inside[None, :], other=0.0).to(tl.float32)
            x = tl.load(x_ptr + choice * WIDTH + start + column, mask=inside, other=0.0).to(tl.float32)
            total += part * (x * share)[None, :]
    value = tl.sum(total, axis=1)
    tl.store(out_ptr + row, value.to(out_ptr.dtype.element_ty), mask=row < OUT)


def chosen_experts(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    experts: Tensor,
    shares: Tensor,
    shared_x: Tensor | None,
    shared_w_out: Tensor | None,
) -> Tensor:
    """The routed experts of one token and the last product of the shared ones: [1, hidden].

    x [1, hidden]; w_in [E, 2 width, hidden]; w_out [E, hidden, width]; experts int32 and shares float32
    [1, k]; shared_x [1, n] @ shared_w_out [hidden, n] is added.
    """
    choices = experts.shape[1]
    _, hidden, width = w_out.shape
    inner = torch.empty(choices, width, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    columns, rows = _tile(hidden, 2)
    _expert_gate_up_kernel[(triton.cdiv(width, rows), choices)](
        x, w_in, experts, inner, WIDTH=width, IN=hidden, ROWS=rows, COLUMNS=columns, num_warps=4, **DEPENDENT
    )
    # narrow enough that the last step wastes few lanes when the width is no power of two
    columns = min(DOWN_COLUMNS, triton.next_power_of_2(width))
    _expert_down_kernel[(triton.cdiv(hidden, DOWN_ROWS),)](
        inner, w_out, experts, shares, inner if shared_x is None else shared_x,
        w_out if shared_w_out is None else shared_w_out, out,
        OUT=hidden, WIDTH=width, SHARED=0 if shared_w_out is None else shared_w_out.shape[1],
        CHOICES=choices, ROWS=DOWN_ROWS, COLUMNS=columns, num_warps=4, **DEPENDENT,
    )  # fmt: skip
    return out
