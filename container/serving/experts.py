"""The routed experts on a GPU: Triton kernels for the choice of experts and for their matrix products.

Every expert's tokens are listed on the device, so nothing waits for the host, and a program reads its tile of
an expert's weights once for all tokens of that expert; experts that nobody chose are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from container.serving.launch import DEPENDENT, release_dependents, wait_for_previous

TILE_OUT = 64  # outputs of a program
TILE_IN = 64  # inputs a step of its loop


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]  # the language has no types to name
    logits_ptr, bias_ptr, expert_ptr, share_ptr, scale,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr, GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The largest are found by counting, for each, how many are larger: no sort, no loop."""
    release_dependents(DEPENDENT)
    wait_for_previous(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < EXPERTS
    logits = tl.load(logits_ptr + token * EXPERTS + i, mask=inside, other=float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        power = tl.exp(logits - tl.max(logits, axis=0))
        score = power / tl.sum(power, axis=0)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + i, mask=inside, other=0.0)
    # NaN compares with nothing: it must not leave a place of the list unwritten
    choice = tl.where(inside & (choice == choice), choice, float("-inf"))
    if KEPT_GROUPS < GROUPS:
        SIZE: tl.constexpr = EXPERTS // GROUPS
        group = i // SIZE
        peers = tl.where(group[:, None] == group[None, :], choice[None, :], float("-inf"))
        best = tl.max(peers, axis=1)
        if HAS_BIAS and SIZE > 1:  # V3 adds a group's two best, V2 takes the best
            first = tl.argmax(peers, axis=1)
            best += tl.max(tl.where(i[None, :] == first[:, None], float("-inf"), peers), axis=1)
        leads = (i % SIZE == 0) & inside
        tied = (best[None, :] == best[:, None]) & (group[None, :] < group[:, None])
        ahead = leads[None, :] & ((best[None, :] > best[:, None]) | tied)
        dropped = tl.sum(ahead.to(tl.int32), axis=1) >= KEPT_GROUPS
        choice = tl.where(dropped, float("-inf"), choice)
    tied = (choice[None, :] == choice[:, None]) & (i[None, :] < i[:, None])
    rank = tl.sum(((choice[None, :] > choice[:, None]) | tied).to(tl.int32), axis=1)
    chosen = (rank < CHOICES) & inside
    if NORM:
        score = score / (tl.sum(tl.where(chosen, score, 0.0), axis=0) + 1e-20)
    tl.store(expert_ptr + token * CHOICES + rank, i, mask=chosen)
    tl.store(share_ptr + token * CHOICES + rank, score * scale, mask=chosen)


def route(
    logits: Tensor, bias: Tensor | None, choices: int, groups: int, kept: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Shares float32 and experts int32 [T, choices] for router logits float32 [T, E].

    With `bias` float32 [E] the scores are sigmoids and the bias counts for the choice only (V3), else a
    softmax (V2). `kept` of `groups` groups of experts stay eligible.
    """
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, choices, dtype=torch.int32, device=logits.device)
    shares = torch.empty(tokens, choices, dtype=torch.float32, device=logits.device)
    _route_kernel[(tokens,)](
        logits, logits if bias is None else bias, chosen, shares, scale,
        EXPERTS=experts, CHOICES=choices, GROUPS=groups, KEPT_GROUPS=kept, SIGMOID=bias is not None,
        HAS_BIAS=bias is not None, NORM=norm, BLOCK=triton.next_power_of_2(experts),
        num_warps=4 if experts <= 64 else 8, **DEPENDENT,
    )  # fmt: skip
    return shares, chosen


@triton.jit(do_not_specialize=["pairs", "tokens"])
def _list_kernel(expert_ptr, list_ptr, count_ptr, pairs, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    expert = tl.program_id(0)
    found = 0
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        hit = tl.load(expert_ptr + pair, mask=pair < pairs, other=-1) == expert
        place = found + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + expert.to(tl.int64) * tokens + place, pair, mask=hit)
        found += tl.sum(hit.to(tl.int32), axis=0)
    tl.store(count_ptr + expert, found)


@triton.jit(do_not_specialize=["tokens"])
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, list_ptr, count_ptr, out_ptr, tokens,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inner = tl.arange(0, IN)
    count = tl.load(count_ptr + expert)
    gate_ptr = weight_ptr + (expert * 2 * WIDTH + column[None, :]) * HIDDEN + inner[:, None]
    for first in range(0, count, ROWS):
        place = first + tl.arange(0, ROWS)
        pair = tl.load(list_ptr + expert * tokens + place, mask=place < count, other=0).to(tl.int64)
        x_row = x_ptr + (pair // CHOICES)[:, None] * HIDDEN + inner[None, :]
        gate = tl.zeros((ROWS, OUT), tl.float32)
        up = tl.zeros((ROWS, OUT), tl.float32)
        for start in range(0, HIDDEN, IN):
            x = tl.load(x_row + start, mask=start + inner[None, :] < HIDDEN, other=0.0)
            mask = (start + inner[:, None] < HIDDEN) & (column[None, :] < WIDTH)
            gate = tl.dot(x, tl.load(gate_ptr + start, mask=mask, other=0.0), gate, input_precision="ieee")
            w_up = tl.load(gate_ptr + WIDTH * HIDDEN + start, mask=mask, other=0.0)
            up = tl.dot(x, w_up, up, input_precision="ieee")
        value = gate / (1.0 + tl.exp(-gate)) * up
        mask = (place < count)[:, None] & (column[None, :] < WIDTH)
        tl.store(out_ptr + pair[:, None] * WIDTH + column, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, list_ptr, count_ptr, share_ptr, out_ptr, tokens,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inner = tl.arange(0, IN)
    count = tl.load(count_ptr + expert)
    down_ptr = weight_ptr + (expert * HIDDEN + column[None, :]) * WIDTH + inner[:, None]
    for first in range(0, count, ROWS):
        place = first + tl.arange(0, ROWS)
        pair = tl.load(list_ptr + expert * tokens + place, mask=place < count, other=0).to(tl.int64)
        x_row = x_ptr + pair[:, None] * WIDTH + inner[None, :]
        total = tl.zeros((ROWS, OUT), tl.float32)
        for start in range(0, WIDTH, IN):
            x = tl.load(x_row + start, mask=start + inner[None, :] < WIDTH, other=0.0)
            mask = (start + inner[:, None] < WIDTH) & (column[None, :] < HIDDEN)
            weight = tl.load(down_ptr + start, mask=mask, other=0.0)
            total = tl.dot(x, weight, total, input_precision="ieee")
        total *= tl.load(share_ptr + pair, mask=place < count, other=0.0)[:, None]
        mask = (place < count)[:, None] & (column[None, :] < HIDDEN)
        tl.store(out_ptr + pair[:, None] * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    part_ptr, shared_ptr, out_ptr,
    HIDDEN: tl.constexpr, CHOICES: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOICES):
        row = part_ptr + (token * CHOICES + choice) * HIDDEN
        total += tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def routed_experts(
    x: Tensor, w_in: Tensor, w_out: Tensor, experts: Tensor, shares: Tensor, shared: Tensor | None
) -> Tensor:
    """x [T, hidden]; w_in [E, 2 width, hidden] (gate, then up); w_out [E, hidden, width]; experts int32 and
    shares float32 [T, k]; shared [T, hidden], added as it is.

    -> [T, hidden], the sum over k of share * down(silu(gate) * up), and of `shared`.
    """
    tokens, choices = experts.shape
    groups, hidden, width = w_out.shape
    x, device, pairs = x.contiguous(), x.device, tokens * choices
    lists = torch.empty(groups, tokens, dtype=torch.int32, device=device)
    counts = torch.empty(groups, dtype=torch.int32, device=device)
    inner = torch.empty(pairs, width, dtype=x.dtype, device=device)
    parts = torch.empty(pairs, hidden, dtype=x.dtype, device=device)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=device)
    block = min(1024, triton.next_power_of_2(pairs))
    _list_kernel[(groups,)](experts, lists, counts, pairs, tokens, BLOCK=block)
    # rows of a tile: what an expert gets on average, within what the tensor cores take and registers hold
    rows = min(64, max(16, triton.next_power_of_2(pairs // groups)))
    tile = {"ROWS": rows, "OUT": TILE_OUT, "IN": TILE_IN, "num_warps": 4, "num_stages": 4}
    _gate_up_kernel[(triton.cdiv(width, TILE_OUT), groups)](
        x, w_in, lists, counts, inner, tokens, HIDDEN=hidden, WIDTH=width, CHOICES=choices, **tile
    )
    _down_kernel[(triton.cdiv(hidden, TILE_OUT), groups)](
        inner, w_out, lists, counts, shares, parts, tokens, HIDDEN=hidden, WIDTH=width, **tile
    )
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(tokens, triton.cdiv(hidden, block))](
        parts, out if shared is None else shared.contiguous(), out,
        HIDDEN=hidden, CHOICES=choices, HAS_SHARED=shared is not None, BLOCK=block,
    )  # fmt: skip
    return out
