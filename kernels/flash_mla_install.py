"""Install a package with flash_mla's Python interface into a kernel artifact, by pip and nothing else.

pip first makes one wheel (downloads it, or builds it), then unpacks that wheel into site/. Dependencies are
never installed: torch has to be the image's, which the engine runs on. For the same reason a source package
is built without build isolation, against the torch that will load it; what its build needs has to be in the
image. Building runs the package's own code.
"""

from __future__ import annotations

import ast
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TextIO

from packaging.utils import parse_wheel_filename

from kernels.files import publish_folder
from kernels.package import (
    FLASH_MLA,
    FLASH_MLA_INTERFACE,
    LOG,
    MANIFEST,
    FlashMlaPackage,
    combined_sha256,
    file_sha256,
    site_files,
)
from kernels.targets import BuildError

Say = Callable[[str], None]
IMPORT_SECONDS = 300
# No cache: a wheel that pip once built against another torch must not come back.
_QUIET = ("--no-cache-dir", "--disable-pip-version-check", "--no-input", "--no-color", "--progress-bar=off")
_IMPORT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import flash_mla
missing = [name for name in sys.argv[2:] if not callable(getattr(flash_mla, name, None))]
print("\\nmissing of flash_mla:", json.dumps(missing))
"""
_ANSWER = re.compile(r"^missing of flash_mla: (.*)$", re.MULTILINE)


def install(package: str | Path, out_dir: Path, origin: Mapping[str, Any], say: Say) -> FlashMlaPackage:
    """Put `package` into `out_dir`/flash_mla in one rename, and return it verified.

    package: a pip requirement, already known to be no option and no URL; or a wheel, or a folder of sources.
    origin: what the manifest shall say about where it came from.
    say: called with each line that pip prints, as it is printed.

    Raises BuildError when pip fails, or when what it installed is no flash_mla.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    destination = out_dir / FLASH_MLA
    publish_folder(destination, functools.partial(_fill, package, origin, say), replace=True)
    return FlashMlaPackage.load(destination)


def _fill(package: str | Path, origin: Mapping[str, Any], say: Say, folder: Path) -> None:
    started = time.perf_counter()
    site = folder / "site"
    # pip takes a bare name for a file of the working folder if there is one, so it gets an empty one.
    with tempfile.TemporaryDirectory(prefix="flash_mla-") as scratch, (folder / LOG).open("w") as log:
        wheels, empty = Path(scratch) / "wheels", Path(scratch) / "empty"
        wheels.mkdir()
        empty.mkdir()
        pip = functools.partial(_pip, log=log, say=say, folder=empty)
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), "--", str(package))
        [wheel] = wheels.iterdir()
        name, version, _, tags = parse_wheel_filename(wheel.name)
        # By name, not by path: pip would write the path of this folder into the installed metadata.
        pip(
            "install", "--isolated", "--no-index", "--find-links", str(wheels), "--no-deps", "--no-compile",
            "--target", str(site), f"{name}=={version}",
        )  # fmt: skip
        wheel_sha256 = file_sha256(wheel)
        imported = check_interface(site, empty)
    say(f"{name} {version}: {imported}")
    files = site_files(site)
    manifest = {
        **origin,
        "target": FLASH_MLA,
        "name": str(name),
        "version": str(version),
        "wheel": wheel.name,
        "wheel_sha256": wheel_sha256,
        "wheel_tags": sorted(map(str, tags)),
        "import": imported,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "files": files,
        "bytes": sum((site / path).stat().st_size for path in files),
        "sha256": combined_sha256(files),
        "build_seconds": round(time.perf_counter() - started, 3),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def check_interface(site: Path, folder: Path) -> str:
    """Find `flash_mla` and its functions in `site`; returns "imported", or why it cannot be imported here.

    The import runs in a process of its own in `folder`. Where it fails, usually for want of a GPU's
    libraries, the module's source has to name the functions. Raises BuildError when the module or a function
    is missing.
    """
    spec = PathFinder.find_spec(FLASH_MLA, [str(site)])
    if spec is None or spec.origin is None:
        there = ", ".join(sorted(path.name for path in site.iterdir())) or "nothing"
        raise BuildError(f"the package has no module {FLASH_MLA}; it installs {there}")
    command = [sys.executable, "-B", "-c", _IMPORT, str(site), *FLASH_MLA_INTERFACE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=IMPORT_SECONDS, cwd=folder
        )
    except subprocess.TimeoutExpired:
        reason = f"no end after {IMPORT_SECONDS} s"
    else:
        if answers := _ANSWER.findall(done.stdout):
            _require(json.loads(answers[-1]))
            return "imported"
        # A loader's error hides what caused it: name every exception of the traceback, the first cause first.
        causes = dict.fromkeys(re.findall(r"^\w[\w.]*(?:Error|Exception): .*", done.stderr, re.MULTILINE))
        reason = "; ".join(causes).replace(str(site), "site") or _how_it_ended(done)
    if spec.origin.endswith(".py"):
        names = _names(Path(spec.origin))
        _require([name for name in FLASH_MLA_INTERFACE if not names & {name, "*"}])
    return f"cannot be imported here: {reason}"


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    """Of a process that ended before it answered, and left no exception."""
    if done.returncode == 0:
        return "it ended the process"
    last = done.stderr.strip().splitlines()[-1:]
    return last[0] if last and done.returncode > 0 else f"exit code {done.returncode}"


def _require(missing: list[str]) -> None:
    if missing:
        raise BuildError(f"the package's module {FLASH_MLA} has no {' and no '.join(missing)}")


def _names(source: Path) -> set[str]:
    """Every name that a module's source defines, assigns or imports; "*" for a star import."""
    names: set[str] = set()
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        raise BuildError(f"the package's module {FLASH_MLA} is not Python: {error}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _pip(command: str, *options: str, log: TextIO, say: Say, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"{sys.executable} has no pip; install it into the job's image", unavailable=True)
    arguments = [sys.executable, "-m", "pip", command, *_QUIET, *options]
    lines = [f"$ {shlex.join(arguments)}"]
    log.write(f"{lines[0]}\n")
    say(lines[0])
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
    ) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                log.write(line)
                lines.append(line.rstrip())
                say(lines[-1])
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        tail = "\n".join(lines[-20:])
        raise BuildError(f"pip {command} failed: {_cause(lines)}\n{tail}")


def _cause(lines: list[str]) -> str:
    """The line of pip's output that says why: the last of the build's own, else pip's last error."""
    ends = [number for number, line in enumerate(lines) if line.strip() == "[end of output]"]
    if ends:
        return lines[ends[0] - 1].strip()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if errors and errors[-1] == "Exception:":  # pip's own, with a traceback behind it
        errors = []
    return (errors or lines)[-1]
