"""report.html: the evaluation for a person, one self-contained page with the verdict first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from steps.evaluation import plots
from steps.evaluation.schema import Evaluation


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
    environment.filters |= {"microseconds": plots.microseconds, "scientific": _error}
    latency = evaluation.latency
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        provenance=provenance,
        title=_title(provenance),
        verdict=verdict(evaluation),
        summary=summary(evaluation),
        figures=figures(evaluation),
        latency_plot=jinja2.utils.markupsafe.Markup(plots.latency_plot(latency.cases)),
        error_plot=jinja2.utils.markupsafe.Markup(plots.error_plot(evaluation.correctness.cases)),
        bandwidth_plot=jinja2.utils.markupsafe.Markup(
            plots.bandwidth_plot(latency.cases, latency.limit_gbps)
        ),
    )


def verdict(evaluation: Evaluation) -> str:
    """The headline in one sentence."""
    if not evaluation.correctness.passed:
        failed = sum(not case.passed for case in evaluation.correctness.cases)
        return f"Not correct: {failed} of {len(evaluation.correctness.cases)} cases exceed their bound"
    speedup = evaluation.gate.speedup
    pace = (
        f"{speedup:.2f}× as fast as the torch baseline"
        if speedup >= 1
        else (f"slower than the torch baseline ({speedup:.2f}×)")
    )
    return f"Correct, and {pace}"


def summary(evaluation: Evaluation) -> str:
    """What stands behind the headline, for someone who reads no further."""
    correct = [entry.backend for entry in evaluation.contest if entry.correct]
    cases, model = evaluation.correctness.cases, evaluation.model
    asked = evaluation.requested.backend
    chosen = (
        f"Backend {evaluation.backend} was the fastest of {len(correct)} correct ones ({', '.join(correct)})."
        if asked == "auto" and len(correct) > 1
        else f"Backend {evaluation.backend} was measured."
    )
    passed = sum(case.passed for case in cases)
    return (
        f"{chosen} {passed} of {len(cases)} cases lie within their bound against the float64 definition. "
        f"The served model gives {model.tokens_equal} of {model.tokens_total} greedy tokens as transformers "
        f"gives them with the same weights; its logits differ by {_error(model.logits_relative_error)}."
    )


def figures(evaluation: Evaluation) -> list[Figure]:
    """The headline numbers."""
    gate, model, latency = evaluation.gate, evaluation.model, evaluation.latency
    slowest = min(latency.cases, key=lambda case: case.speedup)
    best = max(latency.cases, key=lambda case: case.gbps)
    step = model.decode_step_ms
    return [
        Figure("Speed-up", f"{gate.speedup:.2f}", "×", f"least {slowest.speedup:.2f}× ({slowest.name})"),
        Figure(
            "Decode step", f"{gate.decode_latency_ms:.3g}", "ms", f"p90 {step.p90:.3g}, p99 {step.p99:.3g} ms"
        ),
        Figure("Generation", f"{model.tokens_per_s:.0f}", "tokens/s", "whole model, batch 1"),
        Figure("Relative error", _error(gate.relative_error), "", "worst of kernel and logits"),
        Figure(
            "Tokens equal", f"{gate.tokens_equal_percent:.4g}", "%", f"of {model.tokens_total} greedy tokens"
        ),
        Figure("Bandwidth", f"{best.gbps:.3g}", "GB/s", f"memory reads {latency.limit_gbps:.3g} GB/s"),
    ]


def _title(provenance: Mapping[str, Any]) -> str:
    name, version = provenance.get("name") or "-", provenance.get("version") or "-"
    if name == "-":
        return str(provenance.get("model_uri", "model"))
    return name if version == "-" else f"{name}, version {version}"


def _error(value: float) -> str:
    """0.00213 -> "2.1×10⁻³"."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return mantissa + "×10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
