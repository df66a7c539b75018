"""What stands for a running container: a folder that it sees as /opt/ml, a command, its log stream."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.sandbox.api import Account
from pipelines.sandbox.backends import Backends, NoSuchObject, parse_s3_uri
from pipelines.sandbox.calls import CallLog
from pipelines.sandbox.isolation import Isolation
from pipelines.sandbox.logs import LogReader
from pipelines.sandbox.objects import Objects
from pipelines.sandbox.processes import Child, Children

ML = "/opt/ml/"


class ContainerFailure(Exception):
    """Why a container could not start or finish, as the service words it (``ClientError: ...``)."""


@dataclass(frozen=True)
class Runtime:
    """What every container of this sandbox shares.

    Attributes:
        folder: scratch of the sandbox; each container has a folder below it.
        code: the working directory of every command, from which the repository's packages are imported.
        environment: variables every container gets, below its own.
        grace_s: seconds between SIGTERM and SIGKILL (SageMaker gives 30 to an endpoint, 120 to a job).
        calls: what containers ask of AWS is noted here, file transfers included.
    """

    account: Account
    backends: Backends
    objects: Objects
    children: Children
    isolation: Isolation
    folder: Path
    code: Path
    environment: Mapping[str, str]
    grace_s: float
    calls: CallLog


class Container:
    """One container.

    Args:
        kind: ``jobs`` or ``endpoints``: the part of the scratch folder it lives in.
        name: unique within the kind.
    """

    def __init__(self, runtime: Runtime, kind: str, name: str) -> None:
        self._runtime = runtime
        self._caller = name if kind == "jobs" else "endpoint"
        self.folder = runtime.folder / kind / name
        self._root = self.folder / "ml"
        self._read_only: list[str] = []
        self._child: Child | None = None
        self._log: LogReader | None = None
        shutil.rmtree(self.folder, ignore_errors=True)
        for part in ("ml/output", "ml/config", "tmp", "home"):
            (self.folder / part).mkdir(parents=True)

    def path(self, inside: str) -> Path:
        """Where a path that the container sees below /opt/ml really lies."""
        return self._root / inside.removeprefix(ML)

    def download(self, uri: str, inside: str, what: str) -> None:
        """Fill a folder of the container from S3; the container cannot write there where the machine allows
        that.

        Raises:
            ContainerFailure: nothing there, worded as the service does.
        """
        try:
            count = self._runtime.objects.download(
                uri, self.path(inside), link=self._runtime.isolation.protects_inputs
            )
        except (NoSuchObject, ValueError) as error:
            raise ContainerFailure(f"ClientError: Failed to download {what} from {uri}: {error}") from None
        if count == 0:
            raise ContainerFailure(f"ClientError: No S3 objects found under S3 URL '{uri}' given in {what}.")
        self._note("GetObject", inside, uri)
        self._read_only.append(inside.removeprefix(ML).rstrip("/"))

    def unpack(self, uri: str, inside: str, what: str) -> None:
        """Fill a folder of the container from a .tar.gz in S3.

        Raises:
            ContainerFailure: no such object, or no archive.
        """
        try:
            self._runtime.objects.unpack(uri, self.path(inside))
        except (NoSuchObject, ValueError, tarfile.TarError, OSError) as error:
            raise ContainerFailure(f"ClientError: Failed to unpack {what} from {uri}: {error}") from None

    def upload(self, inside: str, uri: str, kms_key_id: str | None, what: str) -> None:
        """Store a folder of the container in S3.

        Raises:
            ContainerFailure: the bucket does not exist.
        """
        self._note("PutObject", inside, uri)
        try:
            self._runtime.objects.upload(self.path(inside), uri, kms_key_id)
        except (NoSuchObject, ValueError) as error:
            raise ContainerFailure(f"ClientError: Failed to upload {what} to {uri}: {error}") from None

    def write_json(self, inside: str, content: Any) -> None:
        """Write a file the container can read."""
        self.path(inside).write_text(json.dumps(content, indent=1))

    def read_message(self) -> str:
        """What the command left in /opt/ml/output/message, or nothing."""
        path = self._root / "output" / "message"
        return path.read_text(errors="replace") if path.is_file() else ""

    def start(self, argv: Sequence[str], environment: Mapping[str, str], group: str, stream: str) -> None:
        """Run the command with its own variables and nothing of the sandbox's.

        Raises:
            ContainerFailure: the command cannot be started.
        """
        command = self._runtime.isolation.wrap(_python(argv), self._root, self._read_only)
        own = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONUNBUFFERED": "1",
            "LANG": "C.UTF-8",
            "AWS_ACCESS_KEY_ID": self._caller,
        }
        variables = own | dict(self._runtime.environment) | dict(environment) | command.environment
        try:
            self._child = self._runtime.children.start(command.argv, variables, self._runtime.code)
        except OSError as error:
            raise ContainerFailure(f"ClientError: Failed to run {' '.join(argv)}: {error}") from None
        self._log = LogReader(self._runtime.backends, self._child, group, stream)

    def _note(self, operation: str, inside: str, uri: str) -> None:
        """Log the transfer of a folder's files: calls of the service with the container's role."""
        bucket, prefix = parse_s3_uri(uri)
        for path in self.path(inside).rglob("*"):
            if path.is_file():
                key = f"{prefix.rstrip('/')}/{path.relative_to(self.path(inside)).as_posix()}"
                self._runtime.calls.add(self._caller, "s3", operation, {"Bucket": bucket, "Key": key})

    def exit_status(self) -> int | None:
        """Exit status of the command, None while it runs."""
        return self._child.exit_status() if self._child else None

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the command to end: its exit status, or None after the timeout."""
        assert self._child
        assert self._log
        try:
            status = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._child.kill()  # what the command left running in its group, as a container's end would
        self._log.join()
        return status

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after the grace period."""
        if self._child and self._log:
            self._child.stop(self._runtime.grace_s)
            self._log.join()

    def remove(self) -> None:
        """Delete its files; it must have ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def log_tail(self) -> str:
        """The last lines of output."""
        return self._log.tail() if self._log else ""


def _python(argv: Sequence[str]) -> list[str]:
    """An image's python is this very Python."""
    return [sys.executable, *argv[1:]] if argv[0] in ("python", "python3") else list(argv)
