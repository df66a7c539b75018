"""Check and time the Hopper library on an H100 in one call: `python -m kernels.hopper_check --library FILE`.

`--check` compares small cases with the float64 definition; `--time` measures ours and the peers that can be
imported, interleaved, each as a CUDA graph, with a cold and a warm L2. It drives the C ABI directly, so that
a library can be tried before it is packaged.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import random
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import peers
from kernels.package import DecodeParams
from kernels.reference import mla_decode_reference, quantize_fp8_ds_mla
from kernels.timing import quantile

DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
SCALE = 192**-0.5


class Library:
    """The four functions of the C ABI, on torch tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path.resolve()))
        self._library.mla_decode_workspace_bytes.restype = ctypes.c_uint64
        self._workspace: Tensor | None = None

    def prepare(self, inputs: peers.Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        """A call that runs the library on `inputs` into outputs of its own, poisoned once."""
        q, cache = inputs.q, inputs.k_cache
        b, s_q, h_q, _ = q.shape
        out = torch.full((b, s_q, h_q, 512), float("nan"), dtype=q.dtype, device=q.device)
        lse = torch.full((b, h_q, s_q), float("nan"), device=q.device)
        params = DecodeParams(
            struct_bytes=ctypes.sizeof(DecodeParams), q_dtype=DTYPES[q.dtype], kv_dtype=DTYPES[cache.dtype],
            batch=b, s_q=s_q, h_q=h_q, kv_lora_rank=512, rope_dim=64, num_blocks=cache.shape[0],
            page_size=cache.shape[1], max_blocks_per_seq=inputs.block_table.shape[1],
            causal=int(inputs.causal), softmax_scale=inputs.softmax_scale,
            q=q.data_ptr(), q_stride_batch=q.stride(0), q_stride_seq=q.stride(1),
            q_stride_head=q.stride(2), kv_cache=cache.data_ptr(), kv_stride_block=cache.stride(0),
            kv_stride_token=cache.stride(1), block_table=inputs.block_table.data_ptr(),
            block_table_stride=inputs.block_table.stride(0), cache_seqlens=inputs.cache_seqlens.data_ptr(),
            out=out.data_ptr(), out_stride_batch=out.stride(0), out_stride_seq=out.stride(1),
            out_stride_head=out.stride(2), lse=lse.data_ptr(),
        )  # fmt: skip
        size = self._library.mla_decode_workspace_bytes(ctypes.byref(params))
        if self._workspace is None or self._workspace.numel() < size:
            self._workspace = torch.zeros(size, dtype=torch.uint8, device=q.device)
        params.workspace, params.workspace_bytes = self._workspace.data_ptr(), size
        error = ctypes.create_string_buffer(512)
        workspace = self._workspace

        def run() -> tuple[Tensor, Tensor]:
            params.stream = torch.cuda.current_stream().cuda_stream
            if self._library.mla_decode_run(ctypes.byref(params), error, 512):
                raise RuntimeError(error.value.decode())
            return out, lse

        run.keep = (inputs, workspace)  # type: ignore[attr-defined]
        run.size = size  # type: ignore[attr-defined]
        return run


def make_inputs(
    lengths: list[int], h_q: int, s_q: int, dtype: torch.dtype, *, causal: bool = False, seed: int = 0,
    fp8: bool = False, poison: bool = True,
) -> peers.Inputs:  # fmt: skip
    """Random inputs with shuffled pages; memory past each length, and one page in eight, is NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    b = len(lengths)
    pages = [(n + 63) // 64 for n in lengths]
    width = max([*pages, 1]) + 1
    blocks = sum(pages) + 3
    cache = torch.randn(blocks, 64, 1, 576, generator=generator, device="cuda", dtype=torch.float32)
    order = torch.randperm(blocks, generator=generator, device="cuda").int()
    table = torch.full((b, width), -(2**30) if poison else 0, dtype=torch.int32, device="cuda")
    used = torch.zeros(blocks, 64, dtype=torch.bool, device="cuda")
    start = 0
    for row, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        mine = order[start : start + count]
        table[row, :count] = mine
        start += count
        for page in range(count):
            used[mine[page], : min(64, n - 64 * page)] = True
    cache = quantize_fp8_ds_mla(cache) if fp8 else cache.to(dtype)
    if poison:
        cache[~used] = 0xFF if fp8 else float("nan")
    q = torch.randn(b, s_q, h_q, 576, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
    return peers.Inputs(
        q, cache, table, torch.tensor(lengths, dtype=torch.int32, device="cuda"), SCALE, causal
    )


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; inf where one is not finite."""
    value = value.double()
    if not torch.isfinite(value).all():
        return float("inf")
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30))


