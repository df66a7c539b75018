"""What every engine does alike, whoever runs the model: checks prompts, and completes a batch of them."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import cast

import torch

from container.serving.checkpoint import ModelConfig
from container.serving.sequence import BadRequest, Logprob, Sampling, Sequence, Step
from container.serving.tokenizer import Detokenizer, Tokenizer

MAX_CHARACTERS_A_TOKEN = 64  # tokens are seldom longer than a long word


@dataclass(frozen=True)
class Completion:
    """What `generate` gives for one prompt. finish_reason: stop, length or error, which `error` explains."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Logprob]
    error: str | None = None


class BaseEngine(ABC):
    """A model that advances sequences step by step. `step` is called by one thread, the rest by any."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, max_model_len: int):
        self.config, self.tokenizer, self.max_model_len = config, tokenizer, max_model_len
        self._ids = itertools.count()

    @property
    @abstractmethod
    def backend(self) -> str:
        """Name of the kernel backend that decodes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the sequences' random generators live."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether `step` has anything to do."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Sequences that were queued and do not run yet."""

    @abstractmethod
    def gauges(self) -> dict[str, float]:
        """The present state, for the metrics: requests running and waiting, pages, preemptions."""

    @abstractmethod
    def enqueue(self, sequence: Sequence) -> None:
        """Queues a prepared sequence. Its faults come as a step of it, never as an exception."""

    @abstractmethod
    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence early and frees what it holds; does nothing if it has finished."""

    @abstractmethod
    def step(self) -> list[Step]:
        """Advances the running sequences and tells what came of it. An exception ends the engine."""

    def close(self) -> None:  # noqa: B027, an engine without processes of its own has nothing to end
        """Ends what the engine started; it is not used after that."""

    def add(self, prompt: str | Many[int], sampling: Sampling) -> Sequence:
        """Queues a prompt (text or token ids). Raises BadRequest when it cannot be served at all."""
        sequence = self.prepare(prompt, sampling)
        self.enqueue(sequence)
        return sequence

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: about a second for a million characters, other threads go on meanwhile."""
        if len(text) > MAX_CHARACTERS_A_TOKEN * self.max_model_len:
            raise BadRequest(
                f"prompt of {len(text)} characters is over this model's {self.max_model_len} tokens",
                "prompt",
                "context_length_exceeded",
            )
        return self.tokenizer.encode(text)

    def prepare(self, prompt: str | Many[int], sampling: Sampling) -> Sequence:
        """Checks a prompt and makes its sequence without queueing it; never waits for a running step."""
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise BadRequest("prompt is empty; give at least one token", "prompt")
        bad = min(ids) if min(ids) < 0 else max(ids)
        if not 0 <= bad < self.config.vocab_size:
            raise BadRequest(
                f"prompt has token id {bad}, the vocabulary has 0..{self.config.vocab_size - 1}", "prompt"
            )
        if sampling.fit and len(ids) < self.max_model_len:
            room = self.max_model_len - len(ids)
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        if len(ids) + sampling.max_tokens > self.max_model_len:
            raise BadRequest(
                f"prompt of {len(ids)} tokens plus max_tokens {sampling.max_tokens} is over this model's "
                f"limit of {self.max_model_len} tokens",
                "max_tokens" if len(ids) < self.max_model_len else "prompt",
                "context_length_exceeded",
            )
        if sampling.stop and not self.tokenizer.available:
            raise BadRequest("stop needs a tokenizer and the checkpoint has none", "stop")
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(self.device)
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        detokenizer = Detokenizer(self.tokenizer, sampling.stop)
        return Sequence(next(self._ids), ids, sampling, detokenizer, generator)

    def generate(
        self,
        prompts: Many[str] | Many[Many[int]],
        max_tokens: int = 16,
        temperature: float = 0.0,
        **sampling: object,
    ) -> list[Completion]:
        """Completes all prompts in one continuous batch; `sampling` as the fields of Sampling.

        With a seed, prompt i is sampled with seed + i. Threads may call this at the same time: their prompts
        share steps. Raises BadRequest, before anything runs, for a prompt that cannot be served.
        """
        seed = cast("int | None", sampling.pop("seed", None))
        sequences = [
            self.prepare(
                prompt,
                Sampling(
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=None if seed is None else seed + i,
                    **sampling,  # type: ignore[arg-type]
                ),
            )
            for i, prompt in enumerate(cast("Many[str | Many[int]]", prompts))
        ]
        queued: list[Sequence] = []
        try:
            for sequence in sequences:
                self.enqueue(sequence)
                queued.append(sequence)
            for sequence in sequences:
                while sequence.finish_reason is None:
                    self.step()
        finally:
            for sequence in queued:  # of an interrupted call; nothing happens to the finished ones
                self.abort(sequence)
        return [
            Completion(s.detokenizer.text, s.output, s.finish_reason or "error", s.logprobs, s.error)
            for s in sequences
        ]
