"""Decode steps captured as CUDA graphs, one for each padded batch size: a step is a copy and a launch."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from container.serving.batch import Batch, Rows, Span
from container.serving.cache import NULL_PAGE, PAGE
from container.serving.fused import greedy

log = logging.getLogger(__name__)
NULL_SLOT = NULL_PAGE * PAGE


class _Staging:
    """One host copy of a step's inputs, which keeps what its rows held last."""

    def __init__(self, inputs: "StepInputs", pinned: bool):
        self.words = torch.zeros(inputs.words, dtype=torch.int64, pin_memory=pinned)
        parts = [part.numpy() for part in inputs.parts(self.words)]
        self.tokens, self.positions, self.slots, self.lengths, self.table = parts
        self._held: list[tuple[Sequence[int] | None, int]] = [(None, 0)] * len(self.tokens)

    def set(self, spans: Sequence[Span], size: int) -> None:
        """Makes the first rows those of spans of one token and the others up to `size` empty ones."""
        for row, span in enumerate(spans):
            pages, position = span.pages, span.start
            self.tokens[row] = span.tokens[0]
            self.positions[row] = position
            self.slots[row] = pages[position // PAGE] * PAGE + position % PAGE
            self.lengths[row] = position + 1
            held, count = self._held[row]
            if held is not pages or count > len(pages):
                count = 0
            if count < len(pages):
                self.table[row, count : len(pages)] = pages[count:]
                self._held[row] = pages, len(pages)
        n = len(spans)
        self.slots[n:size] = NULL_SLOT
        self.lengths[n:size] = 0


class StepInputs:
    """The inputs of a step of decode rows at fixed addresses, in one buffer that one copy fills.

    Only what changed since a row was last written is written again: a sequence that stays in its row costs a
    few numbers, not its page table. There are two host copies in turn, since the transfer of one may still
    run while the next step is prepared.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device):
        # 8-byte words: tokens, positions and slots, then the 4-byte lengths and page tables
        self._max_batch, self._max_pages = max_batch, max_pages
        self._head = 3 * max_batch + -(-max_batch // 2)
        self.words = self._head + -(-max_batch * max_pages // 2)
        self._device = torch.zeros(self.words, dtype=torch.int64, device=device)
        self._staging = [_Staging(self, device.type == "cuda") for _ in range(2)]
        self._turn = 0
        self.set([], max_batch, None)

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """tokens, positions and slots int64 [max_batch], lengths int32 [max_batch], table int32
        [max_batch, max_pages]: views of a buffer of int64."""
        n = self._max_batch
        tail = buffer[3 * n :].view(torch.int32)
        start = 2 * (self._head - 3 * n)
        table = tail[start : start + n * self._max_pages].view(n, self._max_pages)
        return buffer[:n], buffer[n : 2 * n], buffer[2 * n : 3 * n], tail[:n], table

    def batch(self, size: int) -> Batch:
        """The first `size` rows on the device."""
        tokens, positions, slots, lengths, table = (part[:size] for part in self.parts(self._device))
        return Batch(tokens, positions, slots, Rows(table, lengths), [], None)

    def set(self, spans: Sequence[Span], size: int, tokens: Tensor | None) -> None:
        """Sets the rows of spans of one token, empty ones up to `size`; `tokens` on the device, int32 [n],
        replace the spans' own."""
        staging = self._staging[self._turn]
        self._turn = 1 - self._turn
        staging.set(spans, size)
        words = self._head + -(-size * self._max_pages // 2)
        self._device[:words].copy_(staging.words[:words], non_blocking=True)
        if tokens is not None:
            self._device[: len(spans)].copy_(tokens.clamp(min=0))  # -1 stands for logits that are not finite


@dataclass
class Started:
    """A step that was started. `logits` and `best` on the device are valid until the next one starts."""

    logits: Tensor
    best: Tensor
    arriving: tuple[Tensor, torch.cuda.Event] | None = None

    @property
    def follows(self) -> bool:
        """Whether a next step can start on its tokens before they are read."""
        return self.arriving is not None

    def tokens(self) -> Tensor:
        """`greedy` of the logits, int32 [n], on the host if a copy is on its way there: waits for it."""
        if self.arriving is None:
            return self.best
        copy, event = self.arriving
        event.synchronize()
        return copy


def every_eighth(max_batch: int) -> list[int]:
    """Batch sizes worth a graph: 1, 2, 4, the multiples of 8, and the largest."""
    return [n for n in (1, 2, 4, *range(8, max_batch, 8)) if n < max_batch] + [max_batch]


class DecodeGraphs:
    """Replays `forward` for batches of decode rows only.

    Padding rows have length 0, which attends to nothing, and write their latents to the null page.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        sizes: Sequence[int],
        max_pages: int,
        device: torch.device,
    ):
        self._forward = forward
        self.sizes = sorted(sizes)
        max_batch = self.sizes[-1]
        self._inputs = StepInputs(max_batch, max_pages, device)
        pinned = device.type == "cuda"
        self._out = [torch.empty(max_batch, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._turn = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._capture_all()

    def start(self, spans: Sequence[Span], after: Started | None = None) -> Started:
        """Starts a step for spans of one token each; the caller reads one step's tokens before it starts the
        step after the next. With `after` the tokens are those of that step, row by row.
        """
        n = len(spans)
        size = next(size for size in self.sizes if size >= n)
        self._inputs.set(spans, size, None if after is None else after.best)
        logits, best = self._replay(size)
        copy = self._out[self._turn][:n]
        self._turn = 1 - self._turn
        copy.copy_(best[:n], non_blocking=True)
        return Started(logits[:n], best[:n], (copy, self._mark()))

    def fits(self, spans: Sequence[Span]) -> bool:
        """Whether the spans are nothing but decode rows."""
        return len(spans) <= self.sizes[-1] and all(len(span.tokens) == 1 for span in spans)

    def _replay(self, size: int) -> tuple[Tensor, Tensor]:
        graph, logits, best = self._graphs[size]
        graph.replay()
        return logits, best

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def _capture_all(self) -> None:
        started = time.monotonic()
        for size in reversed(self.sizes):  # compiles what is compiled lazily, and sizes every scratch buffer
            greedy(self._forward(self._inputs.batch(size)))
        torch.cuda.synchronize()
        failures: list[BaseException] = []

        def capture() -> None:
            try:
                torch.cuda.current_blas_handle()  # by thread, too, and not to be created inside a capture
                pool = torch.cuda.graph_pool_handle()
                for size in reversed(self.sizes):
                    graph = torch.cuda.CUDAGraph()
                    with torch.inference_mode(), torch.cuda.graph(graph, pool=pool):
                        logits = self._forward(self._inputs.batch(size))
                        tokens = greedy(logits)
                    self._graphs[size] = graph, logits, tokens
            except BaseException as error:  # handed to the caller below
                failures.append(error)

        # A backend keeps its workspace by thread. On a new thread it allocates one inside the capture, from
        # the graphs' own memory pool, which lives as long as they do.
        thread = threading.Thread(target=capture, name="capture")
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        log.info("captured %d decode graphs in %.1f s", len(self.sizes), time.monotonic() - started)
