"""The public functions take what callers of flash_mla pass: positions, keywords, dtypes."""

from __future__ import annotations

import inspect

import pytest
import torch

from kernels import Backend, flash_mla_with_kvcache, get_mla_metadata
from kernels.workloads import make_inputs

# In the order of deepseek-ai/FlashMLA's flash_mla/flash_mla_interface.py of 2026; older ones end earlier.
ARGUMENTS = [
    "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
    "softmax_scale", "causal", "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache",
    "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
]  # fmt: skip
SPARSE = ARGUMENTS[ARGUMENTS.index("indices") :]


def test_arguments_have_flash_mlas_names_and_order() -> None:
    ours = inspect.signature(flash_mla_with_kvcache).parameters
    assert list(ours)[: len(ARGUMENTS)] == ARGUMENTS
    assert all(ours[name].default is None for name in ("softmax_scale", "num_splits", *SPARSE))
    assert ours["causal"].default is ours["is_fp8_kvcache"].default is False


def test_schedules_of_every_release() -> None:
    lengths = torch.tensor([5, 70, 1], dtype=torch.int32)
    old = [
        get_mla_metadata(lengths, 2 * 4, 1),
        get_mla_metadata(cache_seqlens=lengths, num_heads_per_head_k=8, num_heads_k=1),
        get_mla_metadata(cache_seqlens=lengths, num_q_tokens_per_head_k=8, num_heads_k=1),
        get_mla_metadata(lengths, 8, 1, 4, True, None),
    ]
    for metadata, num_splits in old:
        assert (metadata.dtype, metadata.shape[1]) == (torch.int32, 8)
        assert (num_splits.dtype, num_splits.shape) == (torch.int32, (4,))
    metadata, num_splits = get_mla_metadata()
    assert metadata is not None
    assert num_splits is None
    with pytest.raises(NotImplementedError, match="topk is 64"):
        get_mla_metadata(lengths, 4, 1, topk=64)


@pytest.mark.parametrize("schedule", ["lengths", "empty"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_program_for_flash_mla_runs(cpu: Backend, schedule: str, dtype: torch.dtype) -> None:
    """As FlashMLA's own test: table entries out of range after a row's pages, zero lengths, default scale."""
    inputs = make_inputs([100, 65, 0, 1], h_q=3, s_q=2, causal=True, q_dtype=dtype, kv_dtype=dtype)
    q, k_cache, block_table, cache_seqlens, head_dim_v, _, causal = inputs.arguments()
    made = get_mla_metadata(cache_seqlens, 2 * 3, 1) if schedule == "lengths" else get_mla_metadata()
    out, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, *made, causal=causal
    )
    expected, expected_lse = cpu(q, k_cache, block_table, cache_seqlens, head_dim_v, 576**-0.5, True)
    assert out.shape == (4, 2, 3, 512)
    assert lse.shape == (4, 3, 2)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-3)
    by_position = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, *made, None, causal, False, *[None] * len(SPARSE)
    )
    torch.testing.assert_close(by_position[0], out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_fp8_cache_under_each_of_flash_mlas_dtypes(dtype: torch.dtype) -> None:
    """FlashMLA's quantize_k_cache gives float8_e4m3fn pages with a token between each two."""
    inputs = make_inputs([100, 65], h_q=4, kv_dtype=torch.uint8)
    q, k_cache, *rest = inputs.arguments()
    padded = torch.full((len(k_cache), 65, 1, 656), 255, dtype=torch.uint8)[:, :64]
    padded[:] = k_cache
    expected, _ = flash_mla_with_kvcache(q, k_cache, *rest[:3], backend="cpu")
    out, _ = flash_mla_with_kvcache(q, padded.view(dtype), *rest[:3], is_fp8_kvcache=True, backend="cpu")
    assert torch.equal(out, expected)


def test_fp8_that_the_cache_contradicts_is_refused() -> None:
    inputs = make_inputs([10], h_q=4)
    with pytest.raises(ValueError, match=r"is_fp8_kvcache is True, expected False for .* torch.bfloat16"):
        flash_mla_with_kvcache(*inputs.arguments()[:5], is_fp8_kvcache=True)
    plain = torch.zeros(2, 64, 1, 576, dtype=torch.float8_e4m3fn)  # FlashMLA's other, unscaled form
    with pytest.raises(ValueError, match=r"k_cache holds 576 bytes a token, expected 656"):
        flash_mla_with_kvcache(inputs.q, plain, *inputs.arguments()[2:5], is_fp8_kvcache=True)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"{name} \(sparse attention\) is not supported"):
        flash_mla_with_kvcache(*make_inputs([10], h_q=4).arguments()[:5], **{name: torch.zeros(1)})


@pytest.mark.parametrize("name", ["block_table", "cache_seqlens"])
def test_arguments_that_only_sparse_attention_may_leave_out(name: str) -> None:
    q, k_cache, block_table, cache_seqlens, *_ = make_inputs([10], h_q=4).arguments()
    tensors = {"q": q, "k_cache": k_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
    with pytest.raises(TypeError, match=f"{name} is NoneType, expected a torch.Tensor"):
        flash_mla_with_kvcache(**{**tensors, name: None}, head_dim_v=512)


def test_no_gradient_flows_through_the_call() -> None:
    q, *rest = make_inputs([10], h_q=4).arguments()
    for backend in ("cpu", "reference"):
        out, _ = flash_mla_with_kvcache(q.clone().requires_grad_(), *rest[:4], backend=backend)
        assert not out.requires_grad
