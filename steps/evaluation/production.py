"""The gate against production: this release beside the version that users have now."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.backends import BackendError, get_backend
from kernels.package import KernelIndex, KernelPackageError
from kernels.workloads import Case
from steps import aws
from steps.evaluation import live_version, regression
from steps.evaluation.engines import load_engine
from steps.evaluation.operator import Sizes
from steps.evaluation.regression import Side
from steps.evaluation.schema import Production
from steps.job import log
from steps.model_package import ModelPackage


@dataclass(frozen=True)
class Candidate:
    """What this release would serve."""

    model_dir: Path
    kernel_dir: Path
    index: KernelIndex
    backend: str
    kv_cache_dtype: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """How production's version is run here: its own kernel, or the candidate's where its own cannot run."""

    kernel_dir: Path
    backend: str
    kv_cache_dtype: str
    kernel_reason: str | None  # why its own kernel cannot run on this machine


def compare_with_production(
    endpoint_name: str,
    candidate: Candidate,
    sizes: Sizes,
    workload: Sequence[Case],
    device: torch.device,
    scratch: Path,
) -> Production:
    """Find, fetch and measure the version behind `endpoint_name`; without one only the reason is recorded.

    Args:
        sizes: of the candidate; both kernels are timed at them.
        scratch: a folder on the job's volume, for the other version's files while it is measured.
    Raises:
        StepError: the version cannot be read, was changed since its release, or cannot be run.
    """
    if not endpoint_name:
        return _nothing("No production endpoint was named.")
    package, reason = live_version.find(aws.client("sagemaker"), endpoint_name)
    if not package:
        return _nothing(reason)
    log.info("production serves %s: measuring it beside this release", package.arn)
    with tempfile.TemporaryDirectory(prefix="production-", dir=scratch) as folder:
        model_dir, kernel_dir = live_version.fetch(aws.client("s3"), package, Path(folder))
        return measure(package, model_dir, kernel_dir, candidate, sizes, workload, device)


def measure(
    package: ModelPackage,
    model_dir: Path,
    kernel_dir: Path,
    candidate: Candidate,
    sizes: Sizes,
    workload: Sequence[Case],
    device: torch.device,
) -> Production:
    """Compare the fetched version with the candidate."""
    served = serve_as_production(package, kernel_dir, candidate)
    operator, reason = compare_operators(served, candidate, sizes, workload, device)
    pieces, text = regression.evaluation_text(candidate.model_dir, candidate.provenance)
    models = regression.compare_models(
        Side(
            lambda: load_engine(
                candidate.model_dir,
                candidate.kernel_dir,
                candidate.backend,
                candidate.kv_cache_dtype,
                device,
            ),
            candidate.model_dir,
        ),
        Side(
            lambda: load_engine(model_dir, served.kernel_dir, served.backend, served.kv_cache_dtype, device),
            model_dir,
        ),
        pieces,
        device,
    )
    step = None if served.kernel_reason else models.step_regression_percent
    latency = [value for value in (operator, step) if value is not None]
    result = Production(
        model_package_arn=package.arn,
        reason=served.kernel_reason or reason,
        interleaved=models.interleaved,
        decode_step_ms=None if served.kernel_reason else models.production_step_ms,
        candidate_decode_step_ms=models.candidate_step_ms,
        operator_regression_percent=operator,
        decode_step_regression_percent=step,
        latency_regression_percent=max(latency, default=None),
        text=text,
        perplexity=models.production_perplexity,
        candidate_perplexity=models.candidate_perplexity,
        perplexity_per=models.perplexity_per,
        choices_equal_percent=models.choices_equal_percent,
        quality_regression_percent=models.quality_regression_percent,
    )
    log.info("against production: %s", result.model_dump(exclude_none=True))
    return result


def serve_as_production(package: ModelPackage, kernel_dir: Path, candidate: Candidate) -> Served:
    """Backend and cache of the version as its endpoint has them, if its kernel runs on this machine."""
    backend = package.environment.get("MLA_KERNEL_BACKEND", "auto")
    try:
        KernelIndex.load(kernel_dir)
        get_backend(backend, kernel_dir)
    except (KernelPackageError, BackendError, ImportError) as error:
        reason = f"Latency was not compared, production's kernel cannot run on this machine: {error}."
        log.warning("%s", reason)
        return Served(candidate.kernel_dir, candidate.backend, candidate.kv_cache_dtype, reason)
    return Served(kernel_dir, backend, package.environment.get("MLA_KV_CACHE_DTYPE", "bfloat16"), None)


def compare_operators(
    served: Served, candidate: Candidate, sizes: Sizes, workload: Sequence[Case], device: torch.device
) -> tuple[float | None, str | None]:
    """The operator's regression in percent; or None and why it was not compared.

    The same library is not timed against itself: it cannot have become slower.
    """
    if served.kernel_reason:
        return None, served.kernel_reason
    if served.kv_cache_dtype != candidate.kv_cache_dtype:
        return None, (
            f"The operators were not compared: production caches in {served.kv_cache_dtype}, "
            f"this release in {candidate.kv_cache_dtype}."
        )
    libraries = [
        index.packages.get(candidate.backend)
        for index in (candidate.index, KernelIndex.load(served.kernel_dir))
    ]
    hashes = {library.sha256 if library else None for library in libraries}
    if served.backend == candidate.backend and len(hashes) == 1:
        return 0.0, None
    percent = regression.operator_regression(
        get_backend(candidate.backend, candidate.kernel_dir),
        get_backend(served.backend, served.kernel_dir),
        sizes,
        workload,
        device,
    )
    if percent is None:
        return None, "The operators were not compared: production's kernel does not take this model's sizes."
    return percent, None


def worst_regression(production: Production) -> float:
    """The worse of latency and quality, percent; 0 when nothing is in production."""
    regressions = (production.latency_regression_percent, production.quality_regression_percent)
    return max((value for value in regressions if value is not None), default=0.0)


def _nothing(reason: str) -> Production:
    log.info("no regression to measure: %s", reason)
    return Production(reason=reason)
