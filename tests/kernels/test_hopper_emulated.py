"""The Hopper kernels' own sources on a CPU (tests/kernels/emulator): what they compute, without a GPU."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import pytest
import torch

from kernels.checks import CheckCase, run_case
from tests.kernels.emulator import Emulator, build
from tests.kernels.hopper_cases import BF16, CASES, FP8, FP16, row_tiles

SMALL = 60  # row tiles; the others are slow here


@pytest.fixture(scope="session")
def library() -> Path:
    return build()


def as_fp8(case: CheckCase) -> CheckCase:
    return dataclasses.replace(case, q_dtype=BF16, kv_dtype=FP8)


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if row_tiles(c) <= SMALL else pytest.mark.slow) for c in CASES],
    ids=lambda case: case.name,
)
def test_matches_the_definition(library: Path, case: CheckCase, fp8: bool) -> None:
    """Within the bounds of kernels.checks, as on a GPU."""
    seed = zlib.crc32(case.name.encode())
    result = run_case(Emulator(library, 8, seed), as_fp8(case) if fp8 else case, seed=seed)
    assert result.passed, result


def test_two_orders_of_events_give_the_same_bits(library: Path) -> None:
    for q, kv, heads in (
        (BF16, BF16, 16),
        (BF16, BF16, 64),
        (FP16, FP16, 64),
        (BF16, FP8, 16),
        (BF16, FP8, 64),
    ):
        inputs = CheckCase("", (200, 70, 0), 1, heads, 512, 64, q, kv).inputs(seed=1)
        first, second = (Emulator(library, 5, seed)(*inputs.arguments()) for seed in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
