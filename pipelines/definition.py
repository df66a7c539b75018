"""A rendered pipeline definition, parsed: its steps, its parameters, what refers to what."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Problem:
    """What is wrong and where in the definition."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Definition:
    """A parsed definition with the lookups that checks need."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.document: dict[str, Any] = json.loads(text)

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Parameters by name."""
        return {parameter["Name"]: parameter for parameter in self.document.get("Parameters", [])}

    @cached_property
    def steps(self) -> dict[str, dict[str, Any]]:
        """All steps by name, those inside conditions too."""
        return {step["Name"]: step for step, _ in walk(self.document["Steps"])}

    def needs(self, step: dict[str, Any]) -> set[str]:
        """Names of the steps that a step names: by DependsOn or by a reference in its own arguments."""
        arguments = {
            key: value for key, value in step["Arguments"].items() if key not in ("IfSteps", "ElseSteps")
        }
        named = {match.group(1) for get in gets(arguments) if (match := re.match(r"Steps\.([^.\[]+)", get))}
        return named | {one if isinstance(one, str) else one["Step"] for one in step.get("DependsOn", [])}


def walk(
    steps: list[dict[str, Any]], parent: str | None = None
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Every step with the name of the condition step around it."""
    for step in steps:
        yield step, parent
        for branch in ("IfSteps", "ElseSteps"):
            yield from walk(step["Arguments"].get(branch, []), step["Name"])


def gets(value: Any) -> Iterator[str]:
    """Every {"Get": ...} in a value."""
    if isinstance(value, dict):
        if isinstance(value.get("Get"), str):
            yield value["Get"]
        for one in value.values():
            yield from gets(one)
    elif isinstance(value, list):
        for one in value:
            yield from gets(one)
