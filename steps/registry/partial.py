"""One file on its way: which parts are on disk, its hash so far, and what lets another process go on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steps.job import StepError
from steps.registry.progress import Progress, size_text
from steps.registry.remote import CHUNK, RemoteFile, Store, TransferError

log = logging.getLogger("steps.download")

LARGE = 2 * CHUNK  # bytes; larger files come in parts, and are hashed while they arrive
_STATE_SECONDS = 1.0
# read and hashed at a time; larger than CHUNK, as every piece is a turn at Python's lock
_HASH_BYTES = 4 << 20


@dataclass(frozen=True)
class Downloaded:
    """A verified file: path relative to the model folder, size in bytes, SHA-256, the store's validator."""

    path: str
    bytes: int
    sha256: str
    etag: str


class PartialFile:
    """One file: its parts, what of them is on disk, and its hash."""

    def __init__(
        self,
        remote: RemoteFile,
        destination: Path,
        work: Path,
        store: Store,
        part_bytes: int,
        progress: Progress,
        durable: bool,
    ) -> None:
        self.path, self._size = remote.path, remote.bytes
        self._final = destination / remote.path
        key = hashlib.sha256(remote.path.encode()).hexdigest()[:16]
        self._part_file, self._state_file = work / f"{key}.part", work / f"{key}.json"
        self._store, self._progress, self._durable = store, progress, durable
        size = remote.bytes or 0
        self.parallel = size > LARGE
        step = part_bytes if self.parallel else max(size, 1)
        self._starts = list(range(0, size, step)) or [0]
        self._ends: list[int | None] = [min(start + step, size) for start in self._starts]
        if remote.bytes is None:
            self._ends = [None]
        self._at = list(self._starts)  # next byte to fetch, per part
        self._first = 0  # parts before this one are complete
        self._etag = ""
        self._md5: str | None = None
        self._changes = 0
        self._changed = threading.Condition(threading.RLock())
        self._saved = time.monotonic()
        self._digest: str | None = None
        self._md5_digest: str | None = None
        self._result: Downloaded | None = None
        self._restore()

    def missing(self) -> list[int]:
        """Parts that are not complete on disk."""
        return [part for part in range(len(self._starts)) if not self._complete(part)]

    def position(self, part: int) -> int:
        """Offset of the next byte that part lacks."""
        return self._at[part]

    def check_restored(self) -> None:
        """Drop what an earlier process left when the store holds another content now."""
        if not self._etag:
            return
        try:
            body = self._store.open(self.path, 0, 1)
        except TransferError:
            return  # the store is busy; every part's own answer is compared as well
        body.close()
        if body.version != self._etag:
            log.info("%s: changed in the store; starting anew", self.path)
            self.forget()

    def fetch(self, part: int, stop: threading.Event) -> None:
        """Fetch what `part` lacks. Raises TransferError after keeping what came."""
        if self._complete(part):
            return
        start, end = self._at[part], self._ends[part]
        ranged = self.parallel or start > 0
        body = self._store.open(self.path, start, end if ranged else None)
        try:
            content = self._accept(body.version, body.total, body.md5)
            skip = start - body.start  # a store that ignores ranges sends the whole file
            if skip < 0:
                raise TransferError(f"{self.path}: the store began at byte {body.start}, asked was {start}")
            with self._open() as descriptor:
                for chunk in body.chunks:
                    if stop.is_set():
                        return
                    if skip:
                        chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                    position = self._at[part]
                    if end is not None and position + len(chunk) > end:
                        if body.start == start and not ranged:
                            raise self._differs(f"more than its {end} bytes")
                        chunk = chunk[: end - position]
                    if chunk:
                        self._write(descriptor, part, chunk, content)
                    if end is not None and self._at[part] >= end:
                        break
        finally:
            body.close()
        if end is None:
            self._size = self._ends[part] = self._at[part]
            if body.total is not None and body.total != self._size:
                self._ends[part] = None
                raise TransferError(f"{self.path}: {self._size} of {body.total} bytes came")
        elif self._at[part] < end:
            raise TransferError(f"{self.path}: the answer ended at byte {self._at[part]} of {end}")
        self.save(force=False)

    def follow(self, stop: threading.Event) -> None:
        """Hash the file while it arrives, up to the first byte that is missing; return when all is hashed."""
        digest, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        position, size, changes = 0, self._size or 0, self._changes
        while position < size:
            with self._changed:
                while (ready := self._prefix()) <= position and self._changes == changes:
                    self._changed.wait(0.5)
                    if stop.is_set():
                        return
                if self._changes != changes:  # the file was replaced: what was hashed is void
                    digest, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
                    position, changes = 0, self._changes
                    continue
            with self._open() as descriptor:
                while position < ready:
                    data = os.pread(descriptor, min(_HASH_BYTES, ready - position), position)
                    if not data:  # the file was replaced just now
                        break
                    digest.update(data)
                    if self._md5:  # known since the first answer
                        md5.update(data)
                    position += len(data)
        self._digest, self._md5_digest = digest.hexdigest(), md5.hexdigest()

    def finish(self) -> Downloaded:
        """Check size and checksum, give the file its name, and return what it is."""
        if self._result:
            return self._result
        with self._open() as descriptor:
            size = os.fstat(descriptor).st_size
            if self._size is None or size != self._size or self.missing():
                raise self._differs(f"{size} bytes on disk, {self._size} expected")
            if self._digest is None:
                sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
                for position in range(0, size, CHUNK):
                    data = os.pread(descriptor, CHUNK, position)
                    sha256.update(data)
                    md5.update(data)
                self._digest, self._md5_digest = sha256.hexdigest(), md5.hexdigest()
        if self._md5 and self._md5_digest != self._md5:
            expected = self._md5
            self.forget()
            raise self._differs(f"the MD5 {self._md5_digest}, but the store says {expected}")
        with self._writing(self._final):
            self._final.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self._part_file, self._final)  # a rename, unless resume_dir is on another file system
        self._state_file.unlink(missing_ok=True)
        self._result = Downloaded(self.path, size, self._digest, self._etag)
        return self._result

    def save(self, force: bool = True) -> None:
        """Record what is on disk, at most once a second unless forced. It is only an aid."""
        with self._changed:
            if self._result or self._at == self._starts:
                return
            if not force and time.monotonic() - self._saved < _STATE_SECONDS:
                return
            self._saved = time.monotonic()
            state = {"path": self.path, "bytes": self._size, "etag": self._etag, "md5": self._md5}
            spans = [[start, at] for start, at in zip(self._starts, self._at, strict=True) if at > start]
            try:
                if self._durable:
                    with self._open() as descriptor:
                        os.fdatasync(descriptor)  # the record must not be ahead of the data after a power cut
                temporary = self._state_file.with_suffix(".new")
                temporary.write_text(json.dumps({**state, "spans": spans}))
                temporary.replace(self._state_file)
            except (OSError, StepError) as error:
                log.debug("%s: no record of what is here: %s", self.path, error)

    def forget(self) -> None:
        """Drop what came, as it is not what the store holds now."""
        with self._changed:
            self._progress.add(
                -sum(at - start for start, at in zip(self._starts, self._at, strict=True)), False
            )
            self._at, self._first = list(self._starts), 0
            self._etag, self._md5 = "", None
            self._changes += 1
            self._state_file.unlink(missing_ok=True)
            if self._part_file.exists():
                os.truncate(self._part_file, 0)  # the new content may be shorter
            self._changed.notify_all()

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The part file, open for as long as it is needed: thousands of files must not all stay open."""
        with self._writing(self._part_file):
            descriptor = os.open(self._part_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StepError(
                f"Cannot write {file}: {error.strerror}.", "Give the job a larger volume (VolumeSizeInGB)."
            ) from error

    def _restore(self) -> None:
        """Go on with what an earlier process left of this content; of another, its bytes must not stay."""
        try:
            state = json.loads(self._state_file.read_text())
            have = self._part_file.stat().st_size
        except (OSError, ValueError):
            state, have = {}, 0
        # a store that gives nothing to recognise the content by, or no size, cannot be gone on with
        about = (state.get("path"), state.get("bytes"), bool(state.get("etag")))
        if self._ends == [None] or about != (self.path, self._size, True):
            self._part_file.unlink(missing_ok=True)
            return
        done = dict(map(tuple, state["spans"]))
        self._at = [
            min(done.get(start, start), end or 0, max(start, have))
            for start, end in zip(self._starts, self._ends, strict=True)
        ]
        self._etag, self._md5 = state["etag"], state["md5"]
        kept = sum(at - start for start, at in zip(self._starts, self._at, strict=True))
        self._progress.add(kept, fetched=False)
        log.info("%s: %s are already here", self.path, size_text(kept))

    def _accept(self, etag: str, total: int | None, md5: str | None) -> int:
        """Check that an answer is about the file that the earlier answers were about; returns its number."""
        if total is not None and self._size is not None and total != self._size:
            raise self._differs(f"{total} bytes in the store now, but {self._size} in its listing")
        with self._changed:
            known, content = self._etag, self._changes
            if not known:
                self._etag, self._md5 = etag, md5
        if known and etag and etag != known:
            if len(self._starts) == 1 or self._at == self._starts:
                self.forget()
                raise TransferError(f"{self.path}: changed in the store")
            self.forget()
            raise self._differs("another content in the store than when its download began")
        return content

    def _write(self, descriptor: int, part: int, chunk: bytes, content: int) -> None:
        position = self._at[part]
        view = memoryview(chunk)
        with self._writing(self._part_file):
            while view:
                written = os.pwrite(descriptor, view, position)
                view, position = view[written:], position + written
        with self._changed:
            if content != self._changes:  # an answer to another part was about another content
                raise TransferError(f"{self.path}: changed in the store")
            self._at[part] = position
            self._changed.notify_all()
        self._progress.add(len(chunk))

    def _prefix(self) -> int:
        while self._first < len(self._starts) and self._complete(self._first):
            self._first += 1
        return self._at[self._first] if self._first < len(self._starts) else self._size or 0

    def _complete(self, part: int) -> bool:
        return self._ends[part] is not None and self._at[part] == self._ends[part]

    def _differs(self, what: str) -> StepError:
        return StepError(f"{self.path} has {what}.", "Register the model again, then start the step again.")
