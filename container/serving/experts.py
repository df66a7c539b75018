"""The routed experts of a few tokens on a GPU: two Triton kernels that read only the chosen experts' weights.

A grouped matrix product works in tiles of many rows and needs the tokens sorted by expert; with a token or
a few it is the reading of the weights that counts, and every (token, choice) pair can read its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]  # pointers and numbers
    x_ptr, weight_ptr, expert_ptr, out_ptr, hidden, width, choices,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_ptr + pair).to(tl.int64)
    gate_row = weight_ptr + expert * 2 * width * hidden + row[:, None].to(tl.int64) * hidden
    up_row = gate_row + width.to(tl.int64) * hidden
    x_row = x_ptr + (pair // choices) * hidden
    gate = tl.zeros((ROWS,), tl.float32)
    up = tl.zeros((ROWS,), tl.float32)
    inside = row[:, None] < width
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside & (column[None, :] < hidden)
        x = tl.load(x_row + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(tl.load(gate_row + column[None, :], mask=mask, other=0.0).to(tl.float32) * x, axis=1)
        up += tl.sum(tl.load(up_row + column[None, :], mask=mask, other=0.0).to(tl.float32) * x, axis=1)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + pair * width + row, value.to(out_ptr.dtype.element_ty), mask=row < width)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, expert_ptr, share_ptr, out_ptr, hidden, width, choices,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row[:, None] < hidden
    total = tl.zeros((ROWS,), tl.float32)
    for choice in range(choices):
        pair = token * choices + choice
        expert = tl.load(expert_ptr + pair).to(tl.int64)
        weight_row = weight_ptr + expert * hidden * width + row[:, None].to(tl.int64) * width
        part = tl.zeros((ROWS,), tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = inside & (column[None, :] < width)
            x = tl.load(x_ptr + pair * width + column, mask=column < width, other=0.0)[None, :].to(tl.float32)
            weight = tl.load(weight_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
            part += tl.sum(weight * x, axis=1)
        total += part * tl.load(share_ptr + pair)
    tl.store(out_ptr + token * hidden + row, total.to(out_ptr.dtype.element_ty), mask=row < hidden)


def routed_experts(x: Tensor, w_in: Tensor, w_out: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """x [T, hidden]; w_in [E, 2 width, hidden] (gate, then up); w_out [E, hidden, width]; experts int64
    [T, k]; shares float32 [T, k] -> [T, hidden], the sum over k of share * down(silu(gate) * up)."""
    tokens, choices = experts.shape
    hidden, width = w_out.shape[1:]
    x, experts, shares = x.contiguous(), experts.contiguous(), shares.contiguous()
    inner = torch.empty(tokens * choices, width, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    _gate_up_kernel[(tokens * choices, triton.cdiv(width, 8))](
        x, w_in, experts, inner, hidden, width, choices, ROWS=8, COLUMNS=512, num_warps=4
    )
    _down_kernel[(tokens, triton.cdiv(hidden, 8))](
        inner, w_out, experts, shares, out, hidden, width, choices, ROWS=8, COLUMNS=512, num_warps=4
    )
    return out
