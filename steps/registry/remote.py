"""Reading a remote model folder: list it, and open any file at any offset.

The mlflow client knows every store (server proxy, S3, Azure, Unity Catalog by vended credentials, presigned
URLs or the Files API) and hands out an artifact repository for it. Its own download writes whole files and
cannot resume, so here a repository is only asked *where* a file is and *with which credentials*; the bytes
are read by `Store.open`, which every store answers alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

CHUNK = 1 << 20  # bytes read at a time; what one transfer holds in memory
TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte


@dataclass(frozen=True)
class RemoteFile:
    """A file of the model folder: path relative to it, size in bytes (None where the store does not say)."""

    path: str
    bytes: int | None


class TransferError(Exception):
    """A transfer that may succeed when repeated. `wait` is what the server asked for, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class ExpiredError(TransferError):
    """The store refused the credentials (401, 403): new ones may be accepted."""


@dataclass
class Body:
    """An opened file.

    Attributes:
        chunks: the bytes from `start` on, at most CHUNK at a time.
        start: offset of the first byte; 0 although another was asked for when the store ignores ranges.
        partial: whether only the range asked for comes; False when the store ignores ranges.
        total: the file's whole size where the answer says it, else None.
        version: the store's validator of the content (ETag, else Last-Modified), "" when it gives none.
        md5: the content's MD5 in hexadecimal where the answer gives one, else None.
        close: ends the transfer.
    """

    chunks: Iterator[bytes]
    start: int
    total: int | None
    version: str = ""
    partial: bool = True
    md5: str | None = None
    close: Callable[[], None] = field(default=lambda: None)


class Store(ABC):
    """One remote model folder.

    Attributes:
        describe: the route, for the log and provenance: "unity-catalog/files-api".
        ranges: False when `open` always fetches whole files.
    """

    ranges = True

    def __init__(self, describe: str) -> None:
        self.describe = describe

    @abstractmethod
    def list(self) -> list[RemoteFile]:
        """Every file, recursively."""

    @abstractmethod
    def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
        """Open `path` for the bytes [start, end).

        Raises:
            TransferError, ExpiredError: worth another try.
            StepError: not worth one.
        """

    @abstractmethod
    def renew(self) -> None:
        """Get new credentials after ExpiredError."""
