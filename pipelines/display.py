"""Live progress for a person: one line a phase, one line a step; plain lines when no terminal listens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipelines.service import Execution, Step

if TYPE_CHECKING:
    from pipelines.run import Summary

STYLE = {"Succeeded": "green", "Failed": "red", "Stopped": "yellow", "Executing": "cyan", "Starting": "dim"}
MARK = {"Succeeded": "✓", "Failed": "✗", "Stopped": "■"}


class Display:
    """Writes to a console; `quiet` writes nothing."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        # Reasons, paths and generated text are shown as they are: [a-z] is no style, :bug: no picture.
        self.console = console or Console(quiet=quiet, highlight=False, markup=False, emoji=False)

    @contextmanager
    def phase(self, words: str) -> Iterator[None]:
        """A spinner while the block runs, then its duration."""
        started = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(words):
                yield
        else:
            yield
        self.console.print(_line("Succeeded", words, time.monotonic() - started))

    def note(self, words: str) -> None:
        """A line of its own, however long: it can be searched and copied."""
        self.console.print(words, soft_wrap=True)

    def follow(self, executions: Iterator[Execution]) -> Execution:
        """Show an execution until it is over; gives its last state."""
        if self.console.is_terminal:
            return self._live(executions)
        shown: set[tuple[str, str]] = set()
        for now in executions:
            for step in now.steps:
                if step.status in MARK and (step.name, step.status) not in shown:
                    shown.add((step.name, step.status))
                    self.console.print(step_line(step))
        return now

    def _live(self, executions: Iterator[Execution]) -> Execution:
        with Live(console=self.console, refresh_per_second=8) as live:
            for now in executions:
                live.update(Group(*map(_row, now.steps)))
        return now


def step_line(step: Step) -> Text:
    """A finished step: mark, name, duration. Why it failed is said once, at the end."""
    return _line(step.status, f"  {step.name}", step.seconds)


def summary_table(execution: Execution) -> Table:
    """Steps with status and duration; why one failed is too long for a column."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for step in execution.steps:
        seconds = f"{step.seconds:.1f} s" if step.seconds is not None else ""
        table.add_row(Text(step.name), Text(step.status, style=STYLE.get(step.status, "")), seconds)
    return table


def summary_lines(summary: Summary) -> list[str]:
    """What a local run ends with: both endpoints, a sentence, the time of each step, what next."""
    live = summary.production_endpoint or f"unchanged, the version is {summary.approval}"
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary.seconds.items())
    lines = [
        f"staging     {summary.staging_endpoint}",
        f"production  {live}",
        f"package     {summary.model_package_arn}",
        f"report      {summary.report}",
        f"seconds     {times}",
    ]
    if summary.sentence:
        lines.append(f"sentence    {json.dumps(summary.sentence, ensure_ascii=False)}")
    return [
        *lines,
        "again       mla-pipeline run -p Workload=8x4096 -p MinSpeedup=1.5",
        "keep it up  mla-pipeline run --keep; in another terminal mla-pipeline invoke TEXT",
    ]


def _row(step: Step) -> Text | Spinner:
    if step.status in MARK:
        return step_line(step)
    return Spinner("dots", Text(f"   {step.name}", style=STYLE.get(step.status, "")))


def _line(status: str, words: str, seconds: float | None) -> Text:
    text = Text(MARK.get(status, " "), style=STYLE.get(status, ""))
    text.append(f" {words:<34}", style="default")
    text.append(f"{seconds:7.1f} s" if seconds is not None else "", style="dim")
    return text
