"""A model's small files without its weights: enough to answer questions about it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from steps.registry.access import connect, resolve
from steps.registry.download import download
from steps.registry.errors import explained
from steps.registry.paths import check_paths
from steps.registry.uris import parse_model_uri

SMALL = 1 << 20  # bytes


def fetch_small_files(uri: str, destination: Path | None = None) -> Path:
    """Download every file of at most 1 MiB of the model `uri`.

    Returns:
        the folder, `destination` or a new temporary one.

    Raises:
        StepError: as PullModel would.
    """
    parsed = parse_model_uri(uri)
    registry = connect()
    model = resolve(registry, parsed)
    folder = destination or Path(tempfile.mkdtemp(prefix="mla-model-"))
    with explained(registry, f"The files of '{uri}'"):
        files = [file for file in model.store.list() if file.bytes is not None and file.bytes <= SMALL]
        check_paths(file.path for file in files)
        download(model.store, files, folder)
    return folder
