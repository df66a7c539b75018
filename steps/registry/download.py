"""Download a remote model folder: parallel, resumable, verified, in bounded memory.

Each file is cut into parts; a few threads fetch parts by HTTP range and write them at their offset into one
`.part` file, whose finished spans a small `.json` file beside it records. A broken transfer goes on where it
broke. A hash thread follows the finished prefix, so that hashing costs no second pass. A file gets its name
only when its size and, where the store gives one, its checksum agree. A store that ignores ranges, as an
MLflow 2 server does, sends each file in one piece: asked for parts, it would send all of it for every part.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from steps.job import StepError
from steps.registry.partial import LARGE, Downloaded, PartialFile
from steps.registry.progress import Progress, size_text
from steps.registry.remote import ExpiredError, RemoteFile, Store, TransferError

log = logging.getLogger("steps.download")

PART_BYTES = 16 << 20  # typical ranges are 8 or 16 MB (AWS, "Optimizing Amazon S3 Performance")
ATTEMPTS = 6  # of one part without a byte of progress
_NICER = 10  # by so much a receiving thread yields to a hashing one
_SPACE_RESERVE = 256 << 20  # bytes left free on the disk


def download(
    store: Store,
    files: Sequence[RemoteFile],
    destination: Path,
    *,
    workers: int = 8,
    part_bytes: int | None = None,
    resume_dir: Path | None = None,
    progress: Progress | None = None,
    backoff: float = 0.5,
) -> list[Downloaded]:
    """Download `files` of `store` below `destination`.

    Args:
        store: the remote folder.
        files: what to fetch; paths already checked by paths.check_paths.
        destination: an existing folder; it holds complete files only when this returns.
        workers: transfers at a time; each holds one chunk (1 MiB) in memory.
        part_bytes: bytes of one range request; default PART_BYTES.
        resume_dir: where unfinished files wait for another process; default a folder within `destination`.
        progress: counts bytes; default one that logs.
        backoff: seconds before the first retry of a part; doubles, at most 30.

    Returns:
        the files in the order given.

    Raises:
        StepError: a file stays incomplete, differs from its size or checksum, or changes meanwhile; the disk
            is too small.
    """
    known = sum(file.bytes or 0 for file in files)
    progress = progress or Progress(known)
    part_bytes = part_bytes or PART_BYTES
    large = next((file for file in files if (file.bytes or 0) > LARGE), None)
    if large and not _gives_ranges(store, large.path):
        part_bytes = known
    with _work_folder(resume_dir, destination) as work:
        durable = work == resume_dir
        tasks = [PartialFile(file, destination, work, store, part_bytes, progress, durable) for file in files]
        for task in tasks:
            task.check_restored()
        _check_space(work, known - progress.done)
        if work.stat().st_dev != destination.stat().st_dev:
            _check_space(destination, known)
        try:
            _Pool(store, tasks, workers, backoff).run()
        finally:
            for task in tasks:
                task.save()
        results = [task.finish() for task in tasks]
        shutil.rmtree(work, ignore_errors=True)
    return results


def _gives_ranges(store: Store, path: str) -> bool:
    """Ask for one byte of `path` and see whether only that would come."""
    if not store.ranges:
        return False
    try:
        body = store.open(path, 0, 1)
        if body.partial:
            for _ in body.chunks:  # read to its end, an answer's connection can be used again
                pass
    except TransferError:
        return True  # the store is busy; the download itself will say more
    body.close()
    return body.partial


@contextmanager
def _work_folder(resume_dir: Path | None, destination: Path) -> Iterator[Path]:
    """The folder of unfinished files: resume_dir, unless another process is at work there."""
    if resume_dir is None:
        yield _own(destination)
        return
    resume_dir.mkdir(parents=True, exist_ok=True)
    with resume_dir.with_name(f"{resume_dir.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # taken, or a file system without locks
            log.info("%s cannot be had (%s); starting anew", resume_dir, error.strerror)
            yield _own(destination)
            return
        yield resume_dir


def _own(destination: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=destination, prefix=".download-"))  # no file of the model has this name


class _Pool:
    """The threads that fetch parts. The first error that no retry helps against stops them all."""

    def __init__(self, store: Store, tasks: Sequence[PartialFile], workers: int, backoff: float) -> None:
        self._store, self._backoff = store, backoff
        self._queue: queue.SimpleQueue[tuple[PartialFile, int] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._renewing = threading.Lock()
        self._renewed = 0.0
        parts = [(task, part) for task in tasks for part in task.missing()]
        for entry in parts:
            self._queue.put(entry)
        # a part waits in the queue until a thread is free, in order, so that the hash follows closely
        self._threads = [
            threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
            for number in range(min(workers, max(1, len(parts))))
        ]
        # as many as can arrive at a time; each takes the next file in order
        large = [task for task in tasks if task.parallel]
        self._unhashed = iter(large)
        self._hashers = [
            threading.Thread(target=self._hash, name=f"hash-{number}", daemon=True)
            for number in range(min(workers, len(large)))
        ]

    def run(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        threads = (*self._threads, *self._hashers)
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # a signal's handler raised: let the threads end before their files are removed
            self._stop.set()
            for thread in threads:
                thread.join(timeout=10)
            raise
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own
            # One thread hashes what many receive: with an equal share of few cores it would end long after.
            thread = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, thread) + _NICER
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        while (entry := self._queue.get()) is not None and not self._stop.is_set():
            try:
                self._fetch(*entry)
            except BaseException as error:
                self._fail(error)

    def _hash(self) -> None:
        try:
            while not self._stop.is_set() and (task := next(self._unhashed, None)):
                task.follow(self._stop)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._stop.set()

    def _fetch(self, task: PartialFile, part: int) -> None:
        failures = renewals = 0
        while not self._stop.is_set():
            before, asked = task.position(part), time.monotonic()
            try:
                task.fetch(part, self._stop)
                if not task.parallel and not self._stop.is_set():
                    task.finish()  # thousands of small files must not all stay open
                return
            except ExpiredError as error:
                renewals = renewals + 1 if task.position(part) == before else 1
                if renewals > 2:
                    raise StepError(
                        f"The store refused the credentials again after they were renewed: {error}.",
                        "Grant the job's principal read access to the model's files; start the step again.",
                    ) from None
                self._renew(asked)
            except TransferError as error:
                failures = 1 if task.position(part) > before else failures + 1
                task.save()
                if failures >= ATTEMPTS:
                    raise StepError(
                        f"The download failed {failures} times at byte {task.position(part)} of {error}.",
                        "Start the step again; if it fails again, the stored file or the network is damaged.",
                    ) from None
                log.warning("%s; going on from byte %d", error, task.position(part))
                self._stop.wait(max(error.wait, min(30.0, self._backoff * 2 ** (failures - 1))))

    def _renew(self, asked: float) -> None:
        """Renew once for all threads whose requests were refused with the old credentials."""
        with self._renewing:
            if self._renewed < asked:
                log.info("the store's credentials expired; getting new ones")
                self._store.renew()
                self._renewed = time.monotonic()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPACE_RESERVE > free:
        raise StepError(
            f"The model needs {size_text(needed)}, and {size_text(_SPACE_RESERVE)} must stay free, but "
            f"{folder} has {size_text(free)}.",
            "Give the step a larger volume (VolumeSizeInGB).",
        )
