"""What a model says it needs against what the serving image holds.

    python -m steps.registry.requirements MODEL_URI [--json] [--write requirements-image.txt]

The model's side is read by wanted.py. The image's side: the serve extra of pyproject.toml with everything it
pulls in, at the versions of constraints.txt (both lie in the image, see container/Dockerfile).

Verdicts. same: the image has exactly the version that the model pins. compatible: the image's version
satisfies the specifier, or the pin differs within one release series (equal major version, for 0.x equal
minor): MLflow pins whatever was installed when the model was logged, and the image runs the weights, not the
model's own code. conflicting: neither. missing: the image does not have the package; that fails nothing, as
the server needs only its own dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from steps.job import StepError
from steps.registry import cuda
from steps.registry.wanted import CONDA, Wanted, applies, model_requirements, pinned

IMAGE_VARIABLE = "MLA_IMAGE_REQUIREMENTS"
_FILES = ("pyproject.toml", "constraints.txt")
_NO_PACKAGES = ("python", "cuda")  # what pip does not install
_BUILD_FOLDERS = (Path("/opt/build"), Path(__file__).resolve().parents[2])  # in the image; in a working tree


@dataclass(frozen=True)
class Row:
    """One line of the comparison. `wanted` is the model's specifier ("" for any), `image` a version or ""."""

    name: str
    wanted: str
    image: str
    verdict: str
    note: str = ""


def image_versions(folder: Path | None = None) -> dict[str, str]:
    """Name -> version of everything in the serving image, "python" included.

    Args:
        folder: holds pyproject.toml and constraints.txt; default MLA_IMAGE_REQUIREMENTS, else the image's
            build folder, else the working tree.

    Raises:
        StepError: the files are nowhere.
    """
    folders = [Path(text)] if (text := os.environ.get(IMAGE_VARIABLE)) else list(_BUILD_FOLDERS)
    folders = [folder] if folder else folders
    complete = [base for base in folders if all((base / name).is_file() for name in _FILES)]
    if not complete:
        raise StepError(
            f"pyproject.toml and constraints.txt of the serving image are not in {folders[0]}.",
            f"Build the job image from container/Dockerfile, or set {IMAGE_VARIABLE} to their folder.",
        )
    project, constraints = ((complete[0] / name).read_text(encoding="utf-8") for name in _FILES)
    pins: dict[str, str] = {}
    for line in constraints.splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            pins[canonicalize_name(match[1])] = match[2]
    versions = {"python": platform.python_version()}
    extras = tomllib.loads(project)["project"]["optional-dependencies"]
    pending = [Requirement(line) for line in extras["serve"]]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in versions or not applies(requirement):
            continue
        installed = _installed(name)
        if version := pins.get(name) or (installed.version if installed else None):
            versions[name] = version
            pending += [Requirement(text) for text in (installed.requires or [])] if installed else []
    return versions


def compare(wanted: Wanted, image: dict[str, str], torch_cuda: str | None) -> list[Row]:
    """One Row a package, the worst verdicts first. What conda alone may know and the image lacks is left out.

    Args:
        wanted: as of model_requirements.
        image: as of image_versions.
        torch_cuda: CUDA version of the image's torch ("13.0"), None for a CPU build.
    """
    image = image | ({"cuda": torch_cuda} if torch_cuda else {})
    rows = [
        _row(name, specifier, image.get(name, ""), torch_cuda)
        for name, (specifier, file) in wanted.items()
        if name in image or file != CONDA
    ]
    order = ["conflicting", "missing", "compatible", "same"]
    return sorted(rows, key=lambda row: (order.index(row.verdict), row.name))


def check(folder: Path, allow_conflicts: bool) -> list[Row]:
    """The table for a downloaded model. Raises StepError naming the conflicts, unless they are allowed."""
    rows = compare(model_requirements(folder), image_versions(), cuda.torch_cuda())
    conflicts = [row for row in rows if row.verdict == "conflicting"]
    if conflicts and not allow_conflicts:
        named = "; ".join(f"{row.name} {row.wanted}, image {row.image}" for row in conflicts[:8])
        more = f" and {len(conflicts) - 8} more" if len(conflicts) > 8 else ""
        raise StepError(
            f"The model's requirements conflict with the serving image: {named}{more}.",
            "Log the model with the image's versions, build an image with the model's (`mla-pipeline image "
            "requirements MODEL_URI`), or start with AllowRequirementConflicts = true.",
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text with aligned columns."""
    lines = [("package", "model wants", "image has", "verdict", "")]
    lines += [(row.name, row.wanted or "any", row.image or "-", row.verdict, row.note) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    )


def image_requirements(rows: list[Row]) -> str:
    """What the image would have to get to be as the model wants: its conflicting and missing packages."""
    wanted = [
        row for row in rows if row.verdict in ("conflicting", "missing") and row.name not in _NO_PACKAGES
    ]
    return "".join(f"{row.name}{row.wanted}\n" for row in wanted)


def _row(name: str, specifier: str, version: str, torch_cuda: str | None) -> Row:
    if not version:
        note = cuda.wheel_note(name, torch_cuda)
        return Row(name, specifier, "", "conflicting" if note else "missing", note)
    pin = pinned(specifier)
    try:
        has = Version(version)
        if pin and Version(pin).public == has.public:
            note = cuda.local_note(Version(pin).local or "", torch_cuda)
            return Row(name, specifier, version, "compatible" if note else "same", note)
        if SpecifierSet(specifier).contains(has, prereleases=True):
            return Row(name, specifier, version, "compatible")
        if pin and _series(Version(pin)) == _series(has):
            return Row(name, specifier, version, "compatible", "another release of the same series")
    except (InvalidVersion, InvalidSpecifier):
        return Row(name, specifier, version, "conflicting", "not a version that can be compared")
    return Row(name, specifier, version, "conflicting")


def _series(version: Version) -> tuple[int, ...]:
    return version.release[:2] if version.major == 0 else version.release[:1]


def _installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StepError(f"Cannot write {file}: {error.strerror}.", "Name another file.") from None


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module. Exit code 1 when there are conflicts, 2 when the model cannot be read."""
    from steps.registry.fetch import fetch_texts

    parser = argparse.ArgumentParser(prog="python -m steps.registry.requirements")
    parser.add_argument("model", help="a model URI, or the folder of a downloaded model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--write", type=Path, help="write the requirements the image must have to this file")
    parser.add_argument("--ami", help="InferenceAmiVersion of the endpoint, to check its driver")
    parser.add_argument("--kernel", type=Path, help="kernel artifact folder, to check its CUDA version")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="mla-model-") as scratch:
            folder = Path(args.model)
            if not folder.is_dir():
                folder = fetch_texts(args.model, Path(scratch))
            rows = check(folder, allow_conflicts=True)
        if args.write:
            _write(args.write, image_requirements(rows))
        rows += [Row(**asdict(row)) for row in cuda.check(cuda.torch_cuda(), args.kernel, args.ami)]
    except StepError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(rows))
    return int(any(row.verdict == "conflicting" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
