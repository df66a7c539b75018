from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import gate, parameters
from pipelines.errors import UserError
from pipelines.parameters import Parameter


def test_names_are_pascal_case_and_unique() -> None:
    for table in parameters.PIPELINES.values():
        names = [one.name for one in table]
        assert len(set(names)) == len(names)
        assert all(name[0].isupper() and name.isalnum() for name in names)


def test_only_strings_have_an_enum() -> None:
    assert all(one.type == "String" for table in parameters.PIPELINES.values() for one in table if one.enum)


def test_every_bound_of_the_gate_is_a_number_parameter_or_a_constant() -> None:
    floats = {one.name for one in parameters.RELEASE if one.type == "Float"}
    assert {limit.bound for limit in gate.LIMITS if isinstance(limit.bound, str)} == floats


@given(st.integers(-(10**9), 10**9))
def test_a_whole_number_survives_as_text(value: int) -> None:
    assert Parameter("Count", "Integer", "").parse(str(value), "here") == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_survives_as_text(value: float) -> None:
    assert Parameter("Limit", "Float", "").parse(repr(value), "here") == value


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("Integer", "1.5"),
        ("Integer", True),
        ("Float", "fast"),
        ("Float", None),
        ("String", ""),
        ("Float", "nan"),
        ("Float", "inf"),
        ("Integer", "1_000"),
        ("Integer", " 2"),
        ("Integer", "٣"),
        ("Float", "1_0.5"),
        ("Float", "0x1p3"),
    ],
)
def test_another_type_is_refused_with_name_and_place(type_: parameters.Type, value: object) -> None:
    with pytest.raises(UserError, match=r"Limit.*here"):
        Parameter("Limit", type_, "").parse(value, "here")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("StagingEndpointName", "under_score", "give 1 to 63 letters, digits and dashes"),
        ("StagingEndpointName", "a" * 64, "1 to 63"),
        ("StagingEndpointName", "end-\n", "would be refused later"),
        ("AcceleratedModelName", "a/b", "has no / or :"),
        ("EndpointInstanceCount", "0", "EndpointInstanceCount = 0 is too small: here; give 1 or more"),
        ("EndpointInstanceCount", -3, "too small"),
    ],
)
def test_what_a_late_step_would_refuse_is_refused_at_the_start(name: str, value: object, words: str) -> None:
    table = {one.name: one for one in parameters.RELEASE}
    with pytest.raises(UserError) as error:
        parameters.check_values(table, {name: value}, "here")
    assert words in str(error.value)
