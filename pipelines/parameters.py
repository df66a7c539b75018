"""The one table of pipeline parameters: name, type, allowed values, meaning.

A parameter is what a rerun may vary from the console without touching code. Its default is not here: it
belongs to an environment, so it stands in `config/*.yaml` under `parameters`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import UserError, choose

Value = str | int | float
Type = Literal["String", "Integer", "Float"]

BACKENDS = ("auto", "cpu", "hopper", "triton", "flash_mla", "reference")
SWITCH = ("false", "true")  # a pipeline has no boolean parameters
CACHE_DTYPES = ("bfloat16", "float32", "fp8_ds_mla")
APPROVALS = ("PendingManualApproval", "Approved", "Rejected")
PROCESSING_INSTANCES = (
    "ml.c7i.xlarge",
    "ml.c7i.4xlarge",
    "ml.m5.4xlarge",
    "ml.g5.2xlarge",
    "ml.g5.12xlarge",
    "ml.g6e.2xlarge",
    "ml.g6e.12xlarge",
    "ml.p5.4xlarge",
)
ENDPOINT_INSTANCES = (
    "ml.c7i.xlarge",
    "ml.c7i.4xlarge",
    "ml.m5.4xlarge",
    "ml.g5.2xlarge",
    "ml.g5.12xlarge",
    "ml.g6e.2xlarge",
    "ml.g6e.12xlarge",
    "ml.p4d.24xlarge",
    "ml.p5.4xlarge",
    "ml.p5.48xlarge",
    "ml.p5e.48xlarge",
    "ml.p5en.48xlarge",
)


NUMBER = {"Integer": r"[+-]?[0-9]+", "Float": r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"}


@dataclass(frozen=True)
class Form:
    """What a text must look like, where a pipeline would find out only after the work is done."""

    pattern: str
    words: str  # for a person: "give …"


ENDPOINT = Form(
    "[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", "1 to 63 letters, digits and dashes, no dash at either end"
)


MODEL = Form("[^/:]+", "a model's name in MLflow, which has no / or :")


@dataclass(frozen=True)
class Parameter:
    """One pipeline parameter; `enum` is empty when any value of the type is allowed."""

    name: str
    type: Type
    meaning: str
    enum: tuple[str, ...] = ()
    required: bool = False  # no default: whoever starts the pipeline gives it
    form: Form | None = None
    least: int | None = None  # a number's smallest value

    def parse(self, value: object, where: str) -> Value:
        """`value` as this parameter's type. Raises UserError naming the parameter and the allowed values."""
        wanted = {"String": "a text", "Integer": "a whole number", "Float": "a number"}[self.type]
        try:
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError
            # Python reads 1_000, blanks around and digits of any script as well; the service does not.
            if isinstance(value, str) and not re.fullmatch(NUMBER.get(self.type, "(?s:.*)"), value):
                raise ValueError
            parsed: Value = {"String": str, "Integer": int, "Float": float}[self.type](value)
            if isinstance(parsed, float) and not math.isfinite(parsed):
                raise ValueError
            if self.type == "Integer" and isinstance(value, float) and value != parsed:
                raise ValueError
        except ValueError:
            raise UserError(f"{self.name} = {value!r} is not {wanted}", where, f"give {wanted}") from None
        if self.type == "String" and not parsed:
            raise UserError(f"{self.name} is empty", where, "give a value")
        if self.form and not re.fullmatch(self.form.pattern, str(parsed)):
            raise UserError(
                f"{self.name} = {value!r} would be refused later", where, f"give {self.form.words}"
            )
        if self.least is not None and isinstance(parsed, (int, float)) and parsed < self.least:
            raise UserError(f"{self.name} = {parsed} is too small", where, f"give {self.least} or more")
        if self.enum and parsed not in self.enum:
            raise UserError(f"{self.name} = {value!r} is not allowed", where, choose(str(value), self.enum))
        return parsed


