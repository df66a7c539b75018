"""The operator level: which backends are correct at the model's sizes, and which of those is the fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from container.serving.checkpoint import ModelConfig
from kernels.arguments import Problem
from kernels.backends import NAMES, Backend, BackendError, available_backends, get_backend
from kernels.bench import Measurement, geometric_mean, measure, read_limit_gbps
from kernels.checks import BOUNDS_REASON, correctness_cases, run_case
from kernels.workloads import PAGE_SIZE, Case
from steps.evaluation.schema import (
    OUT_OF_BOUNDS,
    Contestant,
    Correctness,
    CorrectnessCase,
    Latency,
    LatencyCase,
)
from steps.job import StepError, log

SECONDS_PER_CASE = 0.5
SEED = 20240507  # the cases are the same in every run, so that two runs can be compared


@dataclass(frozen=True)
class Sizes:
    """The operator as one model calls it. `kv_dtype` uint8 means fp8_ds_mla."""

    h_q: int
    kv_lora_rank: int
    rope_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    softmax_scale: float

    @classmethod
    def of(cls, config: ModelConfig, kv_cache_dtype: str) -> Sizes:
        """Sizes of the model `config` with the cache format `kv_cache_dtype`."""
        return cls(
            h_q=config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            q_dtype=getattr(torch, config.dtype),
            kv_dtype=torch.uint8 if kv_cache_dtype == "fp8_ds_mla" else getattr(torch, kv_cache_dtype),
            softmax_scale=config.softmax_scale,
        )

    def variants(self) -> list[Sizes]:
        """These sizes, and with bfloat16 queries: the engine rounds them for a kernel that needs it."""
        rounded = dataclasses.replace(self, q_dtype=torch.bfloat16)
        return [self] if rounded == self else [self, rounded]

    def problem(self, device: torch.device, case: Case) -> Problem:
        """The problem that `case` of a workload poses."""
        return Problem(
            device.type,
            self.q_dtype,
            self.kv_dtype,
            case.b,
            case.s_q,
            self.h_q,
            self.kv_lora_rank,
            self.rope_dim,
            PAGE_SIZE,
            causal=case.s_q > 1,
        )


@dataclass(frozen=True)
class Entry:
    """A backend in the contest, and the sizes at which the engine would call it."""

    backend: Backend
    sizes: Sizes


@dataclass(frozen=True)
class Outcome:
    """What the contest found: every contestant, the chosen backend, and its figures."""

    contest: list[Contestant]
    backend: str
    correctness: Correctness
    latency: Latency
    speedup: float  # geometric mean over the latency cases of baseline / chosen backend


def hold_contest(
    requested: str, kernel_dir: Path, sizes: Sizes, workload: Sequence[Case], device: torch.device
) -> Outcome:
    """Check and time the requested backend, or with "auto" every one that can run here.

    An incorrect backend never wins. When none is correct, the first one that ran is reported with its errors.
    Raises StepError when no backend can run at all; it gives each one's reason.
    """
    able, reasons = candidates(requested, kernel_dir, sizes, workload, device)
    if not able:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise StepError(
            f"No decode backend can run this model with KernelBackend '{requested}': {why}.",
            "Choose another KernelBackend, KvCacheDtype or ProcessingInstanceType.",
        )
    checked = {name: check(entry, device) for name, entry in able.items()}
    correct = {name: entry for name, entry in able.items() if checked[name].passed}
    timed = correct or dict([next(iter(able.items()))])
    limit = read_limit_gbps(device)
    measured = time_entries(timed, workload, device, limit)
    geomeans = {name: geometric_mean([m.p50_us for m in rows]) for name, rows in measured.items()}
    winner = min(geomeans, key=geomeans.__getitem__)
    log.info("backend %s is the choice among %s", winner, {n: f"{us:.1f} us" for n, us in geomeans.items()})
    contest = [
        Contestant(
            backend=name,
            correct=result.passed,
            geomean_us=geomeans.get(name),
            reason=None if result.passed else f"incorrect: exceeds its bound in '{result.worst_case}'",
        )
        for name, result in checked.items()
    ]
    contest += [
        Contestant(backend=name, correct=False, geomean_us=None, reason=reason)
        for name, reason in reasons.items()
    ]
    rows = measured[winner]
    return Outcome(
        contest=contest,
        backend=winner,
        correctness=checked[winner],
        latency=Latency(limit_gbps=limit, cases=[_latency_case(row) for row in rows]),
        speedup=geometric_mean([row.speedup for row in rows]),
    )


def candidates(
    requested: str, kernel_dir: Path, sizes: Sizes, workload: Sequence[Case], device: torch.device
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Backends that can run every case of the workload, and the others' reasons in words."""
    able: dict[str, Entry] = {}
    reasons: dict[str, str] = {}
    offered = available_backends(kernel_dir, device) if requested == "auto" else {requested}
    for name in NAMES if requested == "auto" else (requested,):
        if name == "auto":
            continue
        try:
            backend = get_backend(name, kernel_dir)
        except (BackendError, ImportError) as error:
            reasons[name] = str(error)
            continue
        refusals = {variant: refusal(backend, variant, workload, device) for variant in sizes.variants()}
        fitting = [variant for variant, reason in refusals.items() if reason is None]
        if not fitting:
            reasons[name] = "; ".join(dict.fromkeys(str(reason) for reason in refusals.values()))
        elif name not in offered:  # e.g. Triton's interpreter, which is correct on a CPU but no way to serve
            reasons[name] = f"auto does not use it on a {device.type}"
        else:
            able[name] = Entry(backend, fitting[0])
    return able, reasons


