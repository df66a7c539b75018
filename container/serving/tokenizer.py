"""Text to token ids and back: a wrapper of a tokenizer.json, and the incremental detokenizer of a stream."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers.decoders import ByteLevel

from container.serving.chat_template import ChatTemplate
from container.serving.config_json import read_json


class TokenizerBroken(ValueError):
    """tokenizer.json cannot be used; names it."""


class TokenizerMissing(ValueError):
    """Text was given or asked for, and the checkpoint has no tokenizer.json; token ids still work."""


class Tokenizer:
    """A Hugging Face tokenizer.json, with the special tokens and chat template of tokenizer_config.json.

    Built with path None it only refuses: every use of text raises TokenizerMissing. Building it raises
    TokenizerBroken, or NotMlaModel for tokenizer_config.json.
    """

    def __init__(self, path: Path | None):
        self._inner = _read(path) if path else None
        config = path.with_name("tokenizer_config.json") if path else None
        settings = read_json(config) if config and config.is_file() else {}
        template = path.with_name("chat_template.jinja") if path else None
        if template and template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        self._chat = ChatTemplate(settings)
        byte_level = self._inner is not None and isinstance(self._inner.decoder, ByteLevel)
        self._byte_of = _byte_letters() if byte_level else {}
        self._added = frozenset(self._inner.get_added_tokens_decoder()) if self._inner else frozenset()

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
        # a batch, since the library holds the interpreter for as long as it encodes a single text
        return self._need().encode_batch_fast([text], add_special_tokens=special)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._need().decode(list(ids), skip_special_tokens=True)

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the chat template. Raises TokenizerMissing, ChatTemplateError."""
        self._need()
        return self.encode(self._chat.render(messages), special=False)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The UTF-8 of one token, special ones included, perhaps a part of a character; None when unknown."""
        if self._inner is None or (name := self._inner.id_to_token(token_id)) is None:
            return None
        if token_id not in self._added and self._byte_of.keys() >= set(name):
            return bytes(self._byte_of[letter] for letter in name)
        return self._inner.decode([token_id], skip_special_tokens=False).encode()

    def token(self, token_id: int) -> str:
        """One token as log probabilities show it: its text, "bytes:\\xf0\\x9f" for a part of a character (as
        OpenAI has it), and its number when there is no tokenizer."""
        data = self.token_bytes(token_id)
        if data is None:
            return str(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _read(path: Path) -> _Tokenizer:
    try:
        return _Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerBroken(
            f"{path} cannot be read ({error}); save the tokenizer again, or remove it to serve token ids"
        ) from None


def _byte_letters() -> dict[str, int]:
    """The byte of each letter of a byte-level vocabulary: printable bytes are themselves, the rest 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


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
        self._open = 0  # characters at its end that were not: they may still become another one
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
        unfinished = now.endswith("\ufffd") and not final
        if unfinished and len(self._ids) - self._read < 4:
            return  # a character of UTF-8 has at most four bytes
        # tokens may go on ending inside of characters: what comes before the last of these is certain
        end = len(now) - unfinished
        self.text += now[len(before) - self._open : end]
        self._read, self._open = len(self._ids), int(unfinished)

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
