"""One latent cache that all cases of a benchmark take their pages from, as the requests of a server do.

No server allocates a cache for each batch. On an H100 the times are the same either way (NOTES_hopper.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.grid import GridCase
from kernels.reference import FP8_TOKEN_BYTES, quantize_fp8_ds_mla
from kernels.workloads import PAGE_SIZE, Inputs, block_table

LATENT, ROPE = 512, 64
SCALE = 192**-0.5  # DeepSeek's
_FILLED_AT_ONCE = 2048  # pages; as float32 they take 0.3 GB


class PagePool:
    """Random pages in one allocation: of bfloat16, or of fp8_ds_mla while cases ask for that."""

    def __init__(self, cases: Sequence[GridCase], device: torch.device, least_bytes: int, seed: int = 0):
        """Room for each of `cases` with a contiguous copy of its cache, `least_bytes` in any case.

        Raises ValueError when `device` has not that much memory.
        """
        needed = max(
            (_pages(case) + room_pages(case)) * _page_shape_bytes(case.kv_dtype)[1] for case in cases
        )
        self.bytes = max(needed, least_bytes)
        try:
            self._memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the pool of pages takes {self.bytes / 2**30:.1f} GiB, more than {device} has free; "
                "measure a part of the cases (--cases), or ask for a smaller pool (--pool-gib)"
            ) from error
        self._seed = seed
        self._format: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._memory.device

    @property
    def memory(self) -> Tensor:
        """All of its bytes."""
        return self._memory

    def inputs(self, case: GridCase) -> Inputs:
        """Arguments of `case` in absorbed DeepSeek sizes, its pages drawn at random from the whole pool."""
        pages = self._formatted(case.kv_dtype)
        pages = pages[: len(pages) - room_pages(case)]
        order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(self._seed)).int()
        device = self.device
        generator = torch.Generator(device).manual_seed(self._seed)
        q = torch.empty(len(case.lengths), case.s_q, case.h_q, LATENT + ROPE, device=device)
        return Inputs(
            q.normal_(generator=generator).bfloat16(),
            pages,
            block_table(case.lengths, PAGE_SIZE, order).to(device),
            torch.tensor(case.lengths, dtype=torch.int32, device=device),
            LATENT,
            SCALE,
            causal=case.s_q > 1,
        )

    def room(self, case: GridCase) -> Tensor:
        """Pages of the pool that `inputs` leaves free, one after the other, for `case`'s padded rows."""
        pages = self._formatted(case.kv_dtype)
        return pages[len(pages) - room_pages(case) :]

    def _formatted(self, kv_dtype: torch.dtype) -> Tensor:
        """The whole pool as pages of `kv_dtype`, filled anew when it held others."""
        shape, size = _page_shape_bytes(kv_dtype)
        count = self.bytes // size
        pages = self._memory[: count * size].view(kv_dtype).view(count, *shape)
        if self._format != kv_dtype:
            generator = torch.Generator(pages.device).manual_seed(self._seed)
            for part in pages.split(_FILLED_AT_ONCE):
                values = torch.empty(len(part), PAGE_SIZE, 1, LATENT + ROPE, device=pages.device)
                values.normal_(generator=generator)
                part.copy_(quantize_fp8_ds_mla(values) if kv_dtype == torch.uint8 else values)
            self._format = kv_dtype
        return pages


def room_pages(case: GridCase) -> int:
    """Pages of a contiguous cache with a row for each of `case`'s, all as long as the longest.

    Of an FP8 cache nobody makes a copy.
    """
    return 0 if case.fp8 else len(case.lengths) * -(-max(case.lengths) // PAGE_SIZE)


def _pages(case: GridCase) -> int:
    return sum(-(-length // PAGE_SIZE) for length in case.lengths)


def _page_shape_bytes(kv_dtype: torch.dtype) -> tuple[tuple[int, int, int], int]:
    """A page's shape, and its bytes."""
    width = FP8_TOKEN_BYTES if kv_dtype == torch.uint8 else LATENT + ROPE
    return (PAGE_SIZE, 1, width), PAGE_SIZE * width * kv_dtype.itemsize
