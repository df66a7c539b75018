"""docs/runbook.md speaks of what is there: messages of the code, parameters, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from pipelines import parameters
from pipelines.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
FAILURES = TEXT.partition("## When something fails")[2]
SERVICES = {"ResourceLimitExceeded"}  # words of AWS
COMPOSED = {"stack is ROLLBACK_COMPLETE"}  # put together from a status of CloudFormation


@pytest.fixture(scope="module")
def source() -> str:
    """The code's text with literals that continue on the next line joined."""
    files = [*(ROOT / "pipelines").glob("*.py"), *(ROOT / "steps").rglob("*.py")]
    files += (ROOT / "container" / "serving").glob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def messages() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", FAILURES, re.MULTILINE)
    return [words for row in rows for words in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("words", sorted(set(messages()) - SERVICES - COMPOSED))
def test_every_message_in_the_table_is_one_of_the_code(source: str, words: str) -> None:
    assert words in source


def test_every_release_parameter_is_explained() -> None:
    table = TEXT.partition("| parameter |")[2].partition("\n\n")[0]
    explained = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert explained == {one.name for one in parameters.RELEASE}


def commands() -> list[str]:
    """Every `mla-pipeline ...` of the runbook and of the infrastructure's page, with its options."""
    text = TEXT + (ROOT / "docs" / "infrastructure.md").read_text(encoding="utf-8")
    return sorted({" ".join(one.split()) for one in re.findall(r"`mla-pipeline ([^`]+)`", text)})


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_program_takes(command: str) -> None:
    group: Any = typer.main.get_command(app)
    words = shlex.split(command)
    while isinstance(group, click.Group):
        context = click.Context(group)
        name, group, words = group.resolve_command(context, words)
        assert group, name
    group.make_context(command, words)  # parses, runs nothing
