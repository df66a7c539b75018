"""The JSON of one request's answer in OpenAI's forms, whole or as the events of a stream."""

import random
import time
from collections import Counter
from collections.abc import Sequence as Many
from typing import Any

from container.serving.sequence import Logprob, Sequence
from container.serving.tokenizer import Tokenizer


class Answer:
    """Builds it. The sequences of a request are `n` completions of its first prompt, then of the next one.

    `token_ids` adds them to every choice.
    """

    def __init__(self, chat: bool, model: str, tokenizer: Tokenizer, n: int = 1, token_ids: bool = False):
        self.chat, self.model, self.tokenizer = chat, model, tokenizer
        self.n, self.token_ids = n, token_ids
        # not from the system's randomness: reading it lets go of the interpreter just when the engine starts
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(128):032x}"
        self.created = int(time.time())
        self._begun: set[int] = set()  # the choices of a stream whose role was told
        self._characters: Counter[int] = Counter()  # of the tokens in each choice's log probabilities so far

    def whole(self, sequences: Many[Sequence]) -> dict[str, Any]:
        choices = []
        for index, s in enumerate(sequences):
            text = s.detokenizer.text
            choice: dict[str, Any] = {"index": index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choice["finish_reason"] = s.finish_reason
            wanted = s.sampling.logprobs is not None
            choice["logprobs"] = self._logprobs(index, s.logprobs) if wanted else None
            if self.token_ids:
                choice["token_ids"] = s.output
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage(sequences)}

    def chunk(
        self, index: int, sequence: Sequence, text: str, new: slice, reason: str | None
    ) -> dict[str, Any]:
        """A stream's event: `text` and the `new` of the tokens of sequence `index`."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["delta"] = {"content": text} if text else {}
            if index not in self._begun:  # once: clients join what the deltas hold
                self._begun.add(index)
                choice["delta"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice["finish_reason"] = reason
        if sequence.sampling.logprobs is not None:
            choice["logprobs"] = self._logprobs(index, sequence.logprobs[new])
        if self.token_ids:
            choice["token_ids"] = sequence.output[new]
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice]}

    def final_usage(self, sequences: Many[Sequence]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self._usage(sequences)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, sequences: Many[Sequence]) -> dict[str, Any]:
        """Token counts, each prompt once; cached_tokens are prompt tokens whose latents were in the cache."""
        first = sequences[:: self.n]
        prompt = sum(len(s.prompt) for s in first)
        completion = sum(len(s.output) for s in sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(s.reused for s in first)},
        }

    def _logprobs(self, index: int, entries: Many[Logprob]) -> dict[str, Any]:
        name = self.tokenizer.token
        if self.chat:
            content = [
                {
                    **self._named(e.token_id, e.logprob),
                    "top_logprobs": [self._named(t, p) for t, p in e.top],
                }
                for e in entries
            ]
            return {"content": content}
        return {
            "tokens": [name(e.token_id) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{name(t): p for t, p in e.top} for e in entries],
            "text_offset": [self._place(index, e.token_id) for e in entries],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {
            "token": self.tokenizer.token(token),
            "logprob": logprob,
            "bytes": None if data is None else list(data),
        }

    def _place(self, index: int, token: int) -> int:
        """Where the next token of a choice begins in its text, in characters."""
        place = self._characters[index]
        # a character is counted with its first byte
        data = self.tokenizer.token_bytes(token) or b""
        self._characters[index] += sum(byte & 0xC0 != 0x80 for byte in data)
        return place
