"""Bad arguments of the Python operator: refused before anything runs, naming the argument and both values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import Backend, BackendError, flash_mla_with_kvcache, get_backend, get_mla_metadata
from kernels.workloads import make_inputs


def arguments() -> dict[str, object]:
    names = ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "softmax_scale", "causal")
    return dict(zip(names, make_inputs([100, 65], h_q=4).arguments(), strict=True))


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("q", lambda x: x[0], ("[1, 4, 576]", "4 dimensions")),
        ("q", lambda x: x.double(), ("float64", "bfloat16")),
        ("q", lambda x: x[..., :560], ("576", "560")),
        ("q", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), ("stride 4", "1")),
        ("k_cache", lambda x: x[:, :, 0], ("[6, 64, 576]", "page_size")),
        ("k_cache", lambda x: x.int(), ("int32", "bfloat16")),
        ("k_cache", lambda x: x[..., :512], ("512", "576")),
        ("k_cache", lambda x: x.to("meta"), ("meta", "cpu")),
        ("k_cache", lambda x: torch.zeros(6, 64, 1, 640, dtype=torch.uint8), ("640", "656")),
        ("block_table", lambda x: x.long(), ("int64", "int32")),
        ("block_table", lambda x: x[:1], ("[1,", "batch 2")),
        ("block_table", lambda x: x[0], ("[", "[2, max_blocks]")),
        ("block_table", lambda x: x * 0 + 6, ("block_table[0, 0] is 6", "0 to 5")),
        ("block_table", lambda x: x * 0 - 1, ("block_table[0, 0] is -1", "0 to 5")),
        ("cache_seqlens", lambda x: x.long(), ("int64", "int32")),
        ("cache_seqlens", lambda x: x[:1], ("[1]", "[2]")),
        ("cache_seqlens", lambda x: x + 10000, ("cache_seqlens[0] is 10100", "0 to 192")),
        ("cache_seqlens", lambda x: x - 101, ("cache_seqlens[0] is -1", "0 to 192")),
        ("head_dim_v", lambda x: 0, ("0", "1 to 576")),
        ("head_dim_v", lambda x: 577, ("577", "1 to 576")),
        ("softmax_scale", lambda x: float("nan"), ("nan", "finite")),
    ],
)
def test_bad_argument_is_named(
    cpu: Backend, name: str, spoil: Callable[..., object], words: tuple[str, ...]
) -> None:
    call = arguments()
    call[name] = spoil(call[name])
    with pytest.raises(ValueError, match=name) as error:
        cpu(*call.values())
    for word in words:
        assert word in str(error.value)


def test_not_a_tensor(cpu: Backend) -> None:
    call = arguments()
    call["cache_seqlens"] = [100, 65]
    with pytest.raises((TypeError, AttributeError)):
        cpu(*call.values())


def test_size_that_the_target_lacks(cpu: Backend) -> None:
    call = arguments()
    call["head_dim_v"] = 500
    with pytest.raises(NotImplementedError, match="kv_lora_rank is 500"):
        cpu(*call.values())


def test_a_good_call_works_after_a_refused_one(cpu: Backend) -> None:
    call = arguments()
    good = cpu(*call.values())
    with pytest.raises(ValueError, match="block_table"):
        cpu(*{**call, "block_table": call["block_table"] * 0 + 99}.values())
    assert all(torch.equal(a, b) for a, b in zip(good, cpu(*call.values()), strict=True))


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'tpu'.*cpu.*reference"):
        get_backend("tpu")


def test_flash_mla_interface(cpu: Backend) -> None:
    inputs = make_inputs([100, 65], h_q=4, s_q=2, causal=True)
    q, k_cache, block_table, cache_seqlens, head_dim_v, _, causal = inputs.arguments()
    metadata, num_splits = get_mla_metadata(cache_seqlens, 2 * 4, 1)
    out, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, metadata, num_splits, causal=causal
    )
    expected, expected_lse = cpu(q, k_cache, block_table, cache_seqlens, head_dim_v, 576**-0.5, True)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-3)


def test_sparse_attention_is_refused_by_name() -> None:
    inputs = make_inputs([10], h_q=4)
    with pytest.raises(NotImplementedError, match="indices"):
        flash_mla_with_kvcache(*inputs.arguments()[:5], indices=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="topk is 64"):
        get_mla_metadata(inputs.cache_seqlens, 4, 1, topk=64)