def check_cases() -> list[tuple[str, dict[str, Any]]]:
    """Named arguments of `make_inputs`, from the simplest to the ragged."""
    bf16, fp16 = torch.bfloat16, torch.float16
    rng = random.Random(1)
    ragged = [rng.choice([0, 1, 63, 64, 65, rng.randrange(1, 3000)]) for _ in range(50)]
    return [
        ("one tile", {"lengths": [64], "h_q": 64, "s_q": 1, "dtype": bf16}),
        ("part of a tile", {"lengths": [37], "h_q": 64, "s_q": 1, "dtype": bf16}),
        ("two parts", {"lengths": [128], "h_q": 16, "s_q": 1, "dtype": bf16}),
        ("fp16 split", {"lengths": [1000], "h_q": 16, "s_q": 1, "dtype": fp16}),
        ("132 parts", {"lengths": [132 * 64 - 5], "h_q": 16, "s_q": 1, "dtype": bf16}),
        ("long split", {"lengths": [20000], "h_q": 64, "s_q": 1, "dtype": bf16}),
        ("128 heads", {"lengths": [4096, 100], "h_q": 128, "s_q": 1, "dtype": bf16}),
        ("batch 4", {"lengths": [8192] * 4, "h_q": 16, "s_q": 1, "dtype": bf16}),
        ("batch 150", {"lengths": [300 + i for i in range(150)], "h_q": 32, "s_q": 1, "dtype": fp16}),
        ("odd heads", {"lengths": [700, 1, 0, 129], "h_q": 7, "s_q": 3, "dtype": bf16}),
        ("causal", {"lengths": [1000, 3, 1, 0, 64, 65], "h_q": 16, "s_q": 4, "dtype": bf16, "causal": True}),
        (
            "causal 128 heads",
            {"lengths": [500, 2, 4000], "h_q": 128, "s_q": 2, "dtype": bf16, "causal": True},
        ),
        ("512 rows", {"lengths": [500, 2, 3000], "h_q": 128, "s_q": 4, "dtype": fp16, "causal": True}),
        ("ragged", {"lengths": ragged, "h_q": 48, "s_q": 1, "dtype": bf16}),
        ("ragged 100 heads causal", {"lengths": ragged, "h_q": 100, "s_q": 2, "dtype": bf16, "causal": True}),
        ("all empty", {"lengths": [0, 0, 0], "h_q": 16, "s_q": 1, "dtype": bf16}),
        (
            "long tail",
            {"lengths": [4641, 45118, 1730, 1696], "h_q": 16, "s_q": 4, "dtype": bf16, "causal": True},
        ),
    ]


def verdict(library: Library, inputs: peers.Inputs, fp8: bool) -> tuple[bool, str]:
    """Whether three runs agree bit for bit (a race would show) and lie within bounds of the definition.

    Bounds: 16-bit rounding of output and weights, 2^-9 each; an fp8 cache is rounded to bfloat16 as it is
    unpacked, which moves scores by up to 2^-9 of their size.
    """
    runs = []
    for _ in range(3):
        runs.append(library.prepare(inputs)())
        torch.cuda.synchronize()
    out, lse = runs[0]
    expected, expected_lse = mla_decode_reference(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, SCALE, inputs.causal
    )
    error = relative_error(out, expected)
    finite = torch.isfinite(expected_lse)
    lse_error = float((lse.double() - expected_lse)[finite].abs().max()) if finite.any() else 0.0
    same_inf = torch.equal(torch.isposinf(lse), torch.isposinf(expected_lse))
    same = all(torch.equal(a, out) and torch.equal(c, lse) for a, c in runs[1:])
    passed = error < (8e-3 if fp8 else 4e-3) and lse_error < (2e-2 if fp8 else 1e-3) and same_inf and same
    infinite = "same" if same_inf else "DIFFER"
    bits = "same" if same else "DIFFER"
    return passed, f"out {error:.2e} lse {lse_error:.2e} infinite lse {infinite} bits {bits}"


