"""Correctness of a backend against the float64 definition: the cases, the bounds and their reasons.

Evaluate's gate and the tests run the same cases. Errors are relative in the 2-norm of one output vector (one
row, query and head) and the worst vector counts, so that one wrong head among many is not averaged away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backends import Backend
from kernels.reference import mla_decode_reference, visible_tokens
from kernels.workloads import Inputs, make_inputs

BOUNDS_REASON = (
    "16-bit output: rounding it costs up to half a unit in the last place (2^-9 bfloat16, 2^-12 float16), "
    "rounding the softmax weights for a 16-bit product as much again; the bound is four times 2^-9 or "
    "2^-12. float32: 2e-5 allows summation over the cache in another order. fp8_ds_mla: unpacking e4m3 "
    "times its scale to 16 bits moves scores by 2^-9 of their size, so 2^-6. lse is never rounded to 16 "
    "bits: 1e-3 absolute allows weights summed after rounding, 1e-4 in float32, 1e-2 with fp8_ds_mla."
)
_OUT_BOUND = {torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12, torch.float32: 2e-5}


@dataclass(frozen=True)
class CheckCase:
    """One correctness problem; `lengths` are the cached tokens of each row."""

    name: str
    lengths: tuple[int, ...]
    s_q: int
    h_q: int
    kv_lora_rank: int
    rope_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    causal: bool = False
    softmax_scale: float | None = None

    def bounds(self) -> tuple[float, float]:
        """(relative error of out, absolute error of lse) allowed."""
        if self.kv_dtype == torch.uint8:
            return 2.0**-6, 1e-2
        # A 16-bit cache may be multiplied in 16 bits even if the query is wider.
        coarsest = max((self.q_dtype, self.kv_dtype), key=lambda dtype: _OUT_BOUND[dtype])
        return _OUT_BOUND[coarsest], 1e-4 if coarsest == torch.float32 else 1e-3

    def inputs(self, seed: int, device: torch.device | str = "cpu") -> Inputs:
        """Fresh inputs with NaN wherever nothing may read."""
        return make_inputs(
            self.lengths, s_q=self.s_q, h_q=self.h_q, kv_lora_rank=self.kv_lora_rank, rope_dim=self.rope_dim,
            q_dtype=self.q_dtype, kv_dtype=self.kv_dtype, causal=self.causal,
            softmax_scale=self.softmax_scale, device=device, seed=seed,
        )  # fmt: skip


@dataclass(frozen=True)
class CaseResult:
    """Outcome of one case; errors are infinite when an output is NaN or has the wrong shape or dtype."""

    name: str
    relative_error: float
    bound: float
    lse_error: float
    lse_bound: float
    passed: bool


def correctness_cases(
    *,
    h_q: int,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
    q_dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype = torch.bfloat16,
    softmax_scale: float | None = None,
    long: int = 8192,
) -> list[CheckCase]:
    """The cases a backend must pass to serve a model of these sizes; `long` is the longest cache tried."""
    shapes: list[tuple[str, tuple[int, ...], int, bool]] = [
        ("one row, one token", (1,), 1, False),
        ("one row, one page", (64,), 1, False),
        ("one row, page and a bit", (65,), 1, False),
        ("batch, equal lengths", (256, 256, 256, 256), 1, False),
        ("batch, ragged", (3, 700, 64, 129, 1, 511), 1, False),
        ("zero lengths among others", (0, 100, 0, 65), 1, False),
        ("all lengths zero", (0, 0), 1, False),
        ("long cache", (long,), 1, False),
        ("long tail", (long // 2, 5, 70, 33), 1, False),
        ("two queries, causal", (130, 1, 64, 0), 2, True),
        ("four queries, causal, ragged", (300, 2, 67, 3, 0), 4, True),
        ("four queries, not causal", (300, 2, 67), 4, False),
    ]
    return [
        CheckCase(name, lengths, s_q, h_q, kv_lora_rank, rope_dim, q_dtype, kv_dtype, causal, softmax_scale)
        for name, lengths, s_q, causal in shapes
    ]


@contextmanager
def poisoned_allocations(like: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Free blocks of NaN of the output's size first: memory that a backend leaves unwritten shows as NaN."""
    blocks = [torch.full(like, float("nan"), dtype=dtype, device=device) for _ in range(4)]
    del blocks
    yield


def run_case(backend: Backend, case: CheckCase, seed: int, device: torch.device | str = "cpu") -> CaseResult:
    """Run one case and compare with the float64 definition."""
    inputs = case.inputs(seed, device)
    with poisoned_allocations((*inputs.q.shape[:3], case.kv_lora_rank), case.q_dtype, inputs.q.device):
        out, lse = backend(*inputs.arguments())
    return compare(case.name, inputs, out, lse, *case.bounds())


def compare(
    name: str, inputs: Inputs, out: Tensor, lse: Tensor, bound: float, lse_bound: float
) -> CaseResult:
    """Errors of `out` and `lse` against the definition on `inputs`; empty rows must be exactly 0 and +inf."""
    b, s_q, h_q, _ = inputs.q.shape
    shapes_right = (
        tuple(out.shape) == (b, s_q, h_q, inputs.head_dim_v)
        and tuple(lse.shape) == (b, h_q, s_q)
        and out.dtype == inputs.q.dtype
        and lse.dtype == torch.float32
    )
    if not shapes_right:
        return CaseResult(name, float("inf"), bound, float("inf"), lse_bound, False)
    expected, expected_lse = mla_decode_reference(*inputs.arguments())
    counts = visible_tokens(inputs.cache_seqlens, s_q, inputs.causal)
    empty = (counts == 0)[:, :, None].expand(b, s_q, h_q)
    lse = lse.transpose(1, 2).double()
    expected_lse = expected_lse.transpose(1, 2)
    empty_right = bool((out[empty] == 0).all()) and bool((lse[empty] == float("inf")).all())
    difference = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    relative_error = _worst(difference[~empty]) if empty_right else float("inf")
    lse_error = _worst((lse - expected_lse).abs()[~empty])
    return CaseResult(
        name, relative_error, bound, lse_error, lse_bound, relative_error <= bound and lse_error <= lse_bound
    )


def _worst(errors: Tensor) -> float:
    if errors.numel() == 0:
        return 0.0
    return float("inf") if bool(errors.isnan().any()) else float(errors.max())
