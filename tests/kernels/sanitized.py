"""`python -m tests.kernels.sanitized`: each hopper kernel on small cases, for compute-sanitizer to watch."""

from __future__ import annotations

import sys

from kernels import get_backend
from kernels.checks import CheckCase, run_case
from tests.kernels.hopper_cases import BF16, FP8

CASES = [
    CheckCase("up to 16 rows, ragged", (3, 700, 0, 64, 129), 1, 16, 512, 64, BF16, BF16),
    CheckCase("128 rows", (130, 300), 1, 128, 512, 64, BF16, BF16),
    CheckCase("256 rows, causal", (130, 65), 4, 64, 512, 64, BF16, BF16, True),
    CheckCase("fp8, up to 16 rows", (3, 300, 0, 64), 1, 16, 512, 64, BF16, FP8),
    CheckCase("fp8, 128 rows", (200,), 1, 128, 512, 64, BF16, FP8),
]


def main() -> int:
    """Print each case's result; 1 when one is outside of its bounds."""
    backend = get_backend("hopper")
    results = [run_case(backend, case, seed=1, device="cuda") for case in CASES]
    for result in results:
        print(result)
    return int(not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
