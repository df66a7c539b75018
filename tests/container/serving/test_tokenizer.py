"""Streaming text: pieces join to the whole, and a stop string never leaks."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container.serving.tokenizer import Detokenizer, Tokenizer, TokenizerMissing


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
    assert "".join(parts) == detokenizer.text


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
