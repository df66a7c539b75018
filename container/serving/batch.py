"""What one forward pass computes: flat rows of tokens, where their latents go, and what each attends to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from container.serving.cache import PAGE


@dataclass
class Rows:
    """Rows that attend through the decode kernel: each its own token, page list and length."""

    block_table: Tensor  # int32 [n, pages]
    lengths: Tensor  # int32 [n]

    @property
    def count(self) -> int:
        return self.lengths.shape[0]


@dataclass
class Chunk:
    """Rows start..end of the batch: tokens of one sequence in a row, the last `end - start` of `length`."""

    start: int
    end: int
    length: int
    pages: Tensor  # int64


@dataclass
class Batch:
    """Decode rows first, then the chunks. T rows in all."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    rows: Rows
    chunks: list[Chunk]
    logit_rows: Tensor | None  # int64 [R]: rows whose logits are wanted; None is all of them
    cos: Tensor = field(default_factory=lambda: torch.empty(0))  # float32 [T, rope / 2], set by the model
    sin: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def is_one_token(self) -> bool:
        """Whether it decodes a single token and wants its logits."""
        return self.rows.count == 1 and not self.chunks and self.logit_rows is None


@dataclass
class Span:
    """Tokens of one sequence to run: they sit at positions `start`.. of the sequence that owns `pages`."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


def make_batch(
    spans: Sequence[Span], device: torch.device, wanted: Sequence[int] | None, as_rows: bool = False
) -> Batch:
    """The batch of spans; spans of one token must come first.

    `wanted` are the spans whose last token's logits are asked for; None asks for those of every token.
    With `as_rows` every token of every span attends as a decode row of its own: how a prompt is scored
    through the decode kernel.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tables: list[Sequence[int]] = []
    lengths: list[int] = []
    chunks: list[Chunk] = []
    last: list[int] = []
    for span in spans:
        first = len(tokens)
        count = len(span.tokens)
        where = range(span.start, span.start + count)
        tokens.extend(span.tokens)
        positions.extend(where)
        slots.extend(span.pages[p // PAGE] * PAGE + p % PAGE for p in where)
        if as_rows or count == 1:
            tables.extend([span.pages] * count)
            lengths.extend(p + 1 for p in where)
        else:
            length = span.start + count
            pages = torch.tensor(span.pages[: -(-length // PAGE)], device=device)
            chunks.append(Chunk(first, first + count, length, pages))
        last.append(len(tokens) - 1)
    width = max((len(table) for table in tables), default=1)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]

    def on_device(values: Sequence, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Batch(
        tokens=on_device(tokens),
        positions=on_device(positions),
        slots=on_device(slots),
        rows=Rows(on_device(padded, torch.int32).view(len(tables), width), on_device(lengths, torch.int32)),
        chunks=chunks,
        logit_rows=None
        if wanted is None or len(wanted) == len(tokens)
        else on_device([last[i] for i in wanted]),
    )
