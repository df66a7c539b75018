"""Print the requirements of extras of pyproject.toml, one a line: `python3 container/requirements.py serve`.

An image needs what an extra lists but not the project's own dependencies: those are for the workstation that
controls the pipelines (the SageMaker SDK alone is 250 MB). pip cannot install an extra without them.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def requirements(extras: Sequence[str], pyproject: Path = Path("pyproject.toml")) -> list[str]:
    """The union of the extras' requirements, sorted. Raises SystemExit naming an extra that is not there."""
    declared = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if missing := [extra for extra in extras if extra not in declared]:
        raise SystemExit(
            f"{pyproject} has no extra {missing[0]!r}: choose from {', '.join(sorted(declared))}"
        )
    return sorted({line for extra in extras for line in declared[extra]})


if __name__ == "__main__":
    print(*requirements(sys.argv[1:]), sep="\n")
