"""What a model's MLflow input example says: its texts, and the prompt to ask the endpoint with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT_CHARACTERS = 512
_WRAPPERS = ("prompt", "inputs", "dataframe_split", "dataframe_records", "instances")


def prompt_of(example: Any) -> str | None:
    """The first prompt of an input example, cut to PROMPT_CHARACTERS; None where it holds no single text.

    Taken are a text, a list of them, the forms of an MLflow server's request (dataframe_split,
    dataframe_records, inputs, instances; params beside them are left out), a table with a column `prompt` or
    with one column, and an OpenAI completions request.
    """
    text = _first(example)
    if text is None:
        return None
    # JSON may hold half a surrogate pair, which no tokenizer takes
    text = text.encode(errors="ignore").decode()[:PROMPT_CHARACTERS]
    return text if text.strip() else None


def _first(example: Any) -> str | None:
    if isinstance(example, str):
        return example
    if isinstance(example, Mapping):
        if isinstance(example.get("columns"), list) and "data" in example:
            return _first_of_table(example["columns"], example["data"])
        for key in _WRAPPERS:
            if key in example:
                return _first(example[key])
        return _first(next(iter(example.values()))) if len(example) == 1 else None
    if isinstance(example, Sequence) and example:
        return _first(example[0])
    return None


def _first_of_table(columns: list[Any], rows: Any) -> str | None:
    if not isinstance(rows, list) or not rows:
        return None
    if len(columns) > 1 and "prompt" not in columns:
        return None
    column = columns.index("prompt") if "prompt" in columns else 0
    row = rows[0] if isinstance(rows[0], list) else []
    return _first(row[column]) if column < len(row) else None


def texts(example: Any) -> list[str]:
    """Every text inside an input example (dataframe split, list, mapping), column names left out."""
    if isinstance(example, str):
        return [example]
    if isinstance(example, Mapping):
        return texts(example["data"]) if "data" in example else texts(list(example.values()))
    return [text for one in example for text in texts(one)] if isinstance(example, Sequence) else []
