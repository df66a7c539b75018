"""The shapes that are timed, and inputs for any shape: random, pages shuffled, NaN where nothing may read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference import quantize_fp8_ds_mla

PRESETS = {
    # batch x cache length [x queries a step]
    "interactive": "1x512,1x2048,1x8192,2x1024,4x2048",
    "standard": "1x2048,4x4096,8x1024,16x2048,8x1024x2",
    "throughput": "16x1024,32x1024,64x512,16x4096,32x512x2",
}
PAGE_SIZE = 64
_CASE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Case:
    """One timed shape: `b` rows of `s_k` cached tokens, `s_q` new queries a row."""

    b: int
    s_k: int
    s_q: int = 1

    @property
    def name(self) -> str:
        """As `parse_workload` reads it."""
        return f"{self.b}x{self.s_k}" + (f"x{self.s_q}" if self.s_q > 1 else "")


def parse_workload(text: str) -> list[Case]:
    """Cases of a preset, or of "1x512,16x1024x2" (batch x cache length [x queries]); ValueError otherwise."""
    cases = []
    for part in PRESETS.get(text.strip(), text).split(","):
        match = _CASE.fullmatch(part.strip())
        if not match:
            raise ValueError(
                f"workload {text!r}: {part.strip()!r} is neither a preset ({', '.join(PRESETS)}) nor "
                'batch x length [x queries] such as "8x4096" or "16x1024x2"'
            )
        b, s_k, s_q = int(match[1]), int(match[2]), int(match[3] or 1)
        if not (1 <= b <= 4096 and 1 <= s_k <= 1 << 20 and 1 <= s_q <= 16):
            raise ValueError(
                f"workload {text!r}: {part.strip()!r} needs batch 1-4096, length 1-1048576, queries 1-16"
            )
        cases.append(Case(b, s_k, s_q))
    return cases


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operator, in its order."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    head_dim_v: int
    softmax_scale: float
    causal: bool

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, float, bool]:
        """The positional arguments of a Backend."""
        return (
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            self.head_dim_v,
            self.softmax_scale,
            self.causal,
        )


def block_table(lengths: Sequence[int], page_size: int, pages: Tensor, unused: int = 0) -> Tensor:
    """int32 [b, pages of the longest row + 1]: row after row takes its `pages`, the rest are `unused`."""
    used = [-(-length // page_size) for length in lengths]
    table = torch.full((len(used), max([*used, 1]) + 1), unused, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(used):
        table[row, :count] = pages[taken : taken + count]
        taken += count
    return table


def make_inputs(
    lengths: Sequence[int],
    *,
    s_q: int = 1,
    h_q: int = 16,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
    q_dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype = torch.bfloat16,
    page_size: int = PAGE_SIZE,
    causal: bool = False,
    softmax_scale: float | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> Inputs:
    """Random inputs with one row for each of `lengths`.

    Pages lie in random order among unused ones. With `poison` every token that no query may read, unused
    pages included, is NaN, and unused block table entries are out of range (2^30). kv_dtype uint8 packs
    fp8_ds_mla. Numbers are drawn on `device`, so they differ between kinds of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    width = kv_lora_rank + rope_dim
    b = len(lengths)
    used = [-(-length // page_size) for length in lengths]
    num_blocks = sum(used) + 2
    cache = torch.empty(num_blocks, page_size, 1, width, dtype=torch.float32, device=device)
    cache.normal_(generator=generator)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
    table = block_table(lengths, page_size, order, unused=1 << 30 if poison else 0)
    packed = quantize_fp8_ds_mla(cache) if kv_dtype == torch.uint8 else cache.to(kv_dtype)
    if poison:
        # Bytes of 0xFF are NaN in e4m3, float32 and bfloat16 alike.
        nan: float | int = 0xFF if kv_dtype == torch.uint8 else float("nan")
        packed[order[sum(used) :].long()] = nan
        for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
            if count:
                packed[int(table[row, count - 1]), length - (count - 1) * page_size :] = nan
    q = torch.empty(b, s_q, h_q, width, device=device).normal_(generator=generator)
    return Inputs(
        q.to(q_dtype),
        packed,
        table.to(device),
        torch.tensor(list(lengths), dtype=torch.int32, device=device),
        kv_lora_rank,
        width**-0.5 if softmax_scale is None else softmax_scale,
        causal,
    )
