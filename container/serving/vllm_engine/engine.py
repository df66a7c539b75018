"""The engine interface on top of vLLM: token ids in, token ids out; text, stop strings and errors stay ours.

vLLM runs in processes of its own (its engine core, a worker for each GPU) and is driven by its synchronous
client, so the server's loop, streams and metrics are those of the native engine.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from container.serving.attention import PAGE
from container.serving.base_engine import BaseEngine
from container.serving.checkpoint import ModelConfig, find_checkpoint, find_tokenizer
from container.serving.sequence import Sequence, Step
from container.serving.tokenizer import Tokenizer
from container.serving.vllm_engine import plugin
from container.serving.vllm_engine.arguments import (
    VLLM,
    VllmOptions,
    check_settings,
    check_version,
    chosen_logprob,
    engine_arguments,
    process_environment,
    sampling_arguments,
)

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 2.0  # of what SageMaker leaves after the server's own drain
ENDED = {"stop": "stop", "length": "length", "abort": "abort"}  # vLLM's reasons; others are errors


class VllmEngine(BaseEngine):
    """A checkpoint served by vLLM with our kernel as its MLA decode attention. Build it with `load`."""

    def __init__(
        self,
        llm: Any,
        params: Callable[..., Any],
        config: ModelConfig,
        tokenizer: Tokenizer,
        kernel: str,
        stats: EngineStats,
    ):
        """llm: vLLM's LLMEngine; params: makes its SamplingParams, with new tokens as the form of outputs."""
        super().__init__(config, tokenizer, llm.model_config.max_model_len)
        self._llm, self._params, self._kernel, self._stats = llm, params, kernel, stats
        self._running: dict[str, Sequence] = {}
        self._refused: deque[Step] = deque()

    @classmethod
    def load(
        cls,
        model_dir: Path | str,
        kernel_dir: Path | str | None = None,
        *,
        backend: str = "auto",
        kv_cache_dtype: str = "bfloat16",
        options: VllmOptions | None = None,
    ) -> VllmEngine:
        """Starts vLLM's processes on the checkpoint found in `model_dir`; minutes for a large model.

        kernel_dir, backend: as for the native engine, `auto` being `hopper`. Raises RuntimeError when vLLM or
        this package's entry point is missing, ValueError for settings that vLLM or the kernel does not take.
        """
        options = options or VllmOptions()
        check_version()
        plugin.check_installed()
        checkpoint = find_checkpoint(Path(model_dir))
        config = ModelConfig.from_folder(checkpoint)
        check_settings(config, kv_cache_dtype, options)
        kernels = Path(kernel_dir) if kernel_dir else None
        kernel = plugin.kernel_backend(backend, kernels)
        # vLLM's processes find the kernel as those of a plain vLLM server would: by variables.
        os.environ.update(process_environment(kernel.name, kernels, os.environ))

        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        if not current_platform.is_cuda():
            raise RuntimeError("engine: vllm needs an NVIDIA GPU and finds none; serve with engine: native")
        started = time.monotonic()
        stats = EngineStats()
        arguments = EngineArgs(**engine_arguments(checkpoint, config, options))
        llm = LLMEngine.from_engine_args(
            arguments,
            usage_context=UsageContext.OPENAI_API_SERVER,  # a server's defaults, not a library's
            stat_loggers=[stats.logger],
            enable_multiprocessing=True,
        )
        stats.pages = llm.vllm_config.cache_config.num_gpu_blocks or 0
        log.info(
            "%s loaded by vLLM %s in %.1f s: kernel %s, cache of %d tokens, %d x %d GPUs",
            config.architecture,
            VLLM,
            time.monotonic() - started,
            kernel.name,
            stats.pages * PAGE,
            options.tensor_parallel,
            options.pipeline_parallel,
        )
        tokenizer = Tokenizer(find_tokenizer(checkpoint, Path(model_dir)))
        params = functools.partial(SamplingParams, output_kind=RequestOutputKind.DELTA)
        return cls(llm, params, config, tokenizer, kernel.name, stats)

    @property
    def backend(self) -> str:
        return self._kernel

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")  # vLLM draws in its own processes, from the seed

    @property
    def busy(self) -> bool:
        return bool(self._running or self._refused)

    @property
    def waiting(self) -> int:
        return max(0, len(self._running) - self._stats.running)

    def gauges(self) -> dict[str, float]:
        stats = self._stats
        return {
            "requests_running": min(stats.running, len(self._running)),
            "requests_waiting": self.waiting,
            "cache_pages": stats.pages,
            "cache_pages_used": round(stats.usage * stats.pages) if self._running else 0,
            "preemptions": stats.preemptions,
        }

    def enqueue(self, sequence: Sequence) -> None:
        name = str(sequence.id)
        prompt = {"type": "token", "prompt_token_ids": sequence.prompt}  # vLLM's TokensInput
        try:
            params = self._params(**sampling_arguments(sequence.sampling, self.config.eos_token_ids))
            self._llm.add_request(name, prompt, params)
        except ValueError as error:  # vLLM refuses what `prepare` let pass
            self._refused.append(_fail(sequence, f"vLLM refuses the request: {error}"))
            return
        self._running[name] = sequence

    def abort(self, sequence: Sequence) -> None:
        if self._running.pop(str(sequence.id), None) is not None:
            sequence.finish_reason = sequence.finish_reason or "abort"
            self._llm.abort_request([str(sequence.id)])

    def step(self) -> list[Step]:
        if self._refused:
            return [self._refused.popleft()]
        return [step for output in self._llm.step() for step in self._take(output)]

    def close(self) -> None:
        self._llm.engine_core.shutdown(timeout=SHUTDOWN_SECONDS)

    def profile(self, on: bool) -> None:
        """Starts or ends the profiler that vLLM's profiler_config names, in its workers."""
        if on:
            self._llm.start_profile()
        else:
            self._llm.stop_profile()

    def _take(self, output: Any) -> list[Step]:
        """The steps of one request's new tokens: more than one when they came while the last was handled."""
        sequence = self._running.get(output.request_id)
        if sequence is None:
            return []  # aborted, or ended by a stop string, while this was under way
        if output.num_cached_tokens is not None and sequence.first_token is None:
            sequence.reused = output.num_cached_tokens
        (completion,) = output.outputs
        tokens = completion.token_ids
        # Without new tokens vLLM repeats the log probabilities of all of them.
        logprobs = completion.logprobs if tokens and completion.logprobs else [None] * len(tokens)
        steps: list[Step] = []
        for token, choices in zip(tokens, logprobs, strict=True):
            logprob = chosen_logprob(token, choices, sequence.sampling.logprobs)
            steps.append(sequence.accept(token, logprob, self.config.eos_token_ids))
            if sequence.finish_reason:
                break
        if output.finished:
            del self._running[output.request_id]
            if not sequence.finish_reason:
                steps.append(_end(sequence, completion.finish_reason))
        elif sequence.finish_reason:  # by a stop string, which vLLM does not know
            self.abort(sequence)
        return steps


class EngineStats:
    """vLLM's latest figures. `logger` is the factory that vLLM's engine asks for."""

    def __init__(self) -> None:
        self.running = self.preemptions = self.pages = 0
        self.usage = 0.0  # of the pages, 0 to 1

    def logger(self, vllm_config: Any, engine_index: int = 0) -> EngineStats:
        return self

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; there is nothing to log."""

    def log(self) -> None:
        """Part of vLLM's interface; the server reports by itself."""


def _end(sequence: Sequence, reason: str | None) -> Step:
    """A last step without a token, for an end that only vLLM knows."""
    if (known := ENDED.get(reason or "")) is None:
        return _fail(sequence, f"vLLM ended the request: {reason}")
    sequence.finish_reason = known
    return Step(sequence, None, sequence.detokenizer.finish(), known)


def _fail(sequence: Sequence, message: str) -> Step:
    sequence.error, sequence.finish_reason = message, "error"
    return Step(sequence, None, "", "error")
