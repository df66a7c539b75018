"""The inference engine: one model, one paged cache, and a step that advances every running sequence."""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from container.serving.attention import DecodeAttention
from container.serving.base_engine import BaseEngine
from container.serving.batch import Batch, Span, make_batch
from container.serving.cache import PAGE, LatentCache, PageAllocator, pages_that_fit
from container.serving.checkpoint import ModelConfig, find_checkpoint, find_tokenizer
from container.serving.fused import greedy
from container.serving.graphs import DecodeGraphs, Started, every_eighth
from container.serving.model import Model
from container.serving.sampler import Choice, choose
from container.serving.scheduler import Planned, Scheduler
from container.serving.sequence import BadRequest, Sampling, Sequence, State, Step
from container.serving.tokenizer import Tokenizer
from container.serving.weights import Checkpoint, Loader

log = logging.getLogger(__name__)

CACHE_DTYPES = ("bfloat16", "float16", "float32", "fp8_ds_mla")
SCORE_ROWS = 256  # rows of one pass when a prompt is scored through the decode kernel


@dataclass(frozen=True)
class Options:
    """Sizes of an engine. cache_tokens None takes a share of memory, at most what the requests can use;
    graph_sizes None captures the batch sizes 1, 2, 4 and every eighth up to max_batch."""

    max_batch: int = 64
    step_tokens: int = 512
    max_model_len: int | None = None
    cache_tokens: int | None = None
    num_threads: int | None = None
    cuda_graphs: bool = True
    graph_sizes: tuple[int, ...] | None = None


