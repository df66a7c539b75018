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

import torch
from torch import Tensor

from kernels.arguments import Problem
from kernels.backends import Backend, BackendError, available_backends, get_backend
from kernels.bench_options import HEADS, WORKLOAD, parse
from kernels.limits import read_bytes_per_us
from kernels.machine import device_name
from kernels.reference import compiled_absorbed, mla_decode_absorbed
from kernels.targets import BuildError
from kernels.timing import Timing, interleaved
from kernels.versus import against_peers
from kernels.workloads import Case, Inputs, make_inputs, parse_workload

BASELINES = ("torch", "torch.compile")
COLD_BYTES = 128 << 20  # more than the last-level cache of common servers and GPUs
MAX_COPIES = 128


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
    """Gigabytes a second at which this device sums a tensor far larger than its caches."""
    return read_bytes_per_us(torch.ones(megabytes << 18, dtype=torch.float32, device=device)) / 1e3


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
    options = parse(arguments, __doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return against_peers(options, HEADS) if options.peers else beside_torch(options)
    except (BackendError, BuildError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def beside_torch(options: argparse.Namespace) -> int:
    """Measure the chosen backends on the workload, print the table, write --out.

    Returns 1 when a backend asked for could not run, else 0; raises as `get_backend` and `parse_workload`.
    """
    cases, device = parse_workload(options.workload or WORKLOAD), options.device
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
    q_dtype = getattr(torch, options.dtype)
    for h_q in map(int, (options.heads or HEADS).split(",")):
        results += measure(
            backends, cases, h_q=h_q, q_dtype=q_dtype, kv_dtype=kv_dtype, device=device,
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
    left_out = backends.keys() - {m.backend for m in results}
    for name in left_out:
        reason = backends[name].unsupported(Problem(device.type, q_dtype, kv_dtype, 1, 1, 16, 512, 64, 64))
        print(f"{name} was not measured: {reason or 'it takes none of these cases'}", file=sys.stderr)
    return int(bool(left_out) and bool(names))


if __name__ == "__main__":
    sys.exit(main())
