"""What is particular to the cpu target: code paths, threads, random shapes, refusals by the C library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import Backend, KernelPackage
from kernels.checks import compare, correctness_cases, run_case
from kernels.package import DecodeParams
from kernels.workloads import make_inputs
from tests.kernels.conftest import ISAS

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_every_code_path(isa_backend: Callable[[str], Backend], isa: str) -> None:
    backend = isa_backend(isa)
    for dtype in FLOATS:
        for case in correctness_cases(
            h_q=5, kv_lora_rank=80, rope_dim=16, q_dtype=dtype, kv_dtype=dtype, long=600
        ):
            result = run_case(backend, case, seed=1)
            assert result.passed, (isa, dtype, result)
    for case in correctness_cases(h_q=5, kv_dtype=torch.uint8, long=600):
        result = run_case(backend, case, seed=2)
        assert result.passed, (isa, result)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    s_q=st.integers(1, 4),
    h_q=st.integers(1, 20),
    rank=st.integers(1, 12).map(lambda n: 16 * n),
    rope=st.integers(0, 4).map(lambda n: 16 * n),
    q_dtype=st.sampled_from(FLOATS),
    kv_dtype=st.sampled_from(FLOATS),
    page_size=st.sampled_from([1, 7, 16, 64]),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    cpu: Backend, lengths: list[int], s_q: int, h_q: int, rank: int, rope: int, q_dtype: torch.dtype,
    kv_dtype: torch.dtype, page_size: int, causal: bool, seed: int,
) -> None:  # fmt: skip
    inputs = make_inputs(
        lengths, s_q=s_q, h_q=h_q, kv_lora_rank=rank, rope_dim=rope, q_dtype=q_dtype, kv_dtype=kv_dtype,
        page_size=page_size, causal=causal, seed=seed,
    )  # fmt: skip
    out, lse = cpu(*inputs.arguments())
    bounds = {torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12, torch.float32: 2e-5}
    # A sum that cancels to a small vector keeps the absolute error of its terms: twice the bound.
    result = compare("random", inputs, out, lse, 2 * max(bounds[q_dtype], bounds[kv_dtype]), 1e-3)
    assert result.passed, result


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(cpu: Backend, threads: int) -> None:
    """More threads mean more segments and another merge; every count is correct and deterministic."""
    torch.set_num_threads(threads)
    inputs = make_inputs([9000, 3, 0, 1000], h_q=16, s_q=2, causal=True, seed=threads)
    first = cpu(*inputs.arguments())
    result = compare("threads", inputs, *first, 4 * 2.0**-9, 1e-3)
    assert result.passed, result
    again = cpu(*inputs.arguments())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_result_of_a_row_does_not_depend_on_its_neighbours(cpu: Backend) -> None:
    alone = make_inputs([40], h_q=4, seed=1, softmax_scale=0.1)
    twice = [torch.cat([alone.q, alone.q]), alone.k_cache, alone.block_table.repeat(2, 1),
             alone.cache_seqlens.repeat(2)]  # fmt: skip
    out, _ = cpu(*alone.arguments())
    both, _ = cpu(*twice, *alone.arguments()[4:])
    assert torch.equal(both[0], out[0])
    assert torch.equal(both[1], out[0])


class RawCall:
    """mla_decode_run with a valid structure, of which a test spoils one field."""

    def __init__(self, package: KernelPackage) -> None:
        self.library = package.open()
        self.inputs = make_inputs([100, 65], h_q=4, kv_lora_rank=32, rope_dim=16)
        self.out = torch.empty(2, 1, 4, 32, dtype=torch.bfloat16)
        self.lse = torch.empty(2, 4, 1)
        i = self.inputs
        self.params = DecodeParams(
            struct_bytes=ctypes.sizeof(DecodeParams), q_dtype=1, kv_dtype=1, batch=2, s_q=1, h_q=4,
            kv_lora_rank=32, rope_dim=16, num_blocks=i.k_cache.shape[0], page_size=64,
            max_blocks_per_seq=i.block_table.shape[1], softmax_scale=0.1, num_threads=2, q=i.q.data_ptr(),
            q_stride_batch=i.q.stride(0),
            q_stride_seq=i.q.stride(1), q_stride_head=i.q.stride(2), kv_cache=i.k_cache.data_ptr(),
            kv_stride_block=i.k_cache.stride(0), kv_stride_token=i.k_cache.stride(1),
            block_table=i.block_table.data_ptr(), block_table_stride=i.block_table.stride(0),
            cache_seqlens=i.cache_seqlens.data_ptr(), out=self.out.data_ptr(), out_stride_batch=128,
            out_stride_seq=128, out_stride_head=32, lse=self.lse.data_ptr(),
        )  # fmt: skip
        size = self.library.mla_decode_workspace_bytes(ctypes.addressof(self.params))
        self.workspace = torch.empty(size + 256, dtype=torch.uint8)
        self.params.workspace = (self.workspace.data_ptr() + 255) // 256 * 256
        self.params.workspace_bytes = size

    def run(self) -> tuple[int, str]:
        error = ctypes.create_string_buffer(256)
        return self.library.mla_decode_run(ctypes.addressof(self.params), error, 256), error.value.decode()


def test_raw_call_works_unspoiled(cpu_package: KernelPackage) -> None:
    call = RawCall(cpu_package)
    assert call.run() == (0, "")
    inputs = call.inputs
    found = compare(
        "raw", inputs.__class__(*inputs.arguments()[:5], 0.1, False), call.out, call.lse, 8e-3, 1e-3
    )
    assert found.passed, found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("struct_bytes", 8), ("q_dtype", 7), ("q_dtype", 3), ("kv_dtype", -1),
        ("kv_dtype", 3), ("batch", -1), ("s_q", 0), ("h_q", 0), ("h_q", 1 << 20),
        ("kv_lora_rank", 24), ("kv_lora_rank", 0), ("rope_dim", 8), ("rope_dim", -16),
        ("num_blocks", -1), ("num_blocks", 1), ("page_size", 0), ("max_blocks_per_seq", 1),
        ("causal", 2), ("softmax_scale", float("nan")), ("num_splits", -1),
        ("num_threads", -1), ("reserved", 1), ("q", None), ("kv_cache", None),
        ("block_table", None), ("cache_seqlens", None), ("out", None), ("lse", None),
        ("workspace", None), ("workspace_bytes", 1), ("q_stride_head", 8),
        ("q_stride_batch", -4), ("kv_stride_token", 40), ("kv_stride_block", 0),
        ("out_stride_head", 16), ("out_stride_batch", 0),
    ],
)  # fmt: skip
def test_library_refuses_a_bad_field(cpu_package: KernelPackage, field: str, value: object) -> None:
    call = RawCall(cpu_package)
    call.out.fill_(7)
    setattr(call.params, field, value)
    code, message = call.run()
    assert code == 1, message
    assert bool((call.out == 7).all()), "a refused call must write nothing"
    named = {"num_blocks": ("num_blocks", "block_table"), "max_blocks_per_seq": ("max_blocks_per_seq",)}
    assert any(name in message for name in named.get(field, (field,))), message


def test_library_refuses_misaligned_pointers(cpu_package: KernelPackage) -> None:
    for field in ("q", "kv_cache", "block_table", "lse", "workspace"):
        call = RawCall(cpu_package)
        setattr(call.params, field, getattr(call.params, field) + 1)
        code, message = call.run()
        assert code == 1
        assert field in message


def test_no_message_buffer_is_needed(cpu_package: KernelPackage) -> None:
    call = RawCall(cpu_package)
    call.params.s_q = 0
    assert call.library.mla_decode_run(ctypes.addressof(call.params), None, 0) == 1
    assert call.library.mla_decode_run(None, None, 0) == 1
    assert call.library.mla_decode_workspace_bytes(None) == 0


@pytest.mark.parametrize("splits", [1, 2, 7, 256])
def test_given_number_of_splits(cpu_package: KernelPackage, splits: int) -> None:
    call = RawCall(cpu_package)
    call.params.num_splits = splits
    size = call.library.mla_decode_workspace_bytes(ctypes.addressof(call.params))
    workspace = torch.empty(size + 256, dtype=torch.uint8)
    call.params.workspace = (workspace.data_ptr() + 255) // 256 * 256
    call.params.workspace_bytes = size
    assert call.run() == (0, "")
    inputs = call.inputs
    found = compare(
        "splits", inputs.__class__(*inputs.arguments()[:5], 0.1, False), call.out, call.lse, 8e-3, 1e-3
    )
    assert found.passed, found
