"""Time backends side by side on a workload's shapes, beside the torch baseline and the read limit.

With --peers the hopper target is timed beside FlashMLA and FlashAttention-3 instead, on the whole grid of
kernels.grid or on a part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.arguments import Problem
from kernels.backends import Backend, available_backends, get_backend
from kernels.machine import device_name
from kernels.reference import compiled_absorbed, mla_decode_absorbed
from kernels.timing import Timing, interleaved, one_call_us
from kernels.versus import RESULTS, against_peers
from kernels.workloads import Case, Inputs, make_inputs, parse_workload

BASELINES = ("torch", "torch.compile")
COLD_BYTES = 128 << 20  # more than the last-level cache of common servers and GPUs
MAX_COPIES = 128
WORKLOAD, HEADS = "interactive", "4,16,64,128"


@dataclass(frozen=True)
class Measurement:
    """One backend on one case. The baseline is the faster of the torch forms, timed in the same rounds."""

    backend: str
    name: str
    b: int
    s_q: int
    h_q: int
    s_k: int
    p50_us: float
    p90_us: float
    p99_us: float
    baseline: str
    baseline_p50_us: float
    speedup: float
    gbps: float
    tflops: float
    fraction_of_limit: float


def measure(
    backends: Mapping[str, Backend],
    cases: Sequence[Case],
    *,
    h_q: int,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
    q_dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype = torch.bfloat16,
    softmax_scale: float | None = None,
    device: torch.device | str = "cpu",
    seconds_per_case: float = 1.0,
    limit_gbps: float | None = None,
    compile_baseline: bool = False,
    seed: int = 0,
) -> list[Measurement]:
    """Time `backends` and the baseline on every case, interleaved; one Measurement a backend and case.

    `limit_gbps` is `read_limit_gbps(device)` when not given. `compile_baseline` also times torch.compile's
    form. Backends that cannot run a case are left out of it.
    """
    device = torch.device(device)
    limit = read_limit_gbps(device) if limit_gbps is None else limit_gbps
    results = []
    for case in cases:
        inputs = make_inputs(
            [case.s_k] * case.b, s_q=case.s_q, h_q=h_q, kv_lora_rank=kv_lora_rank, rope_dim=rope_dim,
            q_dtype=q_dtype, kv_dtype=kv_dtype, causal=case.s_q > 1, softmax_scale=softmax_scale,
            device=device, seed=seed,
        )  # fmt: skip
        problem = Problem.of(inputs.q, inputs.k_cache, inputs.head_dim_v, inputs.causal)
        caches = cold_caches(inputs.k_cache)
        calls: dict[str, Callable[[], object]] = {
            name: bind(backend, inputs, caches)
            for name, backend in backends.items()
            if backend.unsupported(problem) is None
        }
        able = list(calls)
        # The lengths are equal and known here, so that the baseline need not read them from a GPU.
        calls["torch"] = bind(functools.partial(mla_decode_absorbed, length=case.s_k), inputs, caches)
        if compile_baseline:
            compiled = functools.partial(compiled_absorbed(), length=case.s_k)
            calls["torch.compile"] = bind(compiled, inputs, caches)
        timings = interleaved(calls, device, seconds=seconds_per_case)
        baseline = min((name for name in BASELINES if name in timings), key=lambda name: timings[name].p50_us)
        for name in able:
            results.append(
                _measurement(name, case, inputs, timings[name], baseline, timings[baseline].p50_us, limit)
            )
    return results


def bind(call: Callable[..., object], inputs: Inputs, caches: Sequence[Tensor]) -> Callable[[], object]:
    """`call` on `inputs`, each time with the next of `caches`."""
    turns = itertools.cycle([(inputs.q, cache, *inputs.arguments()[2:]) for cache in caches])
    return lambda: call(*next(turns))


def cold_caches(cache: Tensor) -> list[Tensor]:
    """Copies of a latent cache that together exceed COLD_BYTES.

    A model's layers each read their own cache, so a layer finds its cache evicted by the others'; timing one
    copy over and over would time the processor's caches instead of memory.
    """
    copies = min(MAX_COPIES, -(-COLD_BYTES // (cache.numel() * cache.element_size())))
    return [cache, *(cache.clone() for _ in range(copies - 1))]


def _measurement(
    backend: str, case: Case, inputs: Inputs, timing: Timing, baseline: str, baseline_us: float, limit: float
) -> Measurement:
    seconds = timing.p50_us / 1e6
    q, cache = inputs.q, inputs.k_cache
    token_bytes = cache.shape[-1] * cache.element_size()
    out_values = q.shape[0] * q.shape[1] * q.shape[2] * inputs.head_dim_v
    moved = case.b * case.s_k * token_bytes + (q.numel() + out_values) * q.element_size()
    operations = 2 * case.b * case.s_q * q.shape[2] * case.s_k * (q.shape[3] + inputs.head_dim_v)
    gbps = moved / seconds / 1e9
    return Measurement(
        backend, case.name, case.b, case.s_q, q.shape[2], case.s_k, timing.p50_us, timing.p90_us,
        timing.p99_us, baseline, baseline_us, baseline_us / timing.p50_us, gbps, operations / seconds / 1e12,
        gbps / limit,
    )  # fmt: skip


def read_limit_gbps(device: torch.device | str = "cpu", megabytes: int = 256) -> float:
    """Gigabytes a second at which this device sums a tensor far larger than its caches, best of 15."""
    device = torch.device(device)
    tensor = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    best = min(one_call_us(tensor.sum, device) for _ in range(15))
    return tensor.numel() * 4 / best / 1e3


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table, and the geometric mean of the speed-ups of each backend."""
    head = (
        "backend",
        "case",
        "h_q",
        "p50 us",
        "p90 us",
        "baseline us",
        "speed-up",
        "GB/s",
        "of limit",
        "GFLOP/s",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for m in measurements:
        lines.append(
            f"| {m.backend} | {m.name} | {m.h_q} | {m.p50_us:.1f} | {m.p90_us:.1f}"
            f" | {m.baseline_p50_us:.1f} ({m.baseline}) | {m.speedup:.2f} | {m.gbps:.1f}"
            f" | {m.fraction_of_limit:.0%} | {m.tflops * 1e3:.0f} |"
        )
    for backend in dict.fromkeys(m.backend for m in measurements):
        speedups = [m.speedup for m in measurements if m.backend == backend]
        mean = geometric_mean(speedups)
        lines.append(f"\n{backend}: geometric mean {mean:.2f}x, least {min(speedups):.2f}x the baseline")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m kernels.bench [--workload interactive] [--heads 4,16,128] [--out FILE]`, or `--peers`."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.peers:
            return against_peers(options, HEADS)
        cases = parse_workload(options.workload or WORKLOAD)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    names = [name for name in options.backends.split(",") if name]
    if names:
        backends = {name: get_backend(name, options.kernel_dir) for name in names}
    else:
        backends = available_backends(options.kernel_dir, device)
        backends.pop("reference")
    kv_name = options.kv_dtype or options.dtype
    kv_dtype = torch.uint8 if kv_name == "fp8_ds_mla" else getattr(torch, kv_name)
    limit = read_limit_gbps(device)
    results: list[Measurement] = []
    for h_q in map(int, (options.heads or HEADS).split(",")):
        results += measure(
            backends, cases, h_q=h_q, q_dtype=getattr(torch, options.dtype), kv_dtype=kv_dtype, device=device,
            seconds_per_case=options.seconds, limit_gbps=limit, compile_baseline=options.compile,
        )  # fmt: skip
    print("# The decode operator beside torch\n")
    print("Made by `python -m kernels.bench`; a case is batch x cached tokens, its cache cold.")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, reads at most {limit:.1f} GB/s.\n")
    print(table(results))
    if options.out:
        report = {"device": str(device), "threads": torch.get_num_threads(), "limit_gbps": limit,
                  "measurements": [dataclasses.asdict(m) for m in results]}  # fmt: skip
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workload", help=f"preset or batch x length [x queries], ...; default: {WORKLOAD}")
    add("--heads", help=f"query heads, comma separated; default: {HEADS}")
    add("--backends", default="", help="names, comma separated; default: all that can be had here")
    add("--kernel-dir", type=Path, help="kernel artifact; default: build into the cache")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--kv-dtype", choices=["bfloat16", "float16", "float32", "fp8_ds_mla"], help="default: --dtype")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=1.0, help="time for each case")
    add("--threads", type=int, help="torch threads, which the cpu target uses too")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time torch.compile's baseline too",
    )
    add("--out", type=Path, help="write the measurements as JSON")
    add = parser.add_argument_group("--peers").add_argument
    add("--peers", action="store_true", help="the hopper target beside FlashMLA and FlashAttention-3")
    add(
        "--cases",
        help='parts of names of the grid\'s cases, comma separated, such as "b4 s8192 q1 h16"; or markers',
    )
    add(
        "--library",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a compiled library instead; repeatable",
    )
    add("--rounds", type=int, default=21, help="replays of every graph")
    add(
        "--pool-gib",
        type=float,
        default=16.0,
        help="GiB of the one cache that all cases take their pages from, more if a case needs it; "
        "default: %(default)s",
    )
    add(
        "--results",
        type=Path,
        help=f"where to write the page; default: {RESULTS.name}, if all of it was measured",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
