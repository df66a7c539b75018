"""Folders to S3 and back for jobs and endpoints, copying each byte as rarely as possible.

Every object is kept once as a plain file, named by bucket, key and revision. A job gets hard links to those
files when it sees them through a read-only mount, and its own copies otherwise: no job can change another's
input.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import threading
from pathlib import Path

from pipelines.sandbox.backends import Backends, S3Object, parse_s3_uri


class Objects:
    """S3 as folders.

    Args:
        folder: where the plain files are kept; made when missing, safe to delete between runs.
    """

    def __init__(self, backends: Backends, folder: Path) -> None:
        self._backends, self._folder = backends, folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def download(self, uri: str, target: Path, *, link: bool) -> int:
        """Put an object, or all objects under a prefix, into a folder; returns how many.

        A URI that names an object exactly gives that one file; else it is a prefix, and the files lie under
        ``target`` by the rest of their keys.

        Args:
            link: hard-link to the kept files (the reader must not be able to write); otherwise copy.

        Raises:
            NoSuchObject: the bucket does not exist.
            ValueError: a key would leave the target folder.
        """
        bucket, key = parse_s3_uri(uri)
        target.mkdir(parents=True, exist_ok=True)
        exact = None if not key or key.endswith("/") else self._backends.find_object(bucket, key)
        if exact:
            self._place(exact, target / Path(key).name, link)
            return 1
        found = [o for o in self._backends.list_objects(bucket, key) if not o.key.endswith("/")]
        base = key if not key or key.endswith("/") else key + "/"
        for item in found:
            # a prefix without a slash also matches its siblings ("model" and "model-2"): the service takes
            # both in, and names the file by what follows the last slash of the prefix
            relative = item.key[len(base) :] if item.key.startswith(base) else item.key[key.rfind("/") + 1 :]
            path = target / relative
            if not path.resolve().is_relative_to(target.resolve()):
                raise ValueError(f"s3://{bucket}/{item.key} would be written outside {target}")
            self._place(item, path, link)
        return len(found)

    def unpack(self, uri: str, target: Path) -> None:
        """Download a .tar.gz object and unpack it, refusing members that leave the folder.

        Raises:
            NoSuchObject: no such object.
            tarfile.TarError: not a tar archive, or one with unsafe members.
        """
        bucket, key = parse_s3_uri(uri)
        target.mkdir(parents=True, exist_ok=True)
        archive = target.parent / f".{target.name}.tar"
        archive.write_bytes(self._backends.read_object(bucket, key))
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
        finally:
            archive.unlink()

    def upload(self, folder: Path, uri: str, kms_key_id: str | None = None) -> int:
        """Store every file under a folder below an S3 prefix; returns how many. The files may be moved away.

        Raises:
            NoSuchObject: the bucket does not exist.
        """
        bucket, prefix = parse_s3_uri(uri)
        count = 0
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key = "/".join(filter(None, (prefix.rstrip("/"), path.relative_to(folder).as_posix())))
            stored = self._backends.put_file(bucket, key, path, kms_key_id)
            kept = self._kept(stored)
            if not kept.exists() and not path.is_symlink():
                os.replace(path, kept)
            count += 1
        return count

    def _place(self, item: S3Object, path: Path, link: bool) -> None:
        kept = self._kept(item)
        with self._lock:
            if not kept.exists():
                part = kept.with_suffix(".part")
                self._backends.copy_object_to(item, part)
                os.replace(part, kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.link(kept, path)
        else:
            shutil.copyfile(kept, path)

    def _kept(self, item: S3Object) -> Path:
        name = hashlib.sha256(f"{item.bucket}\n{item.key}\n{item.revision}".encode()).hexdigest()
        return self._folder / name
