"""Import a module from a verified folder: exactly the files whose hashes were checked."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import ModuleType


class _SourceAlone(SourceFileLoader):
    """Compiles the source each time: no hash covers a __pycache__, and Python would run what lies there."""

    def path_stats(self, path: object) -> dict[str, object]:
        raise OSError(f"no cache for {path}")  # Python then neither reads nor writes one


def import_from(site: Path, name: str) -> ModuleType:
    """Module `name` of the resolved folder `site`, now and later imported without caches.

    Only this import prefers the folder's files to the environment's. Raises what the module raises.
    """
    if _hook(site) not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook(site))
        sys.path_importer_cache.pop(str(site), None)
    sys.path.insert(0, str(site))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(site))
        sys.path.append(str(site))


@functools.cache
def _hook(site: Path) -> Callable[[str], FileFinder]:
    """For sys.path_hooks: finds modules in `site` and below."""
    loaders = (ExtensionFileLoader, EXTENSION_SUFFIXES), (_SourceAlone, SOURCE_SUFFIXES)

    def find(folder: str) -> FileFinder:
        if not Path(folder).is_relative_to(site):
            raise ImportError(f"{folder} is not below {site}")
        return FileFinder(folder, *loaders)

    return find