def check(library: Library, fp8: bool) -> bool:
    """Print one line a case; True when all pass."""
    good = True
    for name, arguments in check_cases():
        if fp8 and arguments["dtype"] != torch.bfloat16:
            continue
        inputs = make_inputs(**arguments, fp8=fp8, seed=zlib.crc32(name.encode()) % 1000)
        passed, text = verdict(library, inputs, fp8)
        good &= passed
        print(f"{'ok  ' if passed else 'FAIL'} {name:26s} {text}", flush=True)
    return good


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a graph, after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def time_graphs(
    graphs: dict[str, torch.cuda.CUDAGraph], flush: Tensor | None, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of every replay, interleaved; `flush` is overwritten before each one."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    names = list(graphs)
    for number in range(rounds):
        shuffled = random.sample(names, len(names))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in names]
        for name, (begin, end) in zip(shuffled, pairs, strict=True):
            if flush is not None:
                flush.fill_(number % 2)
            torch.cuda._sleep(150_000)  # time for the host to queue what follows
            begin.record()
            graphs[name].replay()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: sorted(1e3 * a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def floor_us(s_q: int, lengths: list[int], h_q: int, token_bytes: int) -> float:
    """Bytes over 2.75 TB/s or operations over 788 TFLOP/s, both measured on an H100 with large inputs."""
    tokens = sum(lengths)
    moved = tokens * token_bytes + len(lengths) * s_q * h_q * 2176
    return max(moved / 2.75e6, 2176 * tokens * h_q * s_q / 788e6)


@dataclass(frozen=True)
class TimedCase:
    """A batch to time: the rows' lengths, queries of each, heads."""

    name: str
    lengths: list[int]
    s_q: int
    h_q: int

    @classmethod
    def parse(cls, text: str) -> TimedCase:
        """`b,s_q,s_k,h_q`, `normal,b,s_q,mean,h_q` (lengths from N(mean, mean / 2)) or `tail`."""
        if text == "tail":
            return cls("long tail", [4641, 45118, 1730, 1696], 4, 16)
        kind, *numbers = text.split(",") if text.startswith("normal") else ("uniform", *text.split(","))
        b, s_q, s_k, h_q = map(int, numbers)
        if kind == "uniform":
            return cls(f"b{b} s{s_k}", [s_k] * b, s_q, h_q)
        rng = random.Random(0)
        lengths = [max(s_q, round(rng.normalvariate(s_k, s_k / 2))) for _ in range(b)]
        return cls(f"b{b} N({s_k}, {s_k // 2})", lengths, s_q, h_q)

    @property
    def pages(self) -> int:
        return (max(self.lengths) + 63) // 64


def make_pool(pages: int, fp8: bool) -> Tensor:
    """Pages of random tokens."""
    width, dtype = (656, torch.uint8) if fp8 else (576, torch.bfloat16)
    pool = torch.empty(pages, 64, 1, width, device="cuda", dtype=dtype)
    for part in pool.split(4096):
        if fp8:
            part.copy_(quantize_fp8_ds_mla(torch.randn(*part.shape[:3], 576, device="cuda")))
        else:
            part.normal_()
    return pool


def time_cases(
    library: Library, cases: list[TimedCase], variants: dict[str, dict[str, str]], names: list[str],
    rounds: int,
    warm: bool, fp8: bool, out: Path | None,
) -> None:  # fmt: skip
    """Print medians, and write quantiles to `out`; `variants` are environments for a tuning build of ours."""
    pool = make_pool(max(len(case.lengths) * case.pages for case in cases), fp8)
    flush = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    for case in cases:
        b = len(case.lengths)
        count = b * case.pages
        table = torch.randperm(count, device="cuda").int().view(b, case.pages)
        q = torch.randn(b, case.s_q, case.h_q, 576, device="cuda", dtype=torch.bfloat16)
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        inputs = peers.Inputs(q, pool[:count], table, lengths, SCALE)
        graphs = {}
        keep = []
        for variant, settings in variants.items():
            os.environ.update(settings)
            chosen = Library(Path(settings["LIBRARY"])) if "LIBRARY" in settings else library
            keep.append(chosen.prepare(inputs))
            graphs[variant] = capture(keep[-1])
            for key in settings:
                del os.environ[key]
        for name in names:
            keep.append(peers.prepare(name, inputs))
            graphs[name] = capture(keep[-1])
        counter = torch.zeros(1, device="cuda")
        graphs["nothing"] = capture(functools.partial(counter.add_, 1))
        token_bytes = 656 if fp8 else 1152
        row: dict[str, Any] = {"case": case.name, "s_q": case.s_q, "h_q": case.h_q, "fp8": fp8}
        row["floor"] = round(floor_us(case.s_q, case.lengths, case.h_q, token_bytes), 1)
        for label, buffer in (("cold", flush), ("warm", None)) if warm else (("cold", flush),):
            times = time_graphs(graphs, buffer, rounds)
            row[label] = {
                name: [round(quantile(values, f), 1) for f in (0.2, 0.5, 0.8)]
                for name, values in times.items()
            }
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        medians = {
            label: {name: q[1] for name, q in row[label].items()}
            for label in ("cold", "warm")
            if label in row
        }
        print(json.dumps({key: row[key] for key in ("case", "s_q", "h_q", "floor")} | medians), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--time", help="cases separated by blanks, see TimedCase.parse")
    parser.add_argument("--out", type=Path, help="file to append the results to, one JSON object a line")
    parser.add_argument("--variants", default='{"ours": {}}', help="JSON: name -> environment")
    options = parser.parse_args()
    library = Library(options.library)
    if options.check and not check(library, options.fp8):
        return 1
    if options.time:
        names = []
        for name in peers.NAMES if options.peers else ():
            reason = peers.unavailable(name)
            if reason:
                print(f"{name}: {reason}")
            else:
                names.append(name)
        cases = [TimedCase.parse(text) for text in options.time.split()]
        variants = json.loads(options.variants)
        time_cases(library, cases, variants, names, options.rounds, options.warm, options.fp8, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
