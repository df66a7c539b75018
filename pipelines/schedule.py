"""EventBridge's schedule expressions, `rate(…)` and `cron(…)` in UTC, checked before AWS is asked.

Rules: https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-scheduled-rule-pattern.html
"""

from __future__ import annotations

import re

_RATE = re.compile(r"rate\(([1-9]\d*) (minute|hour|day)(s?)\)")
_CRON = re.compile(r"cron\(([^()]+)\)")
_FIELDS = ("minutes", "hours", "day of month", "month", "day of week", "year")
_FIELD = re.compile(r"[0-9A-Z*?,/#-]+")


def check(text: str) -> str:
    """The expression as it was given.

    Raises ValueError, saying what EventBridge would refuse: another form, a wrong plural, fields that are
    missing, or not exactly one `?` among the day of the month and the day of the week.
    """
    if rate := _RATE.fullmatch(text):
        if (rate[1] == "1") == bool(rate[3]):
            raise ValueError(f"write rate({rate[1]} {rate[2]}{'' if rate[1] == '1' else 's'})")
        return text
    if not (cron := _CRON.fullmatch(text)):
        raise ValueError("write rate(12 hours) or cron(0 6 ? * MON-FRI *), in UTC")
    fields = cron[1].split(" ")
    if len(fields) != len(_FIELDS):
        raise ValueError(f"cron takes {len(_FIELDS)} fields, not {len(fields)}: {', '.join(_FIELDS)}")
    for name, field in zip(_FIELDS, fields, strict=True):
        if not _FIELD.fullmatch(field) or ("?" in field and (field != "?" or not name.startswith("day "))):
            raise ValueError(f"'{field}' is no value for cron's {name}")
    if [fields[2], fields[4]].count("?") != 1:
        raise ValueError("cron takes '?' for the day of month or the day of week, and a value for the other")
    return text
