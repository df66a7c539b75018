"""Text to token ids and back: a wrapper of a tokenizer.json, and the incremental detokenizer of a stream."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as _Tokenizer


class TokenizerMissing(ValueError):
    """Text was given or asked for, and the checkpoint has no tokenizer.json; token ids still work."""


class Tokenizer:
    """A Hugging Face tokenizer.json, with the special tokens and chat template of tokenizer_config.json.

    Built with path None it only refuses: every use of text raises TokenizerMissing.
    """

    def __init__(self, path: Path | None):
        self._inner = _Tokenizer.from_file(str(path)) if path else None
        config = path.with_name("tokenizer_config.json") if path else None
        self.config: dict[str, Any] = json.loads(config.read_text()) if config and config.is_file() else {}
        template = path.with_name("chat_template.jinja") if path else None
        if template and template.is_file():
            self.config["chat_template"] = template.read_text()
        source = self.config.get("chat_template")
        # the template comes with the model, so it runs sandboxed
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(source) if isinstance(source, str) else None

    @property
    def available(self) -> bool:
        return self._inner is not None

    @property
    def vocab_size(self) -> int:
        return self._need().get_vocab_size()

    def _need(self) -> _Tokenizer:
        if self._inner is None:
            raise TokenizerMissing("the checkpoint has no tokenizer.json; send token ids instead of text")
        return self._inner

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a text (a begin token)."""
        return self._need().encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._need().decode(list(ids), skip_special_tokens=True)

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation through the checkpoint's chat template. Raises TokenizerMissing."""
        self._need()
        if self._template is None:
            raise TokenizerMissing("the checkpoint has no chat template; use a prompt instead of messages")
        special = {k: v for k, v in self.config.items() if k.endswith("_token") and isinstance(v, str)}
        text = self._template.render(messages=messages, add_generation_prompt=True, **special)
        return self.encode(text, special=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's own name of one id, for logprobs; its number when there is no tokenizer."""
        name = self._inner.id_to_token(token_id) if self._inner else None
        return str(token_id) if name is None else name


class Detokenizer:
    """Turns tokens into text one at a time and watches for stop strings.

    Holds text back while it may still change: an unfinished UTF-8 sequence, or the beginning of a stop
    string.
    """

    CONTEXT = 6  # tokens decoded again before new ones, since a tokenizer may join or space neighbours

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._read = 0  # tokens whose text has been taken over
        self.text = ""
        self._sent = 0
        self.stopped = False

    @property
    def released(self) -> str:
        """The text given out so far by `push` and `finish`."""
        return self.text[: self._sent]

    def push(self, token_id: int) -> str:
        """Takes one token, returns the text that is now certain. Sets `stopped` at a stop string."""
        if not self._tokenizer.available:
            return ""
        self._ids.append(token_id)
        self._take(final=False)
        return self._release(final=False)

    def finish(self) -> str:
        """The text held back so far, once no more tokens come."""
        if not self._tokenizer.available or self.stopped:
            return ""
        self._take(final=True)
        return self._release(final=True)

    def _take(self, final: bool) -> None:
        start = max(0, self._read - self.CONTEXT)
        before = self._tokenizer.decode(self._ids[start : self._read])
        now = self._tokenizer.decode(self._ids[start:])
        if now.endswith("\ufffd") and not final and len(self._ids) - self._read < 4:
            return  # a character of UTF-8 has at most four bytes
        self.text += now[len(before) :]
        self._read = len(self._ids)

    def _release(self, final: bool) -> str:
        longest = max((len(s) for s in self._stop), default=0)
        begin = max(0, self._sent - longest)
        hits = [at for s in self._stop if (at := self.text.find(s, begin)) >= 0]
        if hits:
            self.stopped = True
            self.text = self.text[: min(hits)]
        end = len(self.text)
        if not self.stopped and not final:
            held = (
                size
                for s in self._stop
                for size in range(min(len(s) - 1, end), 0, -1)
                if self.text.endswith(s[:size])
            )
            end -= max(held, default=0)
        piece = self.text[self._sent : max(end, self._sent)]
        self._sent = max(end, self._sent)
        return piece
