"""A model's own files without its weights: enough to answer questions about what it requires."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from steps.registry.access import connect, resolve
from steps.registry.download import download
from steps.registry.errors import explained
from steps.registry.paths import check_paths
from steps.registry.uris import parse_model_uri

_TEXTS = {"", ".txt", ".yaml", ".yml"}  # "" is MLmodel's


def fetch_texts(uri: str, folder: Path) -> Path:
    """Download the text files beside MLmodel of the model `uri` into `folder`, which it returns.

    Raises:
        StepError: as PullModel would.
    """
    parsed = parse_model_uri(uri)
    registry = connect()
    model = resolve(registry, parsed)
    with explained(registry, f"The files of '{uri}'"):
        listed = ((file, PurePosixPath(file.path)) for file in model.store.list())
        files = [file for file, path in listed if len(path.parts) == 1 and path.suffix in _TEXTS]
        check_paths(file.path for file in files)
        download(model.store, files, folder)
    return folder
