"""What a new pipeline definition changes against the deployed one, step by step. Texts in, facts out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.definition import gets, walk

# A Processing step is found in the cache by these parts of its request and by nothing else
# (docs.aws.amazon.com/sagemaker/latest/dg/pipelines-default-keys.html).
CACHE_KEY = ("AppSpecification", "Environment", "ProcessingInputs")
BRANCHES = ("IfSteps", "ElseSteps")
SHOWN = 60  # characters of a value

Kind = Literal["added", "dropped", "changed"]


@dataclass(frozen=True)
class Edit:
    """A value at a place such as `Arguments.AppSpecification.ImageUri`; None where there is none."""

    place: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.place}: {_short(self.before)} -> {_short(self.after)}"


@dataclass(frozen=True)
class StepChange:
    """A step that is not as it was. `cache`: what happens to its cached results, "" for a step without."""

    name: str
    kind: Kind
    edits: tuple[Edit, ...] = ()
    cache: str = ""


@dataclass(frozen=True)
class ParameterChange:
    """A pipeline parameter that is not as it was."""

    name: str
    kind: Kind
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Difference:
    """Of one pipeline. `caches`: steps as they were whose cached results are lost all the same, and why."""

    steps: tuple[StepChange, ...]
    parameters: tuple[ParameterChange, ...]
    caches: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps or self.parameters)


def compare(before: str, after: str) -> Difference:
    """The difference of two definitions (JSON texts); an empty `before` makes everything added."""
    old, new = (json.loads(text) if text else {} for text in (before, after))
    parameters = tuple(
        ParameterChange(name, kind, edits)
        for name, kind, edits in _changes(_named(old.get("Parameters", [])), _named(new["Parameters"]))
    )
    old_steps, new_steps = _steps(old.get("Steps", [])), _steps(new["Steps"])
    changed = list(_changes(old_steps, new_steps))
    steps = tuple(
        StepChange(name, kind, edits, _cache(old_steps, new_steps, name, kind, edits, parameters))
        for name, kind, edits in changed
    )
    untouched = set(new_steps) - {name for name, _, _ in changed}
    lost = [(name, _lost(new_steps[name], (), parameters)) for name in new_steps if name in untouched]
    return Difference(steps, parameters, tuple((name, why) for name, why in lost if why))


def _steps(steps: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every step by name, without the steps inside it but with the name of the one around it."""
    found = {}
    for step, parent in walk(steps):
        arguments = {key: value for key, value in step["Arguments"].items() if key not in BRANCHES}
        found[step["Name"]] = step | {"Arguments": arguments} | ({"Inside": parent} if parent else {})
    return found


def _named(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["Name"]: one for one in items}


def _changes(
    old: Mapping[str, dict[str, Any]], new: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, Kind, tuple[Edit, ...]]]:
    for name in new:
        if name not in old:
            yield name, "added", ()
        elif edits := tuple(_edits(old[name], new[name], "")):
            yield name, "changed", edits
    for name in old:
        if name not in new:
            yield name, "dropped", ()


def _edits(old: Any, new: Any, place: str) -> Iterator[Edit]:
    """The deepest places at which two values differ; lists of one length are compared entry by entry."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _edits(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _edits(one, other, f"{place}[{number}]")
    elif old != new:
        yield Edit(place, old, new)


def _cache(
    old: Mapping[str, dict[str, Any]],
    new: Mapping[str, dict[str, Any]],
    name: str,
    kind: Kind,
    edits: tuple[Edit, ...],
    parameters: tuple[ParameterChange, ...],
) -> str:
    had, has = (_cached(steps.get(name)) for steps in (old, new))
    if kind == "added":
        return "cached from its first run on" if has else ""
    if kind == "dropped" or had != has:
        return "its cache is given up" if had else "cached from its next run on" if has else ""
    return (_lost(new[name], edits, parameters) or "its cached results stay valid") if has else ""


def _lost(step: dict[str, Any], edits: tuple[Edit, ...], parameters: tuple[ParameterChange, ...]) -> str:
    """Why the cached results of a step will not be found again; "" when they will."""
    if not _cached(step):
        return ""
    within = tuple(f"Arguments.{part}" for part in CACHE_KEY)
    reasons = [one.place.removeprefix("Arguments.") for one in edits if one.place.startswith(within)]
    key = {part: step["Arguments"].get(part) for part in CACHE_KEY}
    used = {get.removeprefix("Parameters.") for get in gets(key) if get.startswith("Parameters.")}
    reasons += [
        f"the default of {one.name}"
        for one in parameters
        if one.name in used and any(edit.place == "DefaultValue" for edit in one.edits)
    ]
    return f"its cache misses: {', '.join(reasons)} changed" if reasons else ""


def _cached(step: dict[str, Any] | None) -> bool:
    return bool(step and step.get("CacheConfig", {}).get("Enabled"))


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
