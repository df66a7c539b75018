"""One request's state inside the engine, and how it wants its tokens chosen."""

import reprlib
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

import torch

from container.serving.tokenizer import Detokenizer

LONGEST_STOP = 256


class BadRequest(ValueError):
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary.

    With `fit` max_tokens is no more than what the model's limit leaves after the prompt, instead of an error.
    logprobs: None for none, else how many alternatives to report beside the chosen token.
    Raises BadRequest naming the value that is out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    fit: bool = False

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature <= 100, "between 0 and 100")
        # a step holds those of all its rows in one tensor, and a number that is too large would end them all
        self._check("top_k", 0 <= self.top_k < 1 << 31, f"between 0 and {(1 << 31) - 1}")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit whole number")
        # the text is held against them at every token, in everybody's step: with 20,000 characters for 0.2 s
        short = all(1 <= len(s) <= LONGEST_STOP for s in self.stop)
        self._check(
            "stop", len(self.stop) <= 16 and short, f"at most 16 texts of 1 to {LONGEST_STOP} characters"
        )
        self._check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise BadRequest(f"{name} is {reprlib.repr(getattr(self, name))}, expected {expected}", name)


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Logprob:
    """Natural log probability of the chosen token, and of the most likely ones, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """A prompt and the tokens generated so far. `computed` tokens have their latents in `pages`."""

    id: int
    prompt: list[int]
    sampling: Sampling
    detokenizer: Detokenizer
    generator: torch.Generator | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    state: State = State.WAITING
    finish_reason: str | None = None  # stop, length, abort, error
    error: str | None = None
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # hashes of the full pages of prompt + output
    computed: int = 0
    reused: int = 0  # prompt tokens found in the cache at the first admission
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids start..end of prompt and output together."""
        n = len(self.prompt)
        if start >= n:
            return self.output[start - n : end - n]
        return self.prompt[start:end] + self.output[: max(0, end - n)]

    def accept(self, token: int, logprob: "Logprob | None", eos_token_ids: Collection[int]) -> "Step":
        """Takes the next token: its text, and whether it ends the sequence."""
        self.last_token = time.monotonic()
        if self.first_token is None:
            self.first_token = self.last_token
        self.output.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = token in eos_token_ids and not self.sampling.ignore_eos
        text = "" if ended else self.detokenizer.push(token)
        reason = None
        if ended or self.detokenizer.stopped:
            reason = "stop"
        elif len(self.output) >= self.sampling.max_tokens:
            reason = "length"
        if reason:
            text += self.detokenizer.finish()
            # a stop string may have been completed by the text held back
            self.finish_reason = "stop" if self.detokenizer.stopped else reason
        return Step(self, token, text, self.finish_reason)


@dataclass(frozen=True)
class Step:
    """What one engine step did for one sequence. `token_id` is None when it ended without a token."""

    sequence: Sequence
    token_id: int | None
    text: str
    finish_reason: str | None
