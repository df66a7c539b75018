"""report.html: the evaluation for a person, one self-contained page with the verdict first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from steps.evaluation import plots
from steps.evaluation.schema import OUT_OF_BOUNDS, Evaluation, ModelLevel


@dataclass(frozen=True)
class Figure:
    """One headline number with its unit, what it is, and a remark."""

    label: str
    value: str
    unit: str
    remark: str


def render(evaluation: Evaluation, provenance: Mapping[str, Any]) -> str:
    """The page.

    Args:
        evaluation: what was measured.
        provenance: provenance.json of the model; its name, version, URI and run are shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"microseconds": plots.microseconds, "scientific": _error, "powers": _powers}
    environment.filters |= {"signed": _signed, "milliseconds": _milliseconds}
    latency = evaluation.latency
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        provenance=provenance,
        title=_title(provenance),
        verdict=verdict(evaluation),
        summary=summary(evaluation),
        figures=figures(evaluation),
        latency_plot=Markup(plots.latency_plot(latency.cases)),
        error_plot=Markup(plots.error_plot(evaluation.correctness.cases)),
        bandwidth_plot=Markup(plots.bandwidth_plot(latency.cases, latency.limit_gbps)),
    )


def verdict(evaluation: Evaluation) -> str:
    """The headline in one sentence."""
    cases, speedup = evaluation.correctness.cases, evaluation.gate.speedup
    if not evaluation.correctness.passed:
        return (
            f"Not correct: {sum(not case.passed for case in cases)} of {len(cases)} cases exceed their bound"
        )
    if speedup < 1:
        return f"Correct, but slower than the torch baseline ({speedup:.2f}×)"
    return f"Correct, and {speedup:.2f}× as fast as the torch baseline"


def summary(evaluation: Evaluation) -> str:
    """What stands behind the headline, for someone who reads no further."""
    correct = [entry.backend for entry in evaluation.contest if entry.correct]
    cases, model = evaluation.correctness.cases, evaluation.model
    chosen = (
        f"Backend {evaluation.backend} was the fastest of {len(correct)} correct ones ({', '.join(correct)})."
        if len(correct) > 1
        else f"Backend {evaluation.backend} was measured."
    )
    passed = sum(case.passed for case in cases)
    served = (
        f"The served model gives {model.tokens_equal} of {model.tokens_total} greedy tokens as transformers "
        f"gives them with the same weights; {logits(model)}."
        if model
        else "With this kernel the model could not be run."
    )
    production = evaluation.production
    beside = ""
    if production.model_package_arn:
        worst = _signed(evaluation.gate.regression_percent)
        beside = f" Beside the version in production its worst regression is {worst}."
    return (
        f"{chosen} {passed} of {len(cases)} cases lie within their bound of the float64 definition. "
        f"{served}{beside}"
    )


def logits(model: ModelLevel) -> str:
    """The model's error in words, beside what rounding alone does to transformers."""
    words = (
        f"its logits differ by {_error(model.logits_relative_error)} from transformers "
        f"in {model.reference_dtype}"
    )
    if model.reference_note:
        return f"{words}, which holds the rounding of both: float32 did not fit"
    if model.dtype == model.reference_dtype:
        return words
    own = _error(model.transformers_relative_error or 0.0)
    return f"{words}, those of transformers in {model.dtype} by {own}"


def figures(evaluation: Evaluation) -> list[Figure]:
    """The headline numbers."""
    gate, latency = evaluation.gate, evaluation.latency
    slowest = min(latency.cases, key=lambda case: case.speedup)
    best = max(latency.cases, key=lambda case: case.gbps)
    error = "not finite" if gate.relative_error >= OUT_OF_BOUNDS else _error(gate.relative_error)
    numbers = [
        Figure("Speed-up", f"{gate.speedup:.2f}", "×", f"least {slowest.speedup:.2f}× (case {slowest.name})"),
        Figure("Relative error", error, "", "worst of kernel and logits beyond rounding"),
        Figure("Bandwidth", f"{best.gbps:.3g}", "GB/s", f"the memory reads {latency.limit_gbps:.3g} GB/s"),
    ]
    if model := evaluation.model:
        step = model.decode_step_ms
        numbers += [
            Figure("Decode step", f"{step.p50:.3g}", "ms", f"p90 {step.p90:.3g} ms, p99 {step.p99:.3g} ms"),
            Figure("Generation", f"{model.tokens_per_s:.0f}", "tokens/s", "whole model, batch 1"),
            Figure(
                "Tokens equal",
                f"{gate.tokens_equal_percent:.4g}",
                "%",
                f"of {model.tokens_total} greedy tokens",
            ),
        ]
    return numbers


def _signed(percent: float | None) -> str:
    """3.25 -> "+3.2 %"."""
    return "–" if percent is None else f"{percent:+.1f} %"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _title(provenance: Mapping[str, Any]) -> str:
    name, version = provenance.get("name") or "-", provenance.get("version") or "-"
    if name == "-":
        return str(provenance.get("model_uri", "model"))
    return name if version == "-" else f"{name}, version {version}"


def _powers(text: str) -> str:
    """ "2^-9" -> "2⁻⁹"."""
    return re.sub(r"\^(-?\d+)", lambda match: match[1].translate(plots.SUPERSCRIPT), text)


def _error(value: float) -> str:
    """0.00213 -> "2.1×10⁻³"."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return mantissa + "×10" + str(int(exponent)).translate(plots.SUPERSCRIPT)
