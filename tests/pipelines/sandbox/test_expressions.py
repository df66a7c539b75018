"""Expressions against what their definition says, over many values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sandbox.caching import parse_duration
from pipelines.sandbox.expressions import ExpressionError, evaluate, lookup, parse_path, resolve


class Values:
    """A scope with fixed values."""

    def __init__(self, parameters: dict[str, Any] | None = None, file: Any = None) -> None:
        self.parameters, self.execution, self._file = parameters or {}, {"PipelineName": "p"}, file

    def properties(self, step: str) -> Any:
        return {"Outputs": [{"OutputName": "a", "Uri": "s3://a"}, {"OutputName": "b", "Uri": "s3://b"}]}

    def property_file(self, step: str, name: str) -> Any:
        return self._file

    def json_object(self, s3_uri: str) -> Any:
        return {"uri": s3_uri}


keys = st.text(
    st.characters(blacklist_characters=".[]'\"$", min_codepoint=32, max_codepoint=0x2FF), min_size=1
)
numbers = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False))


def written(path: list[str | int]) -> str:
    return "$" + "".join(f"[{p}]" if isinstance(p, int) else f"['{p}']" for p in path)


def nested(path: list[str | int], leaf: Any) -> Any:
    for part in reversed(path):
        leaf = {part: leaf} if isinstance(part, str) else [None] * part + [leaf]
    return leaf


@given(st.lists(st.one_of(keys, st.integers(0, 5)), min_size=1, max_size=6), numbers)
def test_every_written_path_leads_to_its_value(path: list[str | int], leaf: Any) -> None:
    text = written(path)
    assert parse_path(text) == tuple(path)
    assert lookup(nested(path, leaf), parse_path(text), text) == leaf


@given(st.lists(keys.filter(lambda k: not k.isspace()), min_size=1, max_size=5))
def test_dotted_and_bracketed_paths_are_the_same(names: list[str]) -> None:
    assert parse_path(".".join(names)) == parse_path(written(list(names)))


@given(numbers, numbers)
def test_comparisons_are_those_of_numbers(left: float, right: float) -> None:
    def holds(kind: str) -> bool:
        return evaluate({"Type": kind, "LeftValue": left, "RightValue": right}, Values())

    assert holds("Equals") == (left == right)
    assert holds("GreaterThan") == (left > right)
    assert holds("LessThanOrEqualTo") == (left <= right)
    assert holds("GreaterThanOrEqualTo") != holds("LessThan")


booleans = st.deferred(
    lambda: (
        st.booleans().map(lambda b: ({"Type": "Equals", "LeftValue": b, "RightValue": True}, b))
        | booleans.map(lambda c: ({"Type": "Not", "Condition": c[0]}, not c[1]))
        | st.lists(booleans, min_size=1, max_size=3).map(
            lambda cs: ({"Type": "Or", "Conditions": [c for c, _ in cs]}, any(v for _, v in cs))
        )
        | st.lists(booleans, min_size=1, max_size=3).map(
            lambda cs: ({"Type": "And", "Conditions": [c for c, _ in cs]}, all(v for _, v in cs))
        )
    )
)


@given(booleans)
def test_nested_conditions_are_boolean_algebra(case: tuple[dict[str, Any], bool]) -> None:
    condition, truth = case
    assert evaluate(condition, Values()) is truth


@given(st.lists(st.one_of(st.text(), st.integers(), st.booleans())), st.text())
def test_join_joins_texts(values: list[Any], on: str) -> None:
    texts = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    assert resolve({"Std:Join": {"On": on, "Values": values}}, Values()) == on.join(texts)


def test_resolves_references_wherever_they_stand() -> None:
    scope = Values({"N": 3}, {"gate": {"speedup": 1.5, "cases": [{"name": "x"}]}})
    file = {"Get": "Steps.E.PropertyFiles.F"}
    request = {
        "Count": {"Get": "Parameters.N"},
        "Uris": [{"Get": "Steps.A.Outputs['b'].Uri"}, {"Get": "Steps.A.Outputs[0].Uri"}],
        "Name": {
            "Std:Join": {"On": "-", "Values": [{"Get": "Execution.PipelineName"}, {"Get": "Parameters.N"}]}
        },
        "Speedup": {"Std:JsonGet": {"PropertyFile": file, "Path": "gate.speedup"}},
        "Case": {"Std:JsonGet": {"PropertyFile": file, "Path": "$.gate.cases[0]['name']"}},
        "Object": {"Std:JsonGet": {"S3Uri": {"Get": "Execution.PipelineName"}, "Path": "uri"}},
    }
    assert resolve(request, scope) == {
        "Count": 3,
        "Uris": ["s3://b", "s3://a"],
        "Name": "p-3",
        "Speedup": 1.5,
        "Case": "x",
        "Object": "p",
    }


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"Get": "Parameters.X"}, "does not exist"),
        ({"Get": "Steps.A.Outputs['c']"}, "no 'c'"),
        ({"Get": "Nothing.A"}, "must start with"),
        ({"Std:JsonGet": {"PropertyFile": {"Get": "Steps.E.PropertyFiles.F"}, "Path": "a"}}, "JSON dict"),
        ({"Std:Join": {"On": "", "Values": [[1]]}}, "not list"),
    ],
)
def test_what_leads_nowhere_says_so(value: Any, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason):
        resolve(value, Values(file={"a": {}}))


@pytest.mark.parametrize(("left", "right"), [("1", 1), (True, 1), ("a", False)])
def test_values_of_different_kinds_are_not_compared(left: Any, right: Any) -> None:
    with pytest.raises(ExpressionError, match="must be of one kind"):
        evaluate({"Type": "Equals", "LeftValue": left, "RightValue": right}, Values())
    assert not evaluate({"Type": "In", "QueryValue": left, "Values": [right]}, Values())


@pytest.mark.parametrize(
    ("text", "seconds"), [("P30D", 2_592_000), ("P4DT12H", 388_800), ("T12H", 43_200), ("p1w", 604_800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "P", "12H", "PT", "P1Y"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(ExpressionError, match="ISO 8601"):
        parse_duration(text)
