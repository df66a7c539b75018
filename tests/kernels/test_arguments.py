"""Bad arguments of the Python operator: refused before anything runs, naming the argument and both values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import Backend, BackendError, Problem, get_backend
from kernels.reference import mla_decode_reference
from kernels.workloads import make_inputs


def arguments() -> dict[str, object]:
    names = ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "softmax_scale", "causal")
    return dict(zip(names, make_inputs([100, 65], h_q=4).arguments(), strict=True))


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("q", lambda x: x[0], ("[1, 4, 576]", "4 dimensions")),
        ("q", lambda x: x.double(), ("float64", "bfloat16")),
        ("q", lambda x: x[:, :0], ("[2, 0, 4, 576]", "at least one query")),
        ("q", lambda x: x[:, :, :0], ("[2, 1, 0, 576]", "one head")),
        ("q", lambda x: x[..., :560], ("576", "560")),
        ("q", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), ("stride 4", "1")),
        ("k_cache", lambda x: x[:, :, 0], ("[6, 64, 576]", "page_size")),
        ("k_cache", lambda x: x.int(), ("int32", "bfloat16")),
        ("k_cache", lambda x: x[:, :0], ("pages of 0 tokens", "at least 1")),
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
        ("softmax_scale", lambda x: -1e39, ("-1e+39", "finite float32")),
    ],
)
def test_bad_argument_is_named(
    backend: Backend, name: str, spoil: Callable[..., object], words: tuple[str, ...]
) -> None:
    if torch.cuda.is_available() and backend.name not in ("cpu", "reference"):
        pytest.skip("a GPU's lengths and tables are read in debug builds only")
    call = arguments()
    call[name] = spoil(call[name])
    with pytest.raises(ValueError, match=name) as error:
        backend(*call.values())
    for word in words:
        assert word in str(error.value)


def test_not_a_tensor(backend: Backend) -> None:
    for name in ("q", "k_cache", "block_table", "cache_seqlens"):
        with pytest.raises(TypeError, match=f"{name} is NoneType, expected a torch.Tensor"):
            backend(*{**arguments(), name: None}.values())
    for scale in ("a", torch.tensor(0.1)):
        with pytest.raises(TypeError, match=f"softmax_scale is {type(scale).__name__}, expected a number"):
            backend(*{**arguments(), "softmax_scale": scale}.values())


def test_auto_names_a_bad_argument_of_a_new_class() -> None:
    auto = get_backend("auto")
    with pytest.raises(ValueError, match=r"q has shape \[\], expected 4 dimensions"):
        auto(*{**arguments(), "q": torch.tensor(1.0)}.values())
    with pytest.raises(TypeError, match="block_table is list"):
        auto(*{**arguments(), "block_table": [[0]]}.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s_q": 65}, "s_q is 65, target cpu takes at most 64"),
        ({"h_q": 1025}, "h_q is 1025, target cpu takes at most 1024"),
    ],
)
def test_auto_passes_over_what_is_too_large_for_the_cpu_target(
    cpu: Backend, change: dict[str, int], reason: str
) -> None:
    inputs = make_inputs([2], **{"h_q": 1, "kv_lora_rank": 16, "rope_dim": 16, **change})
    assert cpu.unsupported(Problem.of(inputs.q, inputs.k_cache, 16)) == reason
    out, lse = get_backend("auto")(*inputs.arguments())
    expected, expected_lse = mla_decode_reference(*inputs.arguments())
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-3)


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
