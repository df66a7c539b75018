"""Decode steps captured as CUDA graphs, one for each padded batch size: a step is then a single launch."""

import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from container.serving.batch import Batch, Rows
from container.serving.cache import NULL_PAGE, PAGE

log = logging.getLogger(__name__)


class DecodeGraphs:
    """Replays `forward` for batches of decode rows only.

    Padding rows have length 0, which attends to nothing, and write their latents to the null page.
    """

    def __init__(
        self, forward: Callable[[Batch], Tensor], max_batch: int, max_pages: int, device: torch.device
    ):
        self._forward = forward
        self.sizes = [n for n in (1, 2, 4, *range(8, max_batch, 8)) if n < max_batch] + [max_batch]

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tokens, self._positions = buffer(max_batch), buffer(max_batch)
        self._slots = buffer(max_batch)
        self._slots.fill_(NULL_PAGE * PAGE)
        self._table = buffer(max_batch, max_pages, dtype=torch.int32)
        self._lengths = buffer(max_batch, dtype=torch.int32)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._capture_all()

    def __call__(self, batch: Batch) -> Tensor:
        """Logits of the batch's rows, valid until the next call."""
        n = batch.rows.count
        size = next(size for size in self.sizes if size >= n)
        table = batch.rows.block_table
        self._tokens[:n].copy_(batch.tokens)
        self._positions[:n].copy_(batch.positions)
        self._slots[:n].copy_(batch.slots)
        self._table[:n, : table.shape[1]].copy_(table)
        self._lengths[:n].copy_(batch.rows.lengths)
        if size > n:
            self._slots[n:size].fill_(NULL_PAGE * PAGE)
            self._lengths[n:size].zero_()
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:n]

    def fits(self, batch: Batch) -> bool:
        """Whether the batch holds nothing but decode rows whose logits are all wanted."""
        return not batch.chunks and batch.logit_rows is None and batch.rows.count <= self.sizes[-1]

    def _batch(self, size: int) -> Batch:
        rows = Rows(self._table[:size], self._lengths[:size])
        return Batch(self._tokens[:size], self._positions[:size], self._slots[:size], rows, [], None)

    def _capture_all(self) -> None:
        started = time.monotonic()
        for size in reversed(self.sizes):  # compiles what is compiled lazily, and sizes every scratch buffer
            self._forward(self._batch(size))
        torch.cuda.synchronize()
        failures: list[BaseException] = []

        def capture() -> None:
            try:
                torch.cuda.current_blas_handle()  # by thread, too, and not to be created inside a capture
                pool = torch.cuda.graph_pool_handle()
                for size in reversed(self.sizes):
                    graph = torch.cuda.CUDAGraph()
                    with torch.inference_mode(), torch.cuda.graph(graph, pool=pool):
                        logits = self._forward(self._batch(size))
                    self._graphs[size] = graph, logits
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
