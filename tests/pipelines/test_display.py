"""What a person reads: texts of others are shown as they are."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipelines.display import Display, summary_lines, summary_table
from pipelines.run import Summary
from pipelines.service import Execution, Step

NOW = datetime(2026, 11, 24, tzinfo=UTC)
HOSTILE = "[/opt/ml] must match [a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}, not :bug: [bold]" + " and more" * 20


def test_a_reason_is_one_line_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Display().note(HOSTILE)
    assert capsys.readouterr().out == HOSTILE + "\n"


def test_a_generated_sentence_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    for line in summary_lines(Summary("id", "Succeeded", sentence=HOSTILE, report="/tmp/[/x]/report.html")):
        display.note(line)
    shown = capsys.readouterr().out
    assert f'sentence    "{HOSTILE}"\n' in shown
    assert "report      /tmp/[/x]/report.html\n" in shown


def test_the_table_of_steps_stays_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    steps = (
        Step("PullModel", "Failed", NOW, NOW, HOSTILE, ""),
        Step("CompileKernel", "Executing", NOW, None, "", ""),
    )
    Display().console.print(summary_table(Execution("arn", "p", "Failed", NOW, NOW, "", steps)))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["PullModel", "Failed", "0.0", "s"],
        ["CompileKernel", "Executing"],
    ]
