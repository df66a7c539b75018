"""evaluation.json: what Evaluate measured, for QualityGate, SmokeTest, RecordRelease and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from steps.job import StepError


class Section(BaseModel):
    """Immutable; unknown fields and NaN are refused, so that two versions do not agree by luck."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Requested(Section):
    """The parameters of this run."""

    backend: str
    kv_cache_dtype: str
    workload: str


class Contestant(Section):
    """One backend that could have won; `reason` says why it could not."""

    backend: str
    correct: bool
    geomean_us: float | None  # geometric mean of the p50 over the latency cases, microseconds
    reason: str | None


class CorrectnessCase(Section):
    """One case against the float64 definition. Errors are relative, without unit."""

    name: str
    relative_error: float
    bound: float
    lse_error: float
    lse_bound: float
    passed: bool


class Correctness(Section):
    passed: bool
    worst_case: str
    cases: list[CorrectnessCase]
    bounds_reason: str


class LatencyCase(Section):
    """One decode step of the operator: batch `b`, `s_q` queries, `h_q` heads, cache length `s_k` tokens."""

    name: str
    b: int
    s_q: int
    h_q: int
    s_k: int
    p50_us: float
    p90_us: float
    p99_us: float
    baseline_p50_us: float
    speedup: float  # baseline_p50_us / p50_us
    gbps: float  # cache, queries and outputs read or written once, 1e9 bytes a second
    tflops: float  # 1e12 operations a second, a multiply-add counted as two
    fraction_of_limit: float  # gbps / limit_gbps


class Latency(Section):
    limit_gbps: float  # read bandwidth of the memory, measured on this machine in this run
    cases: list[LatencyCase]


class Milliseconds(Section):
    p50: float
    p90: float
    p99: float


class Smoke(Section):
    """What the endpoint must answer to this prompt, greedily. Token ids where the model has no tokenizer."""

    prompt: str | list[int]
    max_tokens: int
    token_ids: list[int]
    text: str


class ModelLevel(Section):
    """The served engine against transformers with the same weights; model_level.py defines the errors."""

    dtype: str  # of weights and arithmetic as served
    reference_dtype: str  # transformers' as the reference: float32 unless reference_note says why not
    reference_note: str | None
    logits_relative_error: float  # the engine against the reference
    transformers_relative_error: float | None  # transformers in `dtype` against it; None with a note
    excess_relative_error: float  # what the gate takes: the engine's error beyond transformers'
    tokens_equal: int
    transformers_tokens_equal: int | None
    tokens_total: int
    tokens_per_s: float  # batch 1, decode only
    decode_step_ms: Milliseconds  # one whole-model decode step, batch 1
    smoke: Smoke


class Production(Section):
    """The version that production serves, measured beside the candidate; regression.py defines the figures.

    A regression is percent by which the candidate is worse; a negative one says that it is better. `reason`
    says why nothing, or not everything, was compared.
    """

    model_package_arn: str | None = None
    reason: str | None = None
    interleaved: bool | None = None  # False: the two models did not fit into memory at once
    decode_step_ms: float | None = None
    candidate_decode_step_ms: float | None = None
    operator_regression_percent: float | None = None
    decode_step_regression_percent: float | None = None
    latency_regression_percent: float | None = None  # the worse of operator and decode step
    text: str | None = None  # where the text of the perplexities is from
    perplexity: float | None = None
    candidate_perplexity: float | None = None
    perplexity_per: str | None = None  # token, or byte where the tokenizers differ
    choices_equal_percent: float | None = None  # likeliest next tokens that are the same
    quality_regression_percent: float | None = None


# JSON has no infinity. Stands for "not finite" and, in the gate, "could not be measured": over every limit.
OUT_OF_BOUNDS = 1e9


# Six digits: GateFailed and the package's metadata show the figure as it stands.
Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]


class Gate(Section):
    """What QualityGate compares with the pipeline's parameters, flat for JsonGet."""

    correct: int  # 1 or 0
    relative_error: Figure
    speedup: Figure
    decode_latency_ms: Figure
    tokens_equal_percent: Figure
    regression_percent: Figure  # the worse of latency and quality against production; 0 without a production


class Evaluation(Section):
    schema_version: int = 2
    created: str
    machine: dict[str, str | int | float | None]
    versions: dict[str, str | None]
    requested: Requested
    contest: list[Contestant]
    backend: str
    kernel_sha256: str
    correctness: Correctness
    latency: Latency
    model: ModelLevel | None  # None when an incorrect kernel kept the model from running
    production: Production
    gate: Gate

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read evaluation.json. Raises StepError naming the field that is missing, unknown or mistyped."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StepError(f"There is no {path}.", "Run the Evaluate step.") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise StepError(
                f"{path} does not have this version's form: {field or 'document'}: {first['msg']}.",
                "Run the Evaluate step of this version.",
            ) from error
