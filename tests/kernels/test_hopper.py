"""The hopper target: what the compiler made of it, what it refuses, and on an H100 what it computes.

Compiling needs nvcc, not a GPU; refusals come before anything touches a device, so they are tested here too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from kernels import get_backend
from kernels.build import cached_package
from kernels.checks import CheckCase, run_case
from kernels.package import LIBRARY, LOG, DecodeParams
from kernels.timing import captured
from kernels.versus import library_backend
from kernels.workloads import make_inputs
from tests.kernels.hopper_cases import BF16, CASES, FP8

INVALID, UNSUPPORTED = 1, 2
ADDRESS = 1 << 20  # never read: every refusal comes first

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def compiled() -> tuple[Path, str]:
    """The library and what ptxas said."""
    package = cached_package("hopper")
    return package.folder / LIBRARY, (package.folder / LOG).read_text()


def kernel_reports(report: str) -> dict[str, tuple[int, int]]:
    """Kernel's mangled name -> bytes of spill stores and loads."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    return {name: (int(a), int(b)) for name, a, b in re.findall(pattern, report, re.DOTALL)}


@needs_nvcc
def test_compiler_report(compiled: tuple[Path, str]) -> None:
    """Every register stays one, in every kernel."""
    reports = kernel_reports(compiled[1])
    assert len(reports) == 18
    for name, spills in reports.items():
        assert spills == (0, 0), f"{name} spills {spills} bytes"
    for words in ("serialized", "is injected", "Potential Performance Loss"):
        assert words not in compiled[1], f"the compiler waits for wgmma where the source does not: {words}"


