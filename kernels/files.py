"""Write folders and files so that a reader sees all of one or nothing of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def publish_folder(destination: Path, fill: Callable[[Path], None], replace: bool) -> None:
    """Fill a temporary sibling folder, flush it to disk, and rename it to `destination`.

    With `replace` an existing folder is moved aside first; without it an existing one (a lost race) wins.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            _fsync(path)
        _fsync(temporary)
        if replace and destination.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{destination.name}-old-", dir=destination.parent))
            try:
                os.rename(destination, old / "folder")
            except FileNotFoundError:
                pass  # another process moved it first
            finally:
                shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(temporary, destination)
        except OSError:
            if not destination.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(destination.parent)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in one rename."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
