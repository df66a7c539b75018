"""Paths as a remote store names them: which ones may become files below the model folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from steps.job import StepError

# A name the file system of a job can hold (ext4: 255 bytes a component, 4096 a path).
_COMPONENT_BYTES = 255
_PATH_BYTES = 4000


def check_paths(paths: Iterable[str]) -> None:
    """Refuse a listing that holds a path leaving the model folder, or two entries for one file.

    Raises:
        StepError: naming the first such path.
    """
    seen: set[str] = set()
    listed = list(paths)
    for path in listed:
        if reason := _unsafe(path):
            raise StepError(
                f"The model holds the path {path!r:.200}, which {reason}.",
                "Log the model again without it; nothing was downloaded.",
            )
        if path in seen:
            raise StepError(f"The model lists {path!r:.200} twice.", "Log the model again.")
        seen.add(path)
    for path in listed:
        for folder in PurePosixPath(path).parents:
            if str(folder) in seen:
                raise StepError(
                    f"The model lists {str(folder)!r:.200} both as a file and as a folder.",
                    "Log the model again.",
                )


def _unsafe(path: str) -> str | None:
    if not path or path.startswith("/"):
        return "is absolute or empty"
    if "\\" in path or any(ord(character) < 32 or ord(character) == 127 for character in path):
        return "holds a backslash or a control character"
    if any(0xD800 <= ord(character) < 0xE000 for character in path):
        return "is no Unicode text"  # half a surrogate pair, as JSON can hold it
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "leaves the model folder"
    if len(parts[0]) == 2 and parts[0][1] == ":":
        return "begins with a drive letter"
    if len(path.encode()) > _PATH_BYTES or any(len(part.encode()) > _COMPONENT_BYTES for part in parts):
        return "is longer than a file system takes"
    return None
