"""The hopper target's own cases, from simple to ragged; kernels.checks has those of every backend."""

from __future__ import annotations

import random

import torch

from kernels.checks import CheckCase
from kernels.grid import LONG_TAIL

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.uint8
RAGGED = random.Random(1).choices([0, 1, 63, 64, 65, 700, 1501, 2999], k=50)
CASES = [
    CheckCase("one tile", (64,), 1, 64, 512, 64, BF16, BF16),
    CheckCase("part of a tile", (37,), 1, 64, 512, 64, BF16, BF16),
    CheckCase("two parts", (128,), 1, 16, 512, 64, BF16, BF16),
    CheckCase("many parts", (1000,), 1, 16, 512, 64, FP16, FP16),
    CheckCase("two row tiles", (700, 64, 5), 1, 128, 512, 64, BF16, BF16),
    CheckCase("64 heads, long and short", (9000, 64, 5), 1, 64, 512, 64, BF16, BF16),
    CheckCase("one head, short rows", (5, 0, 64, 65, 3, 1), 1, 1, 512, 64, BF16, BF16),
    CheckCase("more rows than multiprocessors", tuple(range(1, 1501, 10)), 1, 16, 512, 64, BF16, BF16),
    CheckCase("100 heads, causal", tuple(RAGGED), 2, 100, 512, 64, BF16, BF16, True),
    CheckCase("128 heads, 4 queries", (4000, 3, 257), 4, 128, 512, 64, BF16, BF16, True),
    CheckCase("all empty", (0, 0, 0), 1, 16, 512, 64, BF16, BF16),
    CheckCase("long tail", LONG_TAIL, 4, 16, 512, 64, BF16, BF16, True),
]


def row_tiles(case: CheckCase) -> int:
    """Tiles of 64 query rows x 64 tokens: what a run of the case costs."""
    return -(-case.s_q * case.h_q // 64) * sum(-(-length // 64) for length in case.lengths)