RELEASE = (
    Parameter(
        "ModelUri", "String", "MLflow model: models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN/PATH"
    ),
    Parameter(
        "AllowRequirementConflicts",
        "String",
        "go on although the model pins packages in versions that conflict with the serving image's",
        SWITCH,
    ),
    Parameter(
        "KernelBackend",
        "String",
        "decode kernel to build and measure; auto takes the fastest correct one",
        BACKENDS,
    ),
    Parameter(
        "KernelSource",
        "String",
        "package to measure as flash_mla: builtin (none), pip requirement, or s3://….tar.gz, .zip, .whl",
    ),
    Parameter(
        "KvCacheDtype", "String", "storage of the latent cache while serving and measuring", CACHE_DTYPES
    ),
    Parameter(
        "Workload", "String", "decode shapes to measure: interactive, standard, throughput, or BATCHxLENGTH,…"
    ),
    Parameter(
        "ProcessingInstanceType",
        "String",
        "machine that compiles and measures the kernel",
        PROCESSING_INSTANCES,
    ),
    Parameter("EndpointInstanceType", "String", "machine of the staging endpoint", ENDPOINT_INSTANCES),
    Parameter("EndpointInstanceCount", "Integer", "instances of the staging endpoint", least=1),
    Parameter(
        "MaxRelativeError", "Float", "gate: largest allowed relative error of kernel and model outputs"
    ),
    Parameter(
        "MinSpeedup", "Float", "gate: smallest allowed speed-up over the torch baseline (geometric mean)"
    ),
    Parameter(
        "MaxDecodeLatencyMs", "Float", "gate: longest allowed decode step of the model at batch 1, p50, ms"
    ),
    Parameter(
        "MaxRegressionPercent",
        "Float",
        "gate: percent by which latency or perplexity may be worse than production's, measured side by side",
    ),
    Parameter("ModelApprovalStatus", "String", "status the registered version starts with", APPROVALS),
    Parameter(
        "StagingEndpointName", "String", "endpoint that every passing release is deployed to", form=ENDPOINT
    ),
    Parameter(
        "AcceleratedModelName",
        "String",
        "MLflow name to also register weights and kernel under, for batch jobs; - registers none",
        form=MODEL,
    ),
)

PRODUCTION = (
    Parameter(
        "ModelPackageArn",
        "String",
        "the approved version to deploy; the approval event gives it",
        required=True,
    ),
    Parameter(
        "ProductionEndpointName", "String", "endpoint that an approved version is deployed to", form=ENDPOINT
    ),
    Parameter("EndpointInstanceType", "String", "machine of the production endpoint", ENDPOINT_INSTANCES),
    Parameter("EndpointInstanceCount", "Integer", "instances of the production endpoint", least=1),
)

PIPELINES: Mapping[str, tuple[Parameter, ...]] = {"release": RELEASE, "production": PRODUCTION}


def check_staging(staging: object, production: object, where: str) -> None:
    """Raise UserError when a release would be deployed where only an approved version may serve."""
    if str(staging).lower() == str(production).lower():  # CreateEndpoint sees no difference in case
        what = f"StagingEndpointName = '{staging}' is the production endpoint"
        raise UserError(what, where, "name another one: only an approval changes production")


def check_values(table: Mapping[str, Parameter], values: Mapping[str, object], where: str) -> None:
    """Raise UserError for an unknown parameter, and for a value of the wrong type or outside the enum."""
    for name, value in values.items():
        if name not in table:
            raise UserError(f"unknown parameter '{name}'", where, choose(name, table))
        table[name].parse(value, where)


def check_defaults(pipeline: str, defaults: Mapping[str, object], where: str) -> dict[str, Value]:
    """The defaults of one pipeline, typed; every parameter but the required ones must have one.

    Raises UserError for an unknown, missing, mistyped or disallowed default.
    """
    table = {parameter.name: parameter for parameter in PIPELINES[pipeline]}
    check_values(table, defaults, where)
    for name in defaults:
        if table[name].required:
            raise UserError(f"{name} takes no default", where, "remove it")
    missing = [name for name, parameter in table.items() if not parameter.required and name not in defaults]
    if missing:
        raise UserError(f"no default for {', '.join(missing)}", where, "add it under parameters")
    return {name: table[name].parse(value, where) for name, value in defaults.items()}
