"""The shapes on which the hopper target is compared with its peers, and the goal that some of them have."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.limits import H100, Limits
from kernels.reference import FP8_TOKEN_BYTES
from kernels.workloads import Case, parse_workload

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LENGTHS = (512, 1024, 4096, 8192, 32768)
HEADS = (16, 32, 64, 128)
LONG_TAIL = (4641, 45118, 1730, 1696)


@dataclass(frozen=True)
class GridCase:
    """A batch of rows with `lengths` cached tokens, `s_q` queries each, causal or not as in a decode step."""

    label: str
    lengths: tuple[int, ...]
    s_q: int
    h_q: int
    fp8: bool = False

    @property
    def name(self) -> str:
        """Distinguishes the case from every other, e.g. "b4 s8192 q1 h16" or "long tail q4 h16 fp8"."""
        return f"{self.label} q{self.s_q} h{self.h_q}" + (" fp8" if self.fp8 else "")

    def with_16_bits(self) -> GridCase:
        """The same case with a bfloat16 cache."""
        return dataclasses.replace(self, fp8=False)

    @property
    def kv_dtype(self) -> torch.dtype:
        return torch.uint8 if self.fp8 else torch.bfloat16

    @property
    def rows(self) -> int:
        """Query rows that share one batch row's cache."""
        return self.s_q * self.h_q

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    def floor_us(self, limits: Limits = H100) -> float:
        """The longer of bytes and operations at a machine's rates, microseconds.

        Bytes: the cache once, 576 values of a query and 512 of its output in 16 bits. Operations: a
        multiplication and an addition for each of 576 + 512 values of every query and token.
        """
        tokens = sum(self.lengths)
        token_bytes = FP8_TOKEN_BYTES if self.fp8 else 2 * 576
        moved = tokens * token_bytes + len(self.lengths) * self.rows * 2 * (576 + 512)
        operations = 2 * (576 + 512) * tokens * self.rows
        return max(moved / limits.bytes_per_us, operations / limits.operations_per_us)


def uniform(case: Case, h_q: int, fp8: bool = False) -> GridCase:
    """A case of `parse_workload` with `h_q` heads."""
    return GridCase(f"b{case.b} s{case.s_k}", (case.s_k,) * case.b, case.s_q, h_q, fp8)


def normal(b: int, mean: int, s_q: int, h_q: int) -> GridCase:
    """Lengths from N(mean, mean / 2), as FlashMLA's own benchmark draws them; at least the queries' own."""
    rng = random.Random(0)
    lengths = tuple(max(s_q, round(rng.normalvariate(mean, mean / 2))) for _ in range(b))
    return GridCase(f"b{b} N({mean}, {mean // 2})", lengths, s_q, h_q)


def full_grid() -> list[GridCase]:
    """Every case of the comparison, the ones with an FP8 cache last."""
    cases = [uniform(Case(b, s), h) for h, b, s in itertools.product(HEADS, BATCHES, LENGTHS)]
    cases += [
        uniform(Case(b, s, s_q), h)
        for h, b, s_q, s in itertools.product((16, 64, 128), (16, 32, 64, 128), (2, 4), (1024, 8192))
    ]
    cases += [normal(128, mean, s_q, 128) for s_q, mean in itertools.product((1, 2), (4096, 8192))]
    cases.append(GridCase("long tail", LONG_TAIL, 4, 16))
    fp8 = ((1, 1024, 16), (16, 1024, 16), (128, 8192, 16), (128, 8192, 32), (64, 4096, 64), (64, 4096, 128))
    return cases + [uniform(Case(b, s), h, fp8=True) for b, s, h in fp8]


# Goals for single cases on an H100, microseconds with a cold L2.
MARKERS = {
    "b1 s1024 q1 h16": 10.0,
    "b4 s8192 q1 h16": 22.0,
    "b16 s1024 q1 h16": 15.0,
    "b64 s1024 q1 h128": 45.0,
    "b128 s8192 q1 h128": 480.0,
    "b128 s8192 q2 h128": 850.0,
    "b128 s8192 q1 h16 fp8": 290.0,
}

GROUPS = {
    "batch 1 to 8, one query": lambda c: c.uniform and c.s_q == 1 and len(c.lengths) <= 8,
    "batch 16 and more, one query, up to 64 heads": lambda c: (
        c.uniform and c.s_q == 1 and len(c.lengths) >= 16 and c.h_q <= 64
    ),
    "batch 16 and more, one query, 128 heads": lambda c: (
        c.uniform and c.s_q == 1 and len(c.lengths) >= 16 and c.h_q == 128
    ),
    "2 or 4 queries, up to 128 rows": lambda c: c.uniform and c.s_q > 1 and c.rows <= 128,
    "2 or 4 queries, 256 rows and more": lambda c: c.uniform and c.s_q > 1 and c.rows > 128,
    "varying lengths": lambda c: not c.uniform,
}


def select(cases: Sequence[GridCase], words: str) -> list[GridCase]:
    """The cases named by the comma-separated `words`, each a name or a part of names.

    "markers" stands for the names of MARKERS. ValueError when there is no such case.
    """
    parts = [part.strip() for part in words.split(",") if part.strip()]
    wanted = [p for part in parts for p in (MARKERS if part == "markers" else [part])]
    names = {case.name for case in cases}
    found = [
        case
        for case in cases
        if any(word == case.name if word in names else word in case.name for word in wanted)
    ]
    if not found:
        raise ValueError(f"{words!r} names no case, expected a part of a name such as {cases[0].name!r}")
    return found


def shapes(workload: str, heads: str, fp8: bool) -> list[GridCase]:
    """The cases of a workload's text with each of the comma-separated `heads`."""
    return [uniform(case, int(h), fp8) for h in heads.split(",") for case in parse_workload(workload)]
