"""Decode steps captured as CUDA graphs, one for each padded batch size: a step is a copy and a launch."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from container.serving.batch import Batch, Rows, Span
from container.serving.cache import NULL_PAGE, PAGE
from container.serving.fused import greedy

log = logging.getLogger(__name__)
NULL_SLOT = NULL_PAGE * PAGE


class StepInputs:
    """The inputs of a step of decode rows at fixed addresses, in one buffer that one copy fills.

    Only what changed since the step before is written again: a sequence that stays in its row costs a few
    numbers, not its page table.
    """

    def __init__(self, max_batch: int, max_pages: int, device: torch.device):
        # 8-byte words: tokens, positions and slots, then the 4-byte lengths and page tables
        self._head = 3 * max_batch + -(-max_batch // 2)
        words = self._head + -(-max_batch * max_pages // 2)
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(words, dtype=torch.int64, device=device)
        self._max_batch, self._max_pages = max_batch, max_pages
        on_host = [part.numpy() for part in self._parts(self._host)]
        self._tokens, self._positions, self._slots, self._lengths, self._table = on_host
        self._slots[:] = NULL_SLOT
        self._held: list[tuple[Sequence[int] | None, int]] = [(None, 0)] * max_batch
        self._device.copy_(self._host)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n = self._max_batch
        tail = buffer[3 * n :].view(torch.int32)
        start = 2 * (self._head - 3 * n)
        table = tail[start : start + n * self._max_pages].view(n, self._max_pages)
        return buffer[:n], buffer[n : 2 * n], buffer[2 * n : 3 * n], tail[:n], table

    def batch(self, size: int) -> Batch:
        """The first `size` rows on the device."""
        tokens, positions, slots, lengths, table = (part[:size] for part in self._parts(self._device))
        return Batch(tokens, positions, slots, Rows(table, lengths), [], None)

    def set(self, spans: Sequence[Span], size: int) -> None:
        """Makes the first rows those of spans of one token and the others up to `size` empty ones."""
        for row, span in enumerate(spans):
            pages, position = span.pages, span.start
            self._tokens[row] = span.tokens[0]
            self._positions[row] = position
            self._slots[row] = pages[position // PAGE] * PAGE + position % PAGE
            self._lengths[row] = position + 1
            held, count = self._held[row]
            if held is not pages or count > len(pages):
                count = 0
            if count < len(pages):
                self._table[row, count : len(pages)] = pages[count:]
                self._held[row] = pages, len(pages)
        n = len(spans)
        self._slots[n:size] = NULL_SLOT
        self._lengths[n:size] = 0
        words = self._head + -(-size * self._max_pages // 2)
        self._device[:words].copy_(self._host[:words], non_blocking=True)


class DecodeGraphs:
    """Replays `forward` for batches of decode rows only.

    Padding rows have length 0, which attends to nothing, and write their latents to the null page.
    """

    def __init__(
        self, forward: Callable[[Batch], Tensor], max_batch: int, max_pages: int, device: torch.device
    ):
        self._forward = forward
        self.sizes = [n for n in (1, 2, 4, *range(8, max_batch, 8)) if n < max_batch] + [max_batch]
        self._inputs = StepInputs(max_batch, max_pages, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._capture_all()

    def __call__(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Float32 logits and `greedy` of them for spans of one token each; valid until the next call, before
        which the caller must have waited for the result."""
        n = len(spans)
        size = next(size for size in self.sizes if size >= n)
        self._inputs.set(spans, size)
        graph, logits, tokens = self._graphs[size]
        graph.replay()
        return logits[:n], tokens[:n]

    def fits(self, spans: Sequence[Span]) -> bool:
        """Whether the spans are nothing but decode rows."""
        return len(spans) <= self.sizes[-1] and all(len(span.tokens) == 1 for span in spans)

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
