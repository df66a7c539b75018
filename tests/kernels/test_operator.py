"""The correctness suite, one for every backend: the cases of kernels.checks, and the C header's promises."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, Problem
from kernels.checks import compare, correctness_cases, run_case
from kernels.workloads import make_inputs

DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "fp32 query, bf16 cache": (torch.float32, torch.bfloat16),
    "fp8 cache": (torch.bfloat16, torch.uint8),
}
CASES = [case.name for case in correctness_cases(h_q=1)]


def device_of(backend: Backend) -> str:
    return "cpu" if backend.name in ("cpu", "reference") or not torch.cuda.is_available() else "cuda"


def interpreted(backend: Backend) -> bool:
    """Triton's interpreter computes a program at a time, some thousand times slower than a device."""
    return backend.name == "triton" and not torch.cuda.is_available()


def skip_unsupported(backend: Backend, problem: Problem) -> None:
    reason = backend.unsupported(problem)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(
    backend: Backend, name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = {c.name: c for c in correctness_cases(h_q=6, q_dtype=dtypes[0], kv_dtype=dtypes[1], long=2500)}[
        name
    ]
    device = device_of(backend)
    inputs = case.inputs(0, device)
    skip_unsupported(backend, Problem.of(inputs.q, inputs.k_cache, inputs.head_dim_v))
    result = run_case(backend, case, seed=hash(name) % 1000, device=device)
    assert result.passed, result


@pytest.mark.parametrize("h_q", [1, 2, 3, 4, 7, 16, 33, 64, 128])
@pytest.mark.parametrize("s_q", [1, 4])
def test_any_number_of_heads(backend: Backend, h_q: int, s_q: int) -> None:
    if interpreted(backend) and h_q > 4:
        pytest.skip("too slow in Triton's interpreter")
    for case in correctness_cases(h_q=h_q, long=300):
        if case.s_q == s_q and "row" not in case.name:
            result = run_case(backend, case, seed=h_q, device=device_of(backend))
            assert result.passed, result


@pytest.mark.parametrize(
    ("rank", "rope"), [(16, 16), (32, 0), (48, 16), (80, 48), (256, 32), (512, 64), (1024, 64)]
)
def test_any_latent_size(backend: Backend, rank: int, rope: int) -> None:
    inputs = make_inputs(
        [70, 0, 193], h_q=5, kv_lora_rank=rank, rope_dim=rope, device=device_of(backend), seed=rank
    )
    skip_unsupported(backend, Problem.of(inputs.q, inputs.k_cache, rank))
    result = compare("size", inputs, *backend(*inputs.arguments()), 4 * 2.0**-9, 1e-3)
    assert result.passed, result


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_any_page_size(backend: Backend, page_size: int) -> None:
    inputs = make_inputs(
        [100, 1, 64, 257], h_q=3, page_size=page_size, device=device_of(backend), seed=page_size
    )
    skip_unsupported(backend, Problem.of(inputs.q, inputs.k_cache, 512))
    result = compare("page", inputs, *backend(*inputs.arguments()), 4 * 2.0**-9, 1e-3)
    assert result.passed, result


@pytest.mark.parametrize("scale", [0.0, -0.05, 1e-6, 2.0])
def test_any_finite_scale(backend: Backend, scale: float) -> None:
    inputs = make_inputs([90, 300], h_q=4, softmax_scale=scale, device=device_of(backend), seed=3)
    out, lse = backend(*inputs.arguments())
    # Scores of a few hundred: float32 holds them to about 1e-4.
    result = compare("scale", inputs, out, lse, 4 * 2.0**-9, 1e-3 if scale < 1 else 1e-2)
    assert result.passed, result


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    inputs = make_inputs([200], h_q=4, softmax_scale=1.0, device=device_of(backend), seed=4)
    inputs.q.mul_(50)
    out, lse = backend(*inputs.arguments())
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_nan_in_a_used_token_reaches_the_output(backend: Backend) -> None:
    inputs = make_inputs([70, 70], h_q=4, device=device_of(backend), seed=5)
    inputs.k_cache[inputs.block_table[1, 0].long(), 5] = float("nan")
    out, _ = backend(*inputs.arguments())
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


def test_query_does_not_see_a_later_token_even_if_nan(backend: Backend) -> None:
    """The header: tokens at or past n are never used. The last query may see NaN, the first must not."""
    inputs = make_inputs([130], s_q=2, h_q=3, causal=True, device=device_of(backend), seed=6)
    page, slot = divmod(129, 64)
    inputs.k_cache[inputs.block_table[0, page].long(), slot] = float("nan")
    if backend.name != "cpu":
        pytest.skip("the torch form zeroes only what no query of the row sees")
    out, _ = backend(*inputs.arguments())
    assert torch.isfinite(out[0, 0]).all()
    assert torch.isnan(out[0, 1]).all()


def test_same_inputs_give_same_bits(backend: Backend) -> None:
    for lengths, h_q in (([5000], 4), ([700, 3, 0, 2000], 16)):
        if interpreted(backend):
            lengths = lengths[:3] if len(lengths) > 1 else [1300]
        inputs = make_inputs(lengths, h_q=h_q, device=device_of(backend), seed=7)
        first = backend(*inputs.arguments())
        for _ in range(4):
            again = backend(*inputs.arguments())
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_query_and_cache(backend: Backend) -> None:
    inputs = make_inputs([100, 64], h_q=4, device=device_of(backend), seed=8)
    padded_q = torch.full((2, 1, 8, 600), float("nan"), dtype=torch.bfloat16, device=inputs.q.device)
    padded_q[:, :, ::2, :576] = inputs.q
    cache = torch.full(
        (*inputs.k_cache.shape[:3], 640), float("nan"), dtype=torch.bfloat16, device=inputs.q.device
    )
    cache[..., :576] = inputs.k_cache
    expected = backend(*inputs.arguments())
    found = backend(padded_q[:, :, ::2, :576], cache[..., :576], *inputs.arguments()[2:])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_empty_batch(backend: Backend) -> None:
    q = torch.empty(0, 1, 4, 576, dtype=torch.bfloat16, device=device_of(backend))
    cache = torch.empty(1, 64, 1, 576, dtype=torch.bfloat16, device=q.device)
    none = torch.empty(0, dtype=torch.int32, device=q.device)
    out, lse = backend(q, cache, none.view(0, 1), none, 512, 0.1, False)
    assert out.shape == (0, 1, 4, 512)
    assert lse.shape == (0, 4, 1)
