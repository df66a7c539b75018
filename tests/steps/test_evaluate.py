"""Evaluate on a tiny model with the real cpu kernel, the real engine and the real transformers."""

import dataclasses
import html.parser
import json
import math
from pathlib import Path

import pytest
import torch

import container.serving.attention
from container.serving.engine import Engine
from kernels.backends import ReferenceBackend, get_backend
from kernels.build import build
from kernels.workloads import parse_workload
from steps import compile_kernel, evaluate
from steps.evaluation import model_level, operator, report
from steps.evaluation.engines import ENGINE_OPTIONS
from steps.evaluation.schema import OUT_OF_BOUNDS, Evaluation, Production
from steps.job import StepError
from tests.steps.support import StepRun
from tests.steps.tiny_model import write_model

PROVENANCE = {
    "name": "tiny",
    "version": "7",
    "model_uri": "models:/tiny@champion",
    "run_id": "r1",
    "source": "s",
}
WORKLOAD = "1x64,2x130x2"
SIZES = operator.Sizes(4, 512, 64, torch.bfloat16, torch.bfloat16, 0.1)


@dataclasses.dataclass
class Distorted(ReferenceBackend):
    """The torch backend with its output multiplied: a kernel that is wrong by a known amount."""

    name: str = "cpu"
    factor: float = 1.0

    def __call__(self, *arguments):
        out, lse = super().__call__(*arguments)
        return out * self.factor, lse


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder like /opt/ml/processing/input with model, provenance and a compiled kernel."""
    folder = tmp_path_factory.mktemp("ml") / "processing" / "input"
    write_model(folder / "model")
    (folder / "provenance").mkdir()
    (folder / "provenance" / "provenance.json").write_text(json.dumps(PROVENANCE))
    build("cpu", folder / "kernel")
    return folder


def root(inputs: Path, tmp_path: Path) -> Path:
    """A fresh /opt/ml on the shared inputs."""
    (tmp_path / "processing").mkdir()
    (tmp_path / "processing" / "input").symlink_to(inputs)
    return tmp_path


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory) -> StepRun:
    run = StepRun(evaluate, root(inputs, tmp_path_factory.mktemp("run")))
    return run.start(backend="auto", workload=WORKLOAD)


@pytest.fixture(scope="module")
def result(evaluated) -> Evaluation:
    return Evaluation.load(evaluated.root / "processing/output/evaluation/evaluation.json")


def distort(monkeypatch, factor: float) -> None:
    """Make every part that asks for the cpu backend get one whose output is multiplied by `factor`."""

    def get(name, kernel_dir=None):
        return Distorted(factor=factor) if name == "cpu" else get_backend(name, kernel_dir)

    monkeypatch.setattr(operator, "get_backend", get)
    monkeypatch.setattr(container.serving.attention, "get_backend", get)


def test_kernel_and_model_pass_and_the_gate_has_the_figures(result):
    assert result.correctness.passed
    assert result.gate.correct == 1
    assert {entry.backend for entry in result.contest if entry.correct} == {"cpu", "reference"}
    assert all(entry.reason for entry in result.contest if not entry.correct)
    assert [case.name for case in result.latency.cases] == ["1x64", "2x130x2"]
    speedups = [case.speedup for case in result.latency.cases]
    assert result.gate.speedup == pytest.approx(math.prod(speedups) ** 0.5, rel=1e-5)
    worst = max(case.relative_error for case in result.correctness.cases)
    worst = max(worst, result.model.excess_relative_error)
    assert result.gate.relative_error == pytest.approx(worst, rel=1e-5)
    assert result.gate.decode_latency_ms == pytest.approx(result.model.decode_step_ms.p50, rel=1e-5)
    assert result.model.logits_relative_error < 0.03  # bfloat16 cache, float32 weights
    assert result.model.tokens_equal >= 0.9 * result.model.tokens_total


def test_the_smoke_answer_is_what_the_serving_engine_generates(result, inputs):
    engine = Engine.load(inputs / "model", inputs / "kernel", backend=result.backend, options=ENGINE_OPTIONS)
    smoke = result.model.smoke
    [answer] = engine.generate([smoke.prompt], max_tokens=smoke.max_tokens)
    assert answer.token_ids == smoke.token_ids
    assert len(smoke.token_ids) == smoke.max_tokens


def test_the_report_is_one_page_that_loads_nothing(evaluated, result):
    page = (evaluated.root / "processing/output/evaluation/report.html").read_text()
    tags, loads = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            loads.extend(value for key, value in attrs if key in ("src", "href"))

    Reader().feed(page)
    assert loads == []
    assert "script" not in tags
    assert page.index(report.verdict(result)) < page.index("<svg")  # the verdict comes first
    assert tags.count("svg") >= 3
    for case in result.correctness.cases:
        assert case.name in page
    assert "tiny, version 7" in page


def test_the_report_shows_the_comparison_with_production(result):
    assert result.production.reason == "No production endpoint was named."
    assert result.gate.regression_percent == 0
    assert "Nothing was compared. No production endpoint was named." in report.render(result, PROVENANCE)
    production = Production(
        model_package_arn="arn:live", interleaved=True, decode_step_ms=2.0, candidate_decode_step_ms=2.5,
        operator_regression_percent=-3.0, decode_step_regression_percent=25.0,
        latency_regression_percent=25.0, text="own text", perplexity=8.0,
        candidate_perplexity=7.6, perplexity_per="token", choices_equal_percent=91.0,
        quality_regression_percent=-5.0,
    )  # fmt: skip
    gate = result.gate.model_copy(update={"regression_percent": evaluate.worst_regression(production)})
    page = report.render(result.model_copy(update={"production": production, "gate": gate}), PROVENANCE)
    for words in ("arn:live", "+25.0 %", "-3.0 %", "-5.0 %", "worst regression is +25.0 %", "own text"):
        assert words in page
    part = production.model_copy(
        update={"decode_step_ms": None, "operator_regression_percent": None, "reason": "Why."}
    )
    assert "Why." in report.render(result.model_copy(update={"production": part}), PROVENANCE)


def test_an_incorrect_backend_never_wins(inputs, monkeypatch):
    distort(monkeypatch, 1.05)
    outcome = operator.hold_contest(
        "auto", inputs / "kernel", SIZES, parse_workload("1x64"), torch.device("cpu")
    )
    assert outcome.backend == "reference"
    cpu = next(entry for entry in outcome.contest if entry.backend == "cpu")
    assert not cpu.correct
    assert cpu.reason.startswith("incorrect: exceeds its bound in")


def test_a_requested_incorrect_backend_is_measured_and_fails_the_gate(inputs, monkeypatch):
    distort(monkeypatch, 1.05)
    cases = parse_workload("1x64")
    outcome = operator.hold_contest("cpu", inputs / "kernel", SIZES, cases, torch.device("cpu"))
    gate = evaluate.gate(outcome, None, Production())
    assert (outcome.backend, gate.correct) == ("cpu", 0)
    assert max(c.relative_error for c in outcome.correctness.cases) == pytest.approx(0.05, rel=0.1)
    assert outcome.latency.cases[0].p50_us > 0


def test_an_incorrect_kernel_still_gets_its_verdict_written(inputs, tmp_path, monkeypatch):
    distort(monkeypatch, math.nan)
    run = StepRun(evaluate, root(inputs, tmp_path)).start(backend="cpu", workload="1x64")
    gate = run.json("evaluation", "evaluation.json")["gate"]
    assert (gate["correct"], gate["relative_error"]) == (0, OUT_OF_BOUNDS)
    assert gate["regression_percent"] == OUT_OF_BOUNDS
    page = (run.root / "processing/output/evaluation/report.html").read_text()
    assert "Not correct: " in page
    assert "not finite" in page


def test_a_backend_that_cannot_run_here_is_named_with_its_reason(inputs, tmp_path):
    run = StepRun(evaluate, root(inputs, tmp_path))
    with pytest.raises(StepError, match=r"KernelBackend 'hopper': hopper: .*hopper"):
        run.start(backend="hopper", workload="1x64")


def test_a_wrong_workload_names_the_part(inputs, tmp_path):
    with pytest.raises(StepError, match=r"8by4096.*parameter Workload"):
        StepRun(evaluate, root(inputs, tmp_path)).start(workload="1x64,8by4096")


def test_a_model_without_latent_attention_is_refused(inputs, tmp_path):
    run = StepRun(evaluate, tmp_path)
    for channel in ("provenance", "kernel"):
        (tmp_path / "processing" / "input").mkdir(parents=True, exist_ok=True)
        (tmp_path / "processing" / "input" / channel).symlink_to(inputs / channel)
    run.give("model", "artifacts/checkpoint/config.json", {"model_type": "llama"})
    (tmp_path / "processing/input/model/artifacts/checkpoint/model.safetensors").write_bytes(b"")
    with pytest.raises(StepError, match=r"config\.json.*multi-head latent attention"):
        run.start(workload="1x64")


def test_a_damaged_kernel_is_refused(inputs, tmp_path):
    run = StepRun(evaluate, tmp_path)
    build("cpu", tmp_path / "processing/input/kernel")
    for channel in ("provenance", "model"):
        (tmp_path / "processing" / "input" / channel).symlink_to(inputs / channel)
    (tmp_path / "processing/input/kernel/cpu/libmla_decode.so").write_bytes(b"short")
    with pytest.raises(StepError, match=r"damaged.*Rerun CompileKernel"):
        run.start(workload="1x64")


def test_a_float32_model_is_compared_as_it_is(result):
    model = result.model
    assert (model.dtype, model.reference_dtype, model.reference_note) == ("float32", "float32", None)
    assert model.transformers_relative_error == 0.0
    assert model.excess_relative_error == model.logits_relative_error


def measured_in_bfloat16(folder, backend="cpu"):
    write_model(folder, dtype=torch.bfloat16)
    engine = Engine.load(folder, backend=backend, options=ENGINE_OPTIONS)
    return model_level.measure(engine, folder)


def test_rounding_to_bfloat16_is_not_taken_for_an_error(tmp_path):
    model = measured_in_bfloat16(tmp_path)
    assert model.logits_relative_error > 0.02  # more than the default limit, and all of it rounding
    assert model.transformers_relative_error > 0.02
    assert model.excess_relative_error < 0.01
    assert model.transformers_tokens_equal is not None


def test_a_wrong_kernel_stands_out_from_the_rounding_of_bfloat16(tmp_path, monkeypatch):
    distort(monkeypatch, 1.5)
    assert measured_in_bfloat16(tmp_path).excess_relative_error > 0.05


def test_a_model_too_large_for_float32_is_its_own_reference_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(model_level, "free_bytes", lambda device: 1000)
    model = measured_in_bfloat16(tmp_path)
    assert model.reference_dtype == "bfloat16"
    assert "float32 reference was skipped" in model.reference_note
    assert model.transformers_relative_error is None
    assert model.excess_relative_error == model.logits_relative_error


def test_relative_error_ignores_a_common_offset_and_survives_nan():
    logits = torch.randn(5, 30)
    assert model_level.relative_error(logits + 3.0, logits) < 1e-5
    assert model_level.relative_error(1.01 * logits, logits) == pytest.approx(0.01, rel=1e-4)
    assert model_level.relative_error(logits * math.nan, logits) == OUT_OF_BOUNDS


def test_an_evaluation_of_another_form_is_refused_by_field(tmp_path, result):
    document = result.model_dump()
    del document["gate"]["speedup"]
    (tmp_path / "evaluation.json").write_text(json.dumps(document))
    with pytest.raises(StepError, match=r"gate\.speedup"):
        Evaluation.load(tmp_path / "evaluation.json")


@pytest.mark.parametrize("backend", ["triton", "flash_mla", "reference"])
def test_nothing_is_compiled_for_a_backend_that_brings_its_own_code(tmp_path, backend):
    index = StepRun(compile_kernel, tmp_path).start(backend=backend).json("kernel", "index.json")
    assert index["packages"] == {}
    assert index["skipped"][backend]


def test_the_compiled_artifact_is_published_whole(tmp_path):
    run = StepRun(compile_kernel, tmp_path).start(backend="cpu")
    index = run.json("kernel", "index.json")
    folder = tmp_path / "processing" / "output" / "kernel" / "cpu"
    assert {path.name for path in folder.iterdir()} == {"libmla_decode.so", "manifest.json", "compiler.log"}
    assert index["packages"]["cpu"]["sha256"] == json.loads((folder / "manifest.json").read_text())["sha256"]


def test_a_missing_compiler_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StepError, match=r"'cpu': g\+\+ not found on PATH; install"):
        StepRun(compile_kernel, tmp_path).start(backend="cpu")
