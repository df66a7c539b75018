"""What a model says it needs: requirements.txt, conda.yaml and python_env.yaml of its MLflow folder.

Whatever pip takes as a requirements file is taken, as MLflow writes much of it: wheels by their path (models
with their libraries added), direct references, hashes, constraints, files within files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

from steps.job import StepError, redact

CONDA = "conda.yaml (conda)"  # where a package of conda's own is from: perhaps none that pip knows

_LIMIT = 4 << 20  # bytes of a file worth reading
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tar.bz2", ".tgz")
_CONDA_NAMES = {
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "pytorch-cuda": "cuda",
    "cuda-version": "cuda",
    "cudatoolkit": "cuda",
}

Wanted = dict[str, tuple[str, str]]  # name -> (specifier, file that says so)


def model_requirements(folder: Path) -> Wanted:
    """What an MLflow model folder asks for.

    Returns:
        name -> (specifier, file that says so), "python" included, and "cuda" where conda brings it. The first
        file that names a package counts (requirements.txt, conda.yaml, python_env.yaml): MLflow writes the
        same list to all of them. A direct reference to a wheel or archive has the version in its name;
        another one is " @ " and the URL, without credentials.

    Raises:
        StepError: a file cannot be read as what its name says.
    """
    files = _Files(folder)
    if (folder / "requirements.txt").is_file():
        files.add_file("requirements.txt")
    if conda := _read_yaml(folder / "conda.yaml"):
        for entry in _list(conda.get("dependencies"), "conda.yaml"):
            if isinstance(entry, dict):
                files.add_lines(_list(entry.get("pip"), "conda.yaml"), "conda.yaml")
            else:
                files.add_conda(str(entry))
    if environment := _read_yaml(folder / "python_env.yaml"):
        files.add_lines(_list(environment.get("dependencies"), "python_env.yaml"), "python_env.yaml")
        if environment.get("python"):
            files.found.setdefault("python", (f"=={environment['python']}", "python_env.yaml"))
    return files.constrained()


def applies(requirement: Requirement) -> bool:
    """Whether its environment marker holds for this interpreter."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def pinned(specifier: str) -> str:
    """The version that `specifier` pins, "" when it pins none."""
    return specifier[2:] if re.fullmatch(r"==[^=,*]+", specifier) else ""


class _Files:
    """The requirements of one folder as its files are read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._seen: set[Path] = set()
        self.found: Wanted = {}
        self._constraints: Wanted = {}

    def add_file(self, name: str, constraint: bool = False) -> None:
        """Add a requirements file, if it is one of the folder's and was not read yet."""
        path = (self._folder / name).resolve()
        if path.is_relative_to(self._folder) and path.is_file() and path not in self._seen:
            self._seen.add(path)
            self.add_lines(_read_text(path).splitlines(), name, constraint)

    def add_lines(self, lines: Iterable[Any], file: str, constraint: bool = False) -> None:
        """Add lines of a requirements file, or of a list that takes its place."""
        into = self._constraints if constraint else self.found
        for line in _logical(map(str, lines)):
            option, _, value = line.partition(" ") if "=" not in line.split(" ")[0] else line.partition("=")
            if option in ("-r", "--requirement", "-c", "--constraint"):
                self.add_file(value.strip(), constraint or option.lstrip("-").startswith("c"))
            elif option in ("-e", "--editable") or not line.startswith("-"):
                text = value.strip() if line.startswith("-") else line
                if entry := _parse(text, file):
                    into.setdefault(entry[0], (entry[1], file))

    def add_conda(self, entry: str) -> None:
        """Add a package of conda's own: [channel::]name, then =version[=build], or ranges as pip has them."""
        match = re.fullmatch(r"(?:\S+::)?([A-Za-z0-9_.-]+)\s*(.*)", entry.strip())
        if not match or match[1] == "pip":
            return
        name = canonicalize_name(match[1])
        version = match[2].replace(" ", "")
        if exact := re.fullmatch(r"={0,2}([\w.+!]+(?:\.\*)?)(?:=[\w.*]+)?", version):
            version = f"=={exact[1]}"
        file = "conda.yaml" if name == "python" else CONDA
        self.found.setdefault(_CONDA_NAMES.get(name, name), (version, file))

    def constrained(self) -> Wanted:
        """What was found, narrowed by the constraints."""
        for name, (constraint, _) in self._constraints.items():
            specifier, file = self.found.get(name, ("", ""))
            if not file or pinned(specifier) or " @ " in specifier:
                continue
            both = constraint if pinned(constraint) or not specifier else f"{specifier},{constraint}"
            self.found[name] = (both, file)
        return self.found


def _logical(lines: Iterable[str]) -> Iterator[str]:
    """Lines with their continuations joined, without comments, hashes and blank ones."""
    pending = ""
    for raw in [*lines, ""]:
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        line, pending = f"{pending}{line}".strip(), ""
        line = re.split(r"\s+--", line)[0].strip()
        if line:
            yield line


def _parse(line: str, file: str) -> tuple[str, str] | None:
    """Name and specifier; None when the line's marker does not hold here."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        if "/" in line or line.endswith(_ARCHIVES):
            return _direct(line.split(" ;")[0].strip())
        raise StepError(
            f"{file} of the model holds the line {redact(line)!r:.200}.", "Log the model again."
        ) from None
    if not applies(requirement):
        return None
    name = canonicalize_name(requirement.name)
    return name, _direct(requirement.url)[1] if requirement.url else str(requirement.specifier)


def _direct(reference: str) -> tuple[str, str]:
    """Name and specifier of a path or URL."""
    parts = urlsplit(reference)
    file = PurePosixPath(unquote(parts.path)).name
    try:
        wheel = parse_wheel_filename(file)
        return wheel[0], f"=={wheel[1]}"
    except InvalidWheelFilename:
        pass
    try:
        name, version = parse_sdist_filename(file)
        return name, f"=={version}"
    except InvalidSdistFilename:
        pass
    egg = re.search(r"egg=([\w.-]+)", parts.fragment)
    repository = file.partition("@")[0].removesuffix(".git")
    return canonicalize_name(egg[1] if egg else repository or "unnamed"), f" @ {redact(reference)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    """The document, its values as text: a version such as 3.10 is no number."""
    if not path.is_file():
        return {}
    try:
        document = yaml.load(_read_text(path), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise StepError(f"{path.name} of the model is no YAML: {error}.", "Log the model again.") from None
    return document if isinstance(document, dict) else {}


def _read_text(path: Path) -> str:
    if (size := path.stat().st_size) > _LIMIT:
        raise StepError(f"{path.name} of the model has {size} bytes.", "Log the model again.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StepError(
            f"{path.name} of the model is no UTF-8 text: {error}.", "Save it as UTF-8; log the model again."
        ) from None


def _list(value: Any, file: str) -> list[Any]:
    if not value:
        return []
    if not isinstance(value, list):
        raise StepError(
            f"{file} of the model has {value!r:.100} where a list belongs.", "Log the model again."
        )
    return value