def cuobjdump() -> str | None:
    """The toolkit's disassembler, or the one that Triton's wheel carries."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
def test_machine_code_uses_hopper_units(compiled: tuple[Path, str]) -> None:
    code = subprocess.run(
        [cuobjdump(), "--dump-sass", str(compiled[0])], capture_output=True, text=True
    ).stdout
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 18
    for kernel in kernels:
        name = kernel.split(maxsplit=1)[0]
        assert "UTMALDG.3D" in kernel, f"{name}: no bulk tensor copy"
        if "narrow" in name:  # at most 16 query rows; a warpgroup's instruction takes 64
            assert re.search(r"\bHMMA\.16816", kernel), f"{name}: no warp-level matrix instruction"
        else:
            assert "HGMMA.64x64x16" in kernel, f"{name}: no wgmma for the scores"
            assert "HGMMA.64x128x16" in kernel, f"{name}: no wgmma for the values"
            assert not re.search(r"\bHMMA\b", kernel), f"{name}: tensor instructions of an older generation"
        if "ring" in name:
            held = re.findall(r"HGMMA\.64x64x16\S* R\d+, R\d+, gdesc", kernel)
            expected = 16 if "Fp8" in name else 24
            assert len(held) == expected, f"{name}: query registers feed {len(held)} scores of {expected}"
        if "Fp8" in name:
            assert "UBLKCP" in kernel, f"{name}: no bulk copy of raw tokens"


def valid_params(**changes: object) -> DecodeParams:
    values: dict[str, object] = {
        "struct_bytes": ctypes.sizeof(DecodeParams), "q_dtype": 1, "kv_dtype": 1, "batch": 2, "s_q": 1,
        "h_q": 16,
        "kv_lora_rank": 512, "rope_dim": 64, "num_blocks": 8, "page_size": 64, "max_blocks_per_seq": 4,
        "softmax_scale": 0.1, "q": ADDRESS, "q_stride_batch": 16 * 576, "q_stride_seq": 16 * 576,
        "q_stride_head": 576, "kv_cache": ADDRESS, "kv_stride_block": 64 * 576, "kv_stride_token": 576,
        "block_table": ADDRESS, "block_table_stride": 4, "cache_seqlens": ADDRESS, "out": ADDRESS,
        "out_stride_batch": 16 * 512, "out_stride_seq": 16 * 512, "out_stride_head": 512, "lse": ADDRESS,
        "workspace": ADDRESS, "workspace_bytes": 1 << 30,
    }  # fmt: skip
    return DecodeParams(**(values | changes))


def run(library: Path, params: DecodeParams) -> tuple[int, str]:
    error = ctypes.create_string_buffer(512)
    status = ctypes.CDLL(str(library)).mla_decode_run(ctypes.byref(params), error, len(error))
    return status, error.value.decode()


@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"struct_bytes": 8}, INVALID, ["struct_bytes=8"]),
        ({"page_size": 32}, UNSUPPORTED, ["page_size=32", "64"]),
        ({"kv_lora_rank": 256}, UNSUPPORTED, ["kv_lora_rank=256", "512"]),
        ({"q_dtype": 0, "kv_dtype": 0}, UNSUPPORTED, ["q_dtype", "float32"]),
        ({"kv_dtype": 2}, UNSUPPORTED, ["kv_dtype", "float16", "bfloat16"]),
        ({"kv_dtype": 3}, UNSUPPORTED, ["kv_stride_token=576", "656"]),
        ({"num_splits": 4}, UNSUPPORTED, ["num_splits=4"]),
        ({"q": ADDRESS + 2}, INVALID, ["q=", "16 bytes"]),
        ({"kv_cache": 0}, INVALID, ["kv_cache is null"]),
        ({"out": ADDRESS + 8}, INVALID, ["out=", "16 bytes"]),
        ({"kv_stride_token": 580}, INVALID, ["kv_stride_token=580"]),
        ({"kv_stride_token": 512}, INVALID, ["kv_stride_token=512", "576"]),
        ({"s_q": 2, "q_stride_seq": 32 * 576}, UNSUPPORTED, ["q_stride_seq=18432", "9216"]),
        ({"h_q": 0}, INVALID, ["h_q=0"]),
    ],
)
def test_refusals_name_the_argument(
    compiled: tuple[Path, str], changes: dict[str, int], status: int, words: list[str]
) -> None:
    got, message = run(compiled[0], valid_params(**changes))
    assert got == status, message
    assert all(word in message for word in words), message


@needs_nvcc
def test_empty_batch_needs_no_device(compiled: tuple[Path, str]) -> None:
    assert run(compiled[0], valid_params(batch=0)) == (0, "")


@needs_nvcc
def test_workspace_grows_with_the_rows_of_a_tile(compiled: tuple[Path, str]) -> None:
    library = ctypes.CDLL(str(compiled[0]))
    library.mla_decode_workspace_bytes.restype = ctypes.c_uint64

    def sizes(pages: int) -> list[int]:
        params = [valid_params(h_q=h, max_blocks_per_seq=pages) for h in (1, 16, 33, 64, 128)]
        return [library.mla_decode_workspace_bytes(ctypes.byref(one)) for one in params]

    of_1, of_16, of_33, of_64, of_128 = sizes(pages=10_000)
    assert of_1 == of_16 < of_33 < of_64 == of_128
    assert set(sizes(pages=4)) == {of_16}  # a short batch has tiles of 16 rows


@pytest.mark.gpu
@needs_nvcc
@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_definition(compiled: tuple[Path, str], case: CheckCase, fp8: bool) -> None:
    """Within the bounds of kernels.checks, and the same bits every time: a race would show."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if fp8:
        case = dataclasses.replace(case, q_dtype=BF16, kv_dtype=FP8)
    backend = library_backend(compiled[0])
    result = run_case(backend, case, seed=zlib.crc32(case.name.encode()), device="cuda")
    assert result.passed, result
    inputs = case.inputs(seed=1, device="cuda")
    first, *others = (backend(*inputs.arguments()) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@needs_nvcc
def test_debug_build_names_the_index_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("MLA_KERNEL_DEBUG", "1")
    backend = get_backend("hopper")
    inputs = make_inputs([70, 200], h_q=4, device="cuda", seed=9)
    out, _ = backend(*inputs.arguments())
    table = inputs.block_table.clone()
    for index in (-1, inputs.k_cache.shape[0]):
        table[1, 2] = index
        with pytest.raises(ValueError, match=rf"block_table\[1, 2\] is {index}, expected 0 to "):
            backend(inputs.q, inputs.k_cache, table, *inputs.arguments()[3:])
    lengths = torch.tensor([70, 1000], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] is 1000, expected 0 to "):
        backend(inputs.q, inputs.k_cache, inputs.block_table, lengths, *inputs.arguments()[4:])
    again, _ = backend(*inputs.arguments())
    assert torch.equal(out, again)
    graph = captured(lambda: backend(*inputs.arguments()))  # where nothing can be read back
    graph.replay()
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_nvcc
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
def test_no_access_out_of_bounds(compiled: tuple[Path, str]) -> None:
    """racecheck is of no use here: it takes no notice of mbarriers. The emulator finds races."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    done = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1",
         "--kernel-name", "kns=mla_hopper", sys.executable, "-m", "tests.kernels.sanitized"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
