"""The pipeline parameter KernelSource: a package with flash_mla's interface to measure beside our kernels.

    builtin                      none
    sgl-flash-mla==1.0.0         a pip requirement: a name, with versions if you like
    s3://bucket/path/x.tar.gz    sources (.tar.gz, .tgz, .zip) or a wheel (.whl)

Nothing else is taken: no pip option, URL, local path, extra or marker. What is named here runs in the job and
in the endpoint, so whoever may start the pipeline may run code there.
"""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kernels.flash_mla_install import install
from kernels.package import LOG, FlashMlaPackage, file_sha256
from kernels.targets import BuildError
from steps import aws
from steps.job import StepError, log, redact

BUILTIN = "builtin"
SUFFIXES = (".tar.gz", ".tgz", ".zip", ".whl")
MAX_ARCHIVE_BYTES = 1 << 30
MAX_UNPACKED_BYTES = 8 << 30
FORMS = f"Set KernelSource to {BUILTIN}, a requirement such as sgl-flash-mla==1.0.0, or s3://bucket/archive.tar.gz."


@dataclass(frozen=True)
class KernelSource:
    """A checked KernelSource that is not builtin. `text` is a requirement as pip takes it, or an S3 URI."""

    text: str

    @classmethod
    def parse(cls, text: str) -> KernelSource | None:
        """None for builtin. Raises StepError saying what is wrong with `text`."""
        text = text.strip()
        if text.lower() == BUILTIN:  # in any spelling: the index may hold a package of another one
            return None
        if text.startswith("s3://"):
            _, key = aws.split_s3_uri(text)
            if not key.endswith(SUFFIXES):
                raise StepError(
                    f"KernelSource '{text}' is no archive: it ends in none of {' '.join(SUFFIXES)}.", FORMS
                )
            return cls(text)
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise StepError(f"KernelSource '{text}' is no pip requirement: {reason}.", FORMS) from None
        for what, value in (
            ("a URL", requirement.url),
            ("extras", requirement.extras),
            ("a marker", requirement.marker),
        ):
            if value:
                raise StepError(f"KernelSource '{text}' has {what}, which KernelSource does not take.", FORMS)
        return cls(str(requirement))

    @property
    def archived(self) -> bool:
        """Whether it is an archive on S3."""
        return self.text.startswith("s3://")

    def install(self, kernel: Path) -> FlashMlaPackage:
        """Install or build it into `kernel`/flash_mla. Raises StepError; then nothing of it is left there."""
        try:
            if not self.archived:
                package = install(self.text, kernel, {"source": self.text}, _say)
            else:
                with tempfile.TemporaryDirectory(prefix="kernel-source-") as scratch:
                    archive = download(self.text, Path(scratch))
                    origin = {
                        "source": self.text,
                        "archive_bytes": archive.stat().st_size,
                        "archive_sha256": file_sha256(archive),
                    }
                    package = install(unpack(archive, Path(scratch)), kernel, origin, _say)
        except BuildError as error:
            cause, _, output = str(error).partition("\n")
            raise StepError(
                f"KernelSource '{self.text}' cannot be used: {cause.rstrip('.:')}.",
                f"{self._remedy()} {output}".strip(),
            ) from error
        output_file = package.folder / LOG
        output_file.write_text(redact(output_file.read_text()))
        return package

    def _remedy(self) -> str:
        if not self.archived and canonicalize_name(Requirement(self.text).name) == "flash-mla":
            return "PyPI's flash-mla lacks its own headers: take sgl-flash-mla, or an archive with them."
        return "Give a package with flash_mla's interface that this image can install, or set builtin."


def download(uri: str, folder: Path) -> Path:
    """The archive at `uri`, in `folder` by its own name. Raises StepError when it is missing or too large."""
    bucket, key = aws.split_s3_uri(uri)
    path = folder / PurePosixPath(key).name
    s3 = aws.client("s3")
    with aws.explained(
        f"Reading KernelSource {uri}", "Correct the URI, or allow CompileKernel's role s3:GetObject there."
    ):
        size = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
        if size > MAX_ARCHIVE_BYTES:
            raise StepError(
                f"KernelSource {uri} has {size} bytes, {MAX_ARCHIVE_BYTES} are allowed.",
                "Give a smaller archive.",
            )
        s3.download_file(bucket, key, str(path))
    return path


def unpack(archive: Path, folder: Path) -> Path:
    """What pip shall install: a wheel as it is, else the folder with the sources' build file.

    Raises StepError for a damaged archive, for one that unpacks to more than MAX_UNPACKED_BYTES or has a
    member outside its own folder, and for one without a build file at its top or in its only folder.
    """
    sources = folder / "sources"
    sources.mkdir()
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as opened:
                _check_zip(archive.name, opened)
                if archive.suffix == ".whl":
                    return archive
                opened.extractall(sources)
        else:
            _unpack_tar(archive, sources)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise StepError(
            f"KernelSource archive {archive.name} cannot be unpacked: {error}.", "Make it again."
        ) from error
    tops = [sources, *(path for path in sources.iterdir() if path.is_dir())]
    for top in tops if len(tops) == 2 else [sources]:
        if any((top / name).is_file() for name in ("pyproject.toml", "setup.py")):
            return top
    raise StepError(
        f"KernelSource archive {archive.name} has no pyproject.toml or setup.py at its top or in its folder.",
        "Archive the package's own folder.",
    )


def _check_zip(name: str, archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise StepError(
                f"KernelSource archive {name} has a member outside of it: {member.filename}.",
                "Make it again.",
            )
    _check_size(name, sum(member.file_size for member in archive.infolist()))


def _unpack_tar(path: Path, folder: Path) -> None:
    size = 0
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            size += member.size
            _check_size(path.name, size)
            archive.extract(member, folder, filter="data")  # refuses what leaves the folder, and devices


def _check_size(name: str, size: int) -> None:
    if size > MAX_UNPACKED_BYTES:
        raise StepError(
            f"KernelSource archive {name} unpacks to more than {MAX_UNPACKED_BYTES} bytes.",
            "Leave out what the build does not need.",
        )


def _say(line: str) -> None:
    log.info("flash_mla: %s", line)