class Engine(BaseEngine):
    """Generates with continuous batching. `step` is called by one thread; the other methods by any.

    Build it with `Engine.load`. For a plain batch of prompts use `generate`; a server adds sequences and
    calls `step` in a loop.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, cache: LatentCache, options: Options, limit: int):
        super().__init__(model.config, tokenizer, limit)
        self.model, self.cache, self.options = model, cache, options
        self.allocator = PageAllocator(cache.num_pages)
        self.scheduler = Scheduler(self.allocator, options.max_batch, options.step_tokens)
        self._lock = threading.RLock()  # one step, or one change of the sequences, at a time
        self._graphs: DecodeGraphs | None = None
        self._flight: _Flight | None = None  # a step that was started and not finished
        if model.device.type == "cuda" and options.cuda_graphs:
            pages = -(-limit // PAGE)
            sizes = options.graph_sizes or every_eighth(options.max_batch)
            self._graphs = DecodeGraphs(self._eager, sizes, pages, model.device)

    @classmethod
    def load(
        cls,
        model_dir: Path | str,
        kernel_dir: Path | str | None = None,
        *,
        backend: str = "auto",
        kv_cache_dtype: str = "bfloat16",
        device: str | torch.device | None = None,
        dtype: str | None = None,
        options: Options | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> "Engine":
        """Loads the checkpoint found in `model_dir` (an MLflow model folder or the checkpoint itself).

        kernel_dir holds compiled kernels (see kernels.package); None looks in the build cache. `backend`
        names one of kernels' backends or "auto". `dtype` of weights and arithmetic defaults to the
        checkpoint's. Raises NotMlaModel, WeightError, or ValueError for a backend or cache dtype that
        cannot be used.
        """
        started = time.monotonic()
        options = options or Options()
        if kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype is {kv_cache_dtype!r}, expected one of {', '.join(CACHE_DTYPES)}"
            )
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        checkpoint = find_checkpoint(Path(model_dir))
        config = ModelConfig.from_folder(checkpoint)
        tokenizer = Tokenizer(find_tokenizer(checkpoint, Path(model_dir)))
        kind: torch.dtype = getattr(torch, dtype or config.dtype)
        kernels = Path(kernel_dir) if kernel_dir else None
        attention = DecodeAttention(backend, kernels, where, config, kind, kv_cache_dtype)
        limit = min(options.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        model = Model(config, Loader(Checkpoint(checkpoint, config.fp8_block), where, kind, progress), limit)
        most = options.max_batch * -(-limit // PAGE)
        if options.cache_tokens is None:
            pages = pages_that_fit(config.num_hidden_layers, most, attention, where)
        else:
            pages = max(1, -(-options.cache_tokens // PAGE))
        cache = LatentCache(config.num_hidden_layers, pages, attention, where)
        limit = min(limit, cache.num_pages * PAGE)
        log.info(
            "%s loaded in %.1f s on %s: backend %s, cache of %d tokens in %s",
            config.architecture,
            time.monotonic() - started,
            where,
            attention.name,
            cache.num_pages * PAGE,
            kv_cache_dtype,
        )
        return cls(model, tokenizer, cache, options, limit)

    @property
    def backend(self) -> str:
        return self.cache.attention.name

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    def gauges(self) -> dict[str, float]:
        return {
            "requests_running": len(self.scheduler.running),
            "requests_waiting": len(self.scheduler.waiting),
            "cache_pages": self.allocator.total,
            "cache_pages_used": self.allocator.used,
            "preemptions": self.scheduler.preemptions,
        }

    def enqueue(self, sequence: Sequence) -> None:
        """Waits for a running step."""
        with self._lock:
            self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Waits for a running step."""
        with self._lock:
            if sequence.state is not State.FINISHED:
                sequence.finish_reason = "abort"
                self.scheduler.remove(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Step]:
        """Runs one batch: a token for each decoding sequence, a chunk for prompts. Returns what came of it.

        An exception of the model ends the sequences of this batch with finish_reason "error", no others.
        """
        with self._lock:
            flight, self._flight = self._flight, None
            plan = flight.plan if flight is not None else self.scheduler.plan()
            if not plan:
                return []
            try:
                flight = flight or self._start(plan)
                self._flight = self._start_next(flight)
                return self._finish(flight)
            except Exception as error:
                log.exception("a step of %d sequences failed", len(plan))
                self._flight = None
                message = f"{type(error).__name__}: {error}"
                return [self._fail(p.sequence, message) for p in plan if p.sequence.state is State.RUNNING]

    def _start(self, plan: list[Planned]) -> "_Flight":
        spans, wanted = [], []
        for row, (sequence, count) in enumerate((p.sequence, p.count) for p in plan):
            start = sequence.computed
            spans.append(Span(sequence.tokens(start, start + count), start, sequence.pages))
            if start + count == sequence.length:
                wanted.append(row)
        sequences = [plan[row].sequence for row in wanted]
        graphs = self._graphs
        if graphs is not None and len(wanted) == len(spans) and graphs.fits(spans):
            return _Flight(plan, sequences, graphs.start(spans))
        logits = self._eager(make_batch(spans, self.model.device, wanted))
        return _Flight(plan, sequences, Started(logits, greedy(logits)))

    def _start_next(self, flight: "_Flight") -> "_Flight | None":
        """Starts the decode step after `flight` on its tokens while they are still on the device, so that the
        device need not wait for the host.

        Only where nothing comes in between: every running sequence is in it, decodes greedily and has a token
        left to make, and nobody waits. A sequence that then ends by a token or a stop string has run once
        more for nothing: what that wrote lies in pages that whoever gets them writes later, in stream order.
        """
        graphs, sequences = self._graphs, flight.sequences
        if graphs is None or not flight.started.follows or self.scheduler.waiting:
            return None
        if len(sequences) < len(self.scheduler.running) or not all(_goes_on(s) for s in sequences):
            return None
        spans = []
        for sequence in sequences:
            position = sequence.computed + 1  # the flight's own token is not counted yet
            if position // PAGE == len(sequence.pages):
                if not self.allocator.free:
                    return None
                sequence.pages += self.allocator.allocate(1)
            spans.append(Span((0,), position, sequence.pages))
        return _Flight(flight.plan, sequences, graphs.start(spans, after=flight.started))

    def _finish(self, flight: "_Flight") -> list[Step]:
        """Takes a step's tokens over; sequences that have ended since it was started are passed over."""
        for planned in flight.plan:
            if planned.sequence.state is State.RUNNING:
                self.scheduler.computed(planned)
        sequences = flight.sequences
        choices = choose(flight.started.logits, sequences, flight.started.tokens()) if sequences else []
        pairs = zip(sequences, choices, strict=True)
        return [self._advance(s, c) for s, c in pairs if s.state is State.RUNNING]

    def _eager(self, batch: Batch) -> Tensor:
        return self.model(batch, self.cache)

    def _advance(self, sequence: Sequence, choice: Choice) -> Step:
        token = choice.token_id
        if token is None:
            return self._fail(sequence, "the model gave NaN or infinite logits")
        step = sequence.accept(token, choice.logprob, self.config.eos_token_ids)
        if step.finish_reason:
            self.scheduler.remove(sequence)
        return step

    def _fail(self, sequence: Sequence, message: str) -> Step:
        sequence.error, sequence.finish_reason = message, "error"
        self.scheduler.remove(sequence)
        return Step(sequence, None, "", "error")

    def logits(self, token_ids: Many[int]) -> Tensor:
        """Float32 [len, vocabulary] on the CPU: logits after each token, each computed through the decode
        path (latents from the paged cache, the backend's kernel), as if the tokens had been decoded in turn.
        """
        ids = list(token_ids)
        if not 0 < len(ids) <= self.max_model_len:
            raise BadRequest(f"{len(ids)} tokens to score, expected 1..{self.max_model_len}")
        with self._lock:
            pages = self.allocator.allocate(-(-len(ids) // PAGE))
            try:
                parts = []
                for start in range(0, len(ids), SCORE_ROWS):
                    span = Span(ids[start : start + SCORE_ROWS], start, pages)
                    batch = make_batch([span], self.model.device, None, as_rows=True)
                    parts.append(self.model(batch, self.cache).cpu())
            finally:
                self.allocator.release(pages)
        return torch.cat(parts)

    def decode_step_times(
        self, context: int = 64, batch: int = 1, steps: int = 32, prefill: bool = True
    ) -> list[float]:
        """Milliseconds of each of `steps` decode steps of `batch` sequences of about `context` tokens.

        Without `prefill` the context's latents are whatever the cache holds: for a benchmark, where a decode
        step's time does not depend on their values.
        """
        context = min(context, self.max_model_len - steps - 2)
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(max_tokens=steps + 1, ignore_eos=True)
        sequences = []
        for _ in range(batch):
            prompt = torch.randint(self.config.vocab_size, (context,), generator=generator)
            sequences.append(self.add(prompt.tolist(), sampling))
        if not prefill:
            while self.scheduler.waiting:
                self.scheduler.plan()
                for sequence in self.scheduler.running:
                    sequence.computed = context - 1
        while any(s.length - s.computed > 1 for s in sequences):
            self.step()
        times = []
        while self.busy:
            start = time.perf_counter()
            self.step()
            times.append(1e3 * (time.perf_counter() - start))
        return times[-steps:]


@dataclass(frozen=True)
class _Flight:
    """A started step: what of which sequences it computes, and those whose next token it gives."""

    plan: list[Planned]
    sequences: list[Sequence]
    started: Started


def _goes_on(sequence: Sequence) -> bool:
    """Whether a sequence in flight wants another token unless this one ends it, whatever its logits."""
    s = sequence.sampling
    plain = s.temperature == 0 and s.logprobs is None
    return plain and sequence.state is State.RUNNING and len(sequence.output) + 1 < s.max_tokens
