"""What pytest-xdist asks of the tests' names: every worker collects the same ones."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

MODULE = """
import gzip, os, pytest

ARCHIVE = gzip.compress(b"", mtime=int(os.environ["NOW"]))

@pytest.mark.parametrize(("key", "body"), [("a", ARCHIVE), ("a", b"x")])
def test_it(key, body): pass
"""


def collected(folder: Path, now: int) -> list[str]:
    """The names in `folder` when the clock says `now`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(folder)]
    shown = subprocess.run(
        command, env={**os.environ, "NOW": str(now)}, capture_output=True, text=True, check=True
    )
    return [line.rpartition("::")[2] for line in shown.stdout.splitlines() if "::" in line]


def test_a_clock_that_moves_changes_no_name(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(MODULE)
    first = collected(tmp_path, 1)
    assert first == collected(tmp_path, 2) == ["test_it[a-body0]", "test_it[a-body1]"]
    assert gzip.compress(b"", mtime=1) != gzip.compress(b"", mtime=2)
