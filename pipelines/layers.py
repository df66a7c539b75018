"""Configuration files read and laid over each other, with the file that a person has to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from pipelines.errors import UserError, choose


class Layers:
    """A file, a file over it, and single keys over both."""

    def __init__(self, base: Path, overlay: Path, overrides: Mapping[str, object]) -> None:
        """`overrides`: dotted keys to values. Raises UserError for a file that is no YAML mapping."""
        self._overlay = str(overlay)
        self._layers = [(str(path), _read(path)) for path in (base, overlay)]
        self._layers += [(f"override {key}", _nest(key, value)) for key, value in overrides.items()]

    def merged(self, model: type[BaseModel]) -> dict[str, Any]:
        """All layers as one mapping. Raises UserError for a key that `model` does not have."""
        merged: dict[str, Any] = {}
        for where, layer in self._layers:
            _refuse_unknown(model, layer, where)
            merged = _merge(merged, layer)
        return merged

    def origin(self, *path: str) -> str:
        """The topmost layer that holds the key, else the file on top: where a person has to look."""
        for where, layer in reversed(self._layers):
            value: Any = layer
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return where
        return self._overlay


class _EachKeyOnce(yaml.SafeLoader):
    """YAML whose mappings hold a key once: a block pasted below another would silently replace it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key.value}' stands here a second time", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except FileNotFoundError:
        raise UserError("configuration file is missing", str(path), "restore it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            "not valid YAML", f"{path}: {' '.join(str(error).split())}", "correct the file"
        ) from None
    if not isinstance(content, dict):
        raise UserError("not a mapping of keys to values", str(path), "start it with 'bucket: …'")
    return content


def _nest(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _refuse_unknown(model: type[BaseModel], layer: Mapping[str, Any], where: str, above: str = "") -> None:
    fields = {name: field for name, field in model.model_fields.items() if name != "environment"}
    for key, value in layer.items():
        if key not in fields:
            raise UserError(f"unknown key '{above}{key}'", where, choose(str(key), fields))
        for kind in (fields[key].annotation, *get_args(fields[key].annotation)):
            if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
                _refuse_unknown(kind, value, where, f"{above}{key}.")
