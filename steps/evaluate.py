"""Evaluate: prove the kernel correct, find the fastest correct one, and measure the model it serves.

    operator    correctness cases against float64, then the contest among the correct  evaluation/operator.py
    model       the serving engine against transformers with the same weights       evaluation/model_level.py
    production  the version that users have now, measured beside this one      production.py, regression.py
    verdict     evaluation.json for the gate, report.html for a person                    schema.py, report.py

An incorrect kernel does not fail this step: the verdict is written, and the gate refuses it with figures.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from container.serving.checkpoint import ModelConfig, NotMlaModel, find_checkpoint
from container.serving.engine import CACHE_DTYPES
from kernels.backends import NAMES
from kernels.package import KernelIndex, KernelPackageError
from kernels.workloads import Case, parse_workload
from steps.evaluation import model_level, report
from steps.evaluation.engines import load_engine
from steps.evaluation.machine import machine, versions
from steps.evaluation.operator import Outcome, Sizes, finite, hold_contest
from steps.evaluation.production import Candidate, compare_with_production, worst_regression
from steps.evaluation.schema import OUT_OF_BOUNDS, Evaluation, Gate, ModelLevel, Production, Requested
from steps.job import Job, StepError, log, run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", choices=NAMES)
    parser.add_argument("--kv-cache-dtype", default="bfloat16", choices=CACHE_DTYPES)
    parser.add_argument(
        "--production-endpoint", default="", help="compare with the version it serves; empty: with none"
    )
    parser.add_argument("--workload", default="interactive", help="preset, or batch x length [x queries], …")


def main(job: Job) -> None:
    """Measure kernel and model, and write evaluation/evaluation.json and evaluation/report.html."""
    args = job.args
    model_dir, kernel_dir = job.input("model"), job.input("kernel")
    provenance = job.read_json("provenance", "provenance.json")
    workload = read_workload(args.workload)
    config, index = read_inputs(model_dir, kernel_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.info("evaluating on %s with %d threads", device, torch.get_num_threads())

    sizes = Sizes.of(config, args.kv_cache_dtype)
    outcome = hold_contest(args.backend, kernel_dir, sizes, workload, device)
    model = measure_model(
        model_dir, kernel_dir, outcome, args.kv_cache_dtype, device, provenance.get("input_example")
    )
    production = Production(reason="The candidate could not be run.")
    if model:
        candidate = Candidate(model_dir, kernel_dir, index, outcome.backend, args.kv_cache_dtype, provenance)
        production = compare_with_production(
            args.production_endpoint, candidate, sizes, workload, device, job.root
        )
    evaluation = Evaluation(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(device, job.root),
        versions=versions(index, outcome.backend),
        requested=Requested(backend=args.backend, kv_cache_dtype=args.kv_cache_dtype, workload=args.workload),
        contest=outcome.contest,
        backend=outcome.backend,
        kernel_sha256=index.sha256,
        correctness=outcome.correctness,
        latency=outcome.latency,
        model=model,
        production=production,
        gate=gate(outcome, model, production),
    )
    job.write_json("evaluation", "evaluation.json", evaluation.model_dump())
    page = report.render(evaluation, provenance)
    (job.output("evaluation") / "report.html").write_text(page, encoding="utf-8")
    log.info("%s. %s", report.verdict(evaluation), report.summary(evaluation))


def read_workload(text: str) -> list[Case]:
    """The latency cases. Raises StepError naming the part that is no case."""
    try:
        return parse_workload(text)
    except ValueError as error:
        raise StepError(f"Workload: {error}.", "Correct the pipeline parameter Workload.") from error


def read_inputs(model_dir: Path, kernel_dir: Path) -> tuple[ModelConfig, KernelIndex]:
    """Configuration of the model and index of the kernel artifact, both verified."""
    try:
        return ModelConfig.from_folder(find_checkpoint(model_dir)), KernelIndex.load(kernel_dir)
    except NotMlaModel as error:
        raise StepError(f"{error}.", "Release a model with multi-head latent attention.") from error
    except KernelPackageError as error:
        raise StepError(f"{error}.", "Rerun CompileKernel on this instance type.") from error


def measure_model(
    model_dir: Path,
    kernel_dir: Path,
    outcome: Outcome,
    kv_cache_dtype: str,
    device: torch.device,
    input_example: Any,
) -> ModelLevel | None:
    """The model level with the chosen backend; None when an incorrect kernel keeps the model from running."""
    try:
        engine = load_engine(model_dir, kernel_dir, outcome.backend, kv_cache_dtype, device)
        return model_level.measure(engine, model_dir, input_example)
    except StepError as error:
        if outcome.correctness.passed:
            raise
        log.error("no model level, the kernel is incorrect: %s", error)
        return None


def gate(outcome: Outcome, model: ModelLevel | None, production: Production) -> Gate:
    """The figures that QualityGate compares. What could not be measured exceeds every limit."""
    errors = [case.relative_error for case in outcome.correctness.cases]
    errors.append(model.excess_relative_error if model else OUT_OF_BOUNDS)
    return Gate(
        correct=int(outcome.correctness.passed),
        relative_error=finite(max(errors)),
        speedup=outcome.speedup,
        decode_latency_ms=model.decode_step_ms.p50 if model else OUT_OF_BOUNDS,
        tokens_equal_percent=100 * model.tokens_equal / model.tokens_total if model else 0.0,
        regression_percent=worst_regression(production) if model else OUT_OF_BOUNDS,
    )


if __name__ == "__main__":
    run(main, arguments)
