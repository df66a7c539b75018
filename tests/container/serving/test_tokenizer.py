"""Streaming text: pieces join to the whole, a stop string never leaks; conversations as in transformers."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container.serving.chat_template import ChatTemplateError
from container.serving.config_json import NotMlaModel
from container.serving.tokenizer import Detokenizer, Tokenizer, TokenizerBroken, TokenizerMissing


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer(tiny_folder / "tokenizer.json")


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    out = []
    for token in ids:
        out.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*out, detokenizer.finish()], detokenizer


@given(text=st.text(max_size=40))
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    parts, detokenizer = pieces(tokenizer, ids)
    assert "".join(parts) == text == detokenizer.text


@given(data=st.binary(max_size=24))
def test_any_bytes_give_text_as_long_as_they_last(tokenizer: Tokenizer, data: bytes) -> None:
    parts, detokenizer = pieces(tokenizer, list(data))
    assert "".join(parts) == detokenizer.text == tokenizer.decode(list(data))


def test_tokens_that_keep_ending_inside_of_characters(tokenizer: Tokenizer) -> None:
    # four tokens that end in no whole character, the last of which begins one
    ids = [*"你".encode(), 0xF0, 0xF0, 0xF0, *"😀".encode()]
    parts, _ = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    parts, detokenizer = pieces(tokenizer, tokenizer.encode(text), tuple(stop))
    # the text up to where the first stop string is completed, without that string
    ends = {text.find(s) + len(s): text.find(s) for s in stop if s in text}
    expected = text
    if ends:
        first = min(ends)
        expected = text[: min(text.find(s) for s in stop if 0 <= text.find(s) <= first - len(s))]
    assert "".join(parts) == detokenizer.text == expected
    assert detokenizer.stopped == bool(ends)


def test_encoding_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    text = "some words of a text that is long " * 50_000
    started, ended, between = threading.Event(), threading.Event(), 0

    def work() -> None:
        started.set()
        tokenizer.encode(text)
        ended.set()

    threading.Thread(target=work).start()
    started.wait()
    while not ended.wait(0.005):
        between += 1
    assert between > 5  # held back for all of it, this thread would hardly count


def test_holds_a_character_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    parts, _ = pieces(tokenizer, list("é€".encode()))
    assert parts == ["", "é", "", "", "€", ""]


def test_without_a_tokenizer_only_text_is_refused() -> None:
    missing = Tokenizer(None)
    with pytest.raises(TokenizerMissing):
        missing.encode("x")
    assert pieces(missing, [1, 2])[0] == ["", "", ""]


def test_chat_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat_prompt([{"role": "user", "content": "hi"}])
    assert bytes(ids).decode() == "hi\n\n"


# what published templates lean on: special tokens, `{% break %}`, errors of their own, JSON that keeps its <
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'stop' %}{% break %}{% endif %}
{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ m.role | capitalize }}: {{ {'text': m.content} | tojson(separators=(',', ':')) }}
{% if m.role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


def added(content: str) -> dict[str, Any]:
    """A special token as DeepSeek's own tokenizer_config.json has it."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False}


@pytest.fixture
def chat_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer with TEMPLATE, of DeepSeek's form."""
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": added("<|begin|>"),
        "eos_token": added("<|end|>"),
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def rewrite(folder: Path, **change: Any) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return Tokenizer(folder / "tokenizer.json")


def test_a_conversation_is_that_of_transformers(chat_folder: Path) -> None:
    import transformers

    messages = [
        {"role": "user", "content": "a < b & 你好"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so?"},
        {"role": "stop", "content": "unseen"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    got = Tokenizer(chat_folder / "tokenizer.json").chat_prompt(messages)
    assert got == expected
    assert (got[0], got.count(257)) == (256, 1)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    assert rewrite(chat_folder, chat_template=named).chat_prompt(messages) == expected


def test_what_a_template_does_not_take(chat_folder: Path) -> None:
    messages = [{"role": "tool", "content": "5"}]
    with pytest.raises(ChatTemplateError, match="does not take these messages: no tools here"):
        Tokenizer(chat_folder / "tokenizer.json").chat_prompt(messages)
    broken = rewrite(chat_folder, chat_template="a\n{% for %}")
    with pytest.raises(ChatTemplateError, match="broken in line 2"):
        broken.chat_prompt(messages)
    assert broken.encode("a") == [97]
    with pytest.raises(ChatTemplateError, match="TypeError"):
        rewrite(chat_folder, chat_template="{{ messages[0].content + 1 }}").chat_prompt(messages)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        rewrite(chat_folder, chat_template=None).chat_prompt(messages)


def test_broken_files_are_named(chat_folder: Path) -> None:
    (chat_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(NotMlaModel, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer(chat_folder / "tokenizer.json")
    (chat_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerBroken, match=r"tokenizer\.json cannot be read"):
        Tokenizer(chat_folder / "tokenizer.json")


def test_tokens_of_log_probabilities(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token(i) for i in (97, 32, 10, 0xF0, 256, 5000)] == [
        "a", " ", "\n", "bytes:\\xf0", "<|begin|>", "5000",
    ]  # fmt: skip
    assert tokenizer.token_bytes(0xF0) == b"\xf0"
    assert tokenizer.token_bytes(256) == b"<|begin|>"
    assert tokenizer.token_bytes(5000) is None
    assert Tokenizer(None).token(7) == "7"
