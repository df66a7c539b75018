"""Step caching: which parts of a step's request must be equal, and for how long a result is reused."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pipelines.sandbox.expressions import ExpressionError, Scope, resolve

PROCESSING_KEY = ("AppSpecification", "Environment", "ProcessingInputs")
"""A Processing step's cache key; neither the instance type nor the outputs are part of it
(https://docs.aws.amazon.com/sagemaker/latest/dg/pipelines-default-keys.html)."""

_DURATION = re.compile(
    r"P?(?:(?P<W>\d+)W)?(?:(?P<D>\d+)D)?(?:T(?:(?P<h>\d+)H)?(?:(?P<m>\d+)M)?(?:(?P<s>\d+)S)?)?", re.IGNORECASE
)
_SECONDS = {"W": 604_800, "D": 86_400, "h": 3600, "m": 60, "s": 1}


def cache_key(step: dict[str, Any], scope: Scope) -> str:
    """A hash over the part of the step's resolved request that decides whether a result may be reused."""
    arguments = step["Arguments"]
    if step["Type"] == "Processing":
        arguments = {k: arguments[k] for k in PROCESSING_KEY if k in arguments}
    text = json.dumps([step["Type"], resolve(arguments, scope)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_duration(text: str) -> float:
    """ISO 8601 duration (``P30D``, ``P4DT12H``, and the SDK's ``T12H``) in seconds.

    Raises:
        ExpressionError: no such duration.
    """
    match = _DURATION.fullmatch(text)
    if not match or not any(match.groups()):
        raise ExpressionError(
            f"CacheConfig.ExpireAfter '{text}' is not an ISO 8601 duration such as P30D or PT12H"
        )
    return float(sum(_SECONDS[unit] * int(value) for unit, value in match.groupdict().items() if value))
