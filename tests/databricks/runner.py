"""Run a step in this process exactly as `python -m steps.NAME` would."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steps.job import run


@dataclass(frozen=True)
class Outcome:
    """Exit code, exit message ("" when none), and the root whose outputs to look at."""

    code: int
    message: str
    root: Path

    def output(self, name: str) -> Path:
        return self.root / "processing" / "output" / name

    def left_over(self) -> list[str]:
        """Every file below the outputs: must be empty after a failure."""
        base = self.root / "processing" / "output"
        return sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())


def run_step(
    main: Callable[[Any], None], arguments: Callable[[Any], None], argv: list[str], root: Path
) -> Outcome:
    """Run a step with `root` as its /opt/ml."""
    message = root / "output" / "message"
    message.unlink(missing_ok=True)
    with _process_state(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLA_ML_ROOT", str(root))
        with pytest.raises(SystemExit) as exit_:
            run(main, arguments, argv)
    return Outcome(int(exit_.value.code or 0), message.read_text() if message.exists() else "", root)


def failed(outcome: Outcome, *words: str) -> str:
    """Assert what every failure owes a person: exit 1, a short message, these words, nothing half-written."""
    assert outcome.code == 1, outcome.message
    assert len(outcome.message) <= 1024
    for word in words:
        assert word in outcome.message, outcome.message
    assert outcome.left_over() == []
    return outcome.message


@contextmanager
def _process_state() -> Iterator[None]:
    root, handler = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers, root.level
    try:
        yield
    finally:
        root.handlers, root.level = handlers, level
        signal.signal(signal.SIGTERM, handler)