def refusal(backend: Backend, sizes: Sizes, workload: Sequence[Case], device: torch.device) -> str | None:
    """Why the backend cannot run some case of the workload; None when it can run all."""
    problems = (sizes.problem(device, case) for case in workload)
    return next((reason for problem in problems if (reason := backend.unsupported(problem))), None)


def check(entry: Entry, device: torch.device) -> Correctness:
    """Run every correctness case at the model's sizes."""
    backend, sizes = entry.backend, entry.sizes
    cases = []
    for case in correctness_cases(
        h_q=sizes.h_q,
        kv_lora_rank=sizes.kv_lora_rank,
        rope_dim=sizes.rope_dim,
        q_dtype=sizes.q_dtype,
        kv_dtype=sizes.kv_dtype,
        softmax_scale=sizes.softmax_scale,
    ):
        result = run_case(backend, case, SEED, device)
        log.info(
            "%s %s: relative error %.2e of %.1e, lse error %.2e of %.1e: %s",
            backend.name,
            result.name,
            result.relative_error,
            result.bound,
            result.lse_error,
            result.lse_bound,
            "passed" if result.passed else "FAILED",
        )
        cases.append(
            CorrectnessCase(
                name=result.name,
                relative_error=finite(result.relative_error),
                bound=result.bound,
                lse_error=finite(result.lse_error),
                lse_bound=result.lse_bound,
                passed=result.passed,
            )
        )
    worst = max(
        cases, key=lambda case: max(case.relative_error / case.bound, case.lse_error / case.lse_bound)
    )
    return Correctness(
        passed=all(case.passed for case in cases),
        worst_case=worst.name,
        cases=cases,
        bounds_reason=BOUNDS_REASON,
    )


def time_entries(
    entries: Mapping[str, Entry], workload: Sequence[Case], device: torch.device, limit_gbps: float
) -> dict[str, list[Measurement]]:
    """Time backends of equal sizes interleaved with the torch baseline; a measurement a case, by backend."""
    measurements: list[Measurement] = []
    for sizes in dict.fromkeys(entry.sizes for entry in entries.values()):
        measurements += measure(
            {name: entry.backend for name, entry in entries.items() if entry.sizes == sizes},
            workload,
            h_q=sizes.h_q,
            kv_lora_rank=sizes.kv_lora_rank,
            rope_dim=sizes.rope_dim,
            q_dtype=sizes.q_dtype,
            kv_dtype=sizes.kv_dtype,
            softmax_scale=sizes.softmax_scale,
            device=device,
            seconds_per_case=SECONDS_PER_CASE,
            limit_gbps=limit_gbps,
        )
    for row in measurements:
        log.info(
            "%s %s: p50 %.1f us, p99 %.1f us, baseline %.1f us, %.2fx",
            row.backend,
            row.name,
            row.p50_us,
            row.p99_us,
            row.baseline_p50_us,
            row.speedup,
        )
    return {name: [row for row in measurements if row.backend == name] for name in entries}


def finite(error: float) -> float:
    """`error`, or OUT_OF_BOUNDS for one that JSON cannot hold."""
    return error if math.isfinite(error) else OUT_OF_BOUNDS


def _latency_case(row: Measurement) -> LatencyCase:
    return LatencyCase(**{name: getattr(row, name) for name in LatencyCase.model_fields})
