"""Schedule expressions: what EventBridge takes passes, what it refuses is said before it is asked."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import schedule
from pipelines.errors import UserError
from pipelines.settings import Settings


@given(st.integers(1, 10_000), st.sampled_from(["minute", "hour", "day"]), st.booleans())
def test_a_rate_takes_the_plural_of_its_number_only(count: int, unit: str, plural: bool) -> None:
    text = f"rate({count} {unit}{'s' * plural})"
    if (count > 1) == plural:
        assert schedule.check(text) == text
    else:
        with pytest.raises(ValueError, match=rf"write rate\({count} {unit}"):
            schedule.check(text)


@pytest.mark.parametrize(
    "text",
    ["cron(0 6 ? * MON-FRI *)", "cron(0/15 8-18 1,15 * ? 2026)", "cron(0 0 L * ? *)", "cron(0 9 ? * 2#1 *)"],
)
def test_a_cron_that_eventbridge_takes(text: str) -> None:
    assert schedule.check(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 6 * * *", "write rate(12 hours) or cron("),
        ("rate(0 hours)", "write rate(12 hours)"),
        ("cron(0 6 * * *)", "cron takes 6 fields, not 5"),
        ("cron(0 6 * * * *)", "'?' for the day of month or the day of week"),
        ("cron(0 6 ? * ? *)", "'?' for the day of month or the day of week"),
        ("cron(? 6 ? * 1 *)", "'?' is no value for cron's minutes"),
        ("cron(0  6 ? * 1 *)", "cron takes 6 fields, not 7"),
    ],
)
def test_what_it_refuses_is_said(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        schedule.check(text)


def test_the_configuration_names_the_key() -> None:
    with pytest.raises(UserError, match=r"triggers.schedule = 'daily' is wrong: .*write rate\(12 hours\)"):
        Settings.load("dev", {"triggers.schedule": "daily"})
