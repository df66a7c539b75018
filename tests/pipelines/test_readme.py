from __future__ import annotations

from pathlib import Path

import pytest
import typer

from pipelines import cli, readme
from pipelines.errors import UserError


def test_the_parameters_in_the_readme_are_the_table() -> None:
    assert readme.block("parameters") == readme.parameters_table(), "run `python -m pipelines.readme`"


def test_every_command_in_the_readme_exists() -> None:
    known = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    lines = [line.strip() for line in readme.README.read_text().splitlines()]
    used = {line.split()[1] for line in lines if line.startswith("mla-pipeline ")}
    assert used
    assert used <= known


def test_a_block_is_renewed_in_place(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n")
    readme.renew("x", "new", path)
    readme.renew("x", "newer", path)
    assert path.read_text() == "before\n<!-- x:begin -->\nnewer\n<!-- x:end -->\nafter\n"
    with pytest.raises(UserError, match="no block 'y'"):
        readme.renew("y", "", path)
