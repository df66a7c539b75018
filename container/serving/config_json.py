"""Reading a checkpoint's JSON files: every error names the file and the key. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


class NotMlaModel(ValueError):
    """The folder holds no multi-head latent attention model that this engine can run; says why and where."""


class Keys:
    """Typed access to config.json: an error names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise NotMlaModel(f"{self.where}: key {key!r} is missing; this is no DeepSeek-V2/V3 model")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise NotMlaModel(f"{self.where}: {key} is {value!r}, expected a whole number of at least 0")
        return value

    def size(self, key: str, multiple: int = 1) -> int:
        value = self.count(key)
        if value < 1 or value % multiple:
            raise NotMlaModel(f"{self.where}: {key} is {value}, expected a positive multiple of {multiple}")
        return value

    def dtype(self) -> str:
        name = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise NotMlaModel(f"{self.where}: dtype is {name!r}, expected one of {', '.join(DTYPES)}")
        return name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises NotMlaModel."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotMlaModel(f"{path} does not exist; a checkpoint folder needs it") from None
    except ValueError as error:
        raise NotMlaModel(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise NotMlaModel(f"{path} holds {type(raw).__name__}, expected an object")
    return raw
