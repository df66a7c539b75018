"""The quality gate: the measured figures a release must reach, in one table.

`release.py` turns the table into the pipeline's condition and into the message of its failure, so that no
limit is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limit:
    """One condition: `gate.<field>` of evaluation.json against a parameter or a constant."""

    field: str
    operator: Literal["==", "<=", ">="]
    bound: str | int  # a pipeline parameter's name, or a constant
    words: str
    unit: str = ""


LIMITS = (
    Limit("correct", "==", 1, "every correctness case within its bound"),
    Limit("relative_error", "<=", "MaxRelativeError", "worst relative error"),
    Limit("speedup", ">=", "MinSpeedup", "speed-up over the baseline", "x"),
    Limit("decode_latency_ms", "<=", "MaxDecodeLatencyMs", "decode step", " ms"),
    Limit("regression_percent", "<=", "MaxRegressionPercent", "worst regression against production", "%"),
)
