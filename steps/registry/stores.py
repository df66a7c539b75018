"""The stores that mlflow's artifact repositories stand for, one class each."""

from __future__ import annotations

import tempfile
import threading
import urllib.parse
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from steps.job import StepError
from steps.registry import answers
from steps.registry.remote import CHUNK, TIMEOUT, Body, RemoteFile, Store, TransferError


class RepositoryStore(Store):
    """A store that an mlflow artifact repository lists.

    Args:
        make: gives the repository; called again when its credentials have expired.
        root: folder of the model within the repository, "" for all of it.
        describe: see Store.
    """

    def __init__(self, make: Callable[[], Any], root: str = "", describe: str = "") -> None:
        self._make, self._root = make, root.strip("/")
        self.repository = make()
        self._lock = threading.Lock()
        super().__init__(describe or type(self.repository).__name__)

    def list(self) -> list[RemoteFile]:
        found: list[RemoteFile] = []
        pending = [
            self._root
        ]  # "", not None, for the root: mlflow's presigned repository joins paths with it
        while pending:
            folder = pending.pop()
            entries = self.repository.list_artifacts(folder)
            if not entries and set(folder) & set("%#?"):  # what mlflow did not find it takes for empty
                raise StepError(
                    f"The store lists nothing in {folder!r:.200}: mlflow does not quote such a name.",
                    "Log the model again, without % # ? in the names of its folders.",
                )
            for entry in entries:
                if entry.path in (".", folder):  # some stores list a folder within itself
                    continue
                if entry.is_dir:
                    pending.append(entry.path)
                else:
                    size = None if entry.file_size is None else int(entry.file_size)
                    found.append(RemoteFile(self._relative(entry.path), size))
        return sorted(found, key=lambda file: file.path)

    def renew(self) -> None:
        with self._lock:
            self.repository = self._make()

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self._root}/") if self._root else path

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if self._root else path


@dataclass(frozen=True)
class Location:
    """A file's URL, with the headers, requests-auth and TLS settings (as of requests) to ask for it with."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    auth: Any = None
    verify: bool | str = True
    cert: str | None = None


class HttpStore(RepositoryStore):
    """A store that serves files over HTTP; subclasses say where and with which headers."""

    def __init__(self, make: Callable[[], Any], root: str = "", describe: str = "") -> None:
        super().__init__(make, root, describe)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=32))

    @abstractmethod
    def locate(self, path: str) -> Location:
        """Where `path` is, and how to ask for it."""

    def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
        place = self.locate(path)
        url = place.url
        headers = {**place.headers, "Accept-Encoding": "identity"}  # ranges and sizes count stored bytes
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            answer = self._session.get(
                url,
                headers=headers,
                auth=place.auth,
                verify=place.verify,
                cert=place.cert,
                stream=True,
                timeout=TIMEOUT,
            )
        except requests.TooManyRedirects:
            raise TransferError(f"{path}: redirected in a circle") from None
        except requests.RequestException as error:  # not quoted: its text may hold a presigned URL
            raise TransferError(f"{path}: {type(error).__name__} from {answers.host(url)}") from None
        if answer.status_code not in (200, 206):
            answer.close()
            raise answers.refused(path, answer, answers.host(url))
        first, total = answers.span(answer)
        return Body(
            self._chunks(answer, path),
            start=first,
            total=total,
            version=answer.headers.get("ETag") or answer.headers.get("Last-Modified", ""),
            partial=answer.status_code == 206,
            md5=answers.md5(answer),
            close=answer.close,
        )

    @staticmethod
    def _chunks(answer: requests.Response, path: str) -> Iterator[bytes]:
        try:
            while chunk := answer.raw.read(CHUNK, decode_content=False):
                yield chunk
        except Exception as error:  # urllib3's, http.client's or the socket's: the connection broke
            raise TransferError(f"{path}: {type(error).__name__} in the middle of the file") from None


class ProxyStore(HttpStore):
    """An MLflow server that serves artifacts itself (mlflow-artifacts:/, http://)."""

    def locate(self, path: str) -> Location:
        from mlflow.tracking.request_header.registry import resolve_request_headers
        from mlflow.utils.credentials import get_default_host_creds

        repository = self.repository
        creds = get_default_host_creds(repository.artifact_uri)
        headers, auth = dict(resolve_request_headers()), None
        if creds.username and creds.password:
            auth = (creds.username, creds.password)
        elif creds.token:
            headers["Authorization"] = f"Bearer {creds.token}"
        elif creds.auth:
            from mlflow.tracking.request_auth.registry import fetch_auth

            auth = fetch_auth(creds.auth)
        url = f"{repository.artifact_uri.rstrip('/')}/{urllib.parse.quote(self._full(path))}"
        return Location(url, headers, auth, creds.verify, creds.client_cert_path)


class SignedStore(HttpStore):
    """A store that signs a URL a file: S3 and Azure by vended credentials, Unity Catalog's storage."""

    def locate(self, path: str) -> Location:
        info = self.repository._get_read_credential_infos([self._full(path)])[0]
        return Location(info.signed_uri, {header.name: header.value for header in info.headers})


class S3Store(HttpStore):
    """An s3:// artifact location read with the job's own role."""

    def locate(self, path: str) -> Location:
        repository = self.repository
        bucket, key = repository.parse_s3_compliant_uri(repository.artifact_uri)
        full = f"{key}/{self._full(path)}" if key else self._full(path)
        client = repository._get_s3_client()
        return Location(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": full}))


class WorkspaceRegistryStore(HttpStore):
    """Databricks' workspace model registry: signs a URL a file as well, but answers in another form."""

    def locate(self, path: str) -> Location:
        url, headers = self.repository._get_signed_download_uri(self._full(path))
        if not url:
            raise TransferError(f"{path}: the workspace registry gave no URL")
        return Location(url, self.repository._extract_headers_from_signed_url(headers))


class FilesStore(HttpStore):
    """Databricks' Files API: /api/2.0/fs/files, with the workspace client's own authentication."""

    def locate(self, path: str) -> Location:
        repository = self.repository  # mlflow has two of them, whose attributes are named differently
        config = (getattr(repository, "client", None) or repository.wc).config
        full = f"{repository.artifact_uri.rstrip('/')}/{self._full(path)}"
        headers = {**config.authenticate(), "Accept": "application/octet-stream"}
        return Location(f"{config.host.rstrip('/')}/api/2.0/fs/files{urllib.parse.quote(full)}", headers)


class LocalStore(RepositoryStore):
    """A folder on this machine (file store of a laptop, a mounted volume)."""

    def list(self) -> list[RemoteFile]:
        base = self._base()
        found = []
        for entry in sorted(base.rglob("*")):
            if entry.is_symlink():
                raise StepError(
                    f"The model holds the symbolic link {entry.relative_to(base).as_posix()!r}.",
                    "Replace it by the file it points to.",
                )
            if entry.is_file():
                found.append(RemoteFile(entry.relative_to(base).as_posix(), entry.stat().st_size))
        return found

    def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
        file = self._base() / path
        stream = file.open("rb")
        stream.seek(start)

        def chunks() -> Iterator[bytes]:
            position = start
            while chunk := stream.read(CHUNK if end is None else min(CHUNK, end - position)):
                position += len(chunk)
                yield chunk

        return Body(chunks(), start, file.stat().st_size, close=stream.close)

    def _base(self) -> Path:
        return Path(self.repository.artifact_dir) / self._root


class WholeFileStore(RepositoryStore):
    """Any other store mlflow has a plug-in for: files come whole, by mlflow's own client, and start at 0."""

    ranges = False

    def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
        folder = tempfile.TemporaryDirectory()
        local = Path(folder.name) / "file"
        try:
            self.repository._download_file(self._full(path), str(local))
        except Exception as error:
            folder.cleanup()
            raise TransferError(f"{path}: {type(error).__name__} from {self.describe}") from None
        stream = local.open("rb")

        def close() -> None:
            stream.close()
            folder.cleanup()

        return Body(
            iter(lambda: stream.read(CHUNK), b""), 0, local.stat().st_size, partial=False, close=close
        )


def open_store(make: Callable[[], Any], root: str = "", describe: str = "") -> Store:
    """The Store for the mlflow artifact repository that `make` gives (arguments as of RepositoryStore)."""
    repository = make()
    kinds: list[tuple[str, type[RepositoryStore]]] = [
        ("DatabricksSDKModelsArtifactRepository", FilesStore),
        ("DatabricksSdkArtifactRepository", FilesStore),
        ("DatabricksModelsArtifactRepository", WorkspaceRegistryStore),
        ("CloudArtifactRepository", SignedStore),
        ("S3ArtifactRepository", S3Store),
        ("HttpArtifactRepository", ProxyStore),
        ("LocalArtifactRepository", LocalStore),
    ]
    # By name along the class hierarchy: importing every repository class would need every cloud's SDK.
    ancestors = [ancestor.__name__ for ancestor in type(repository).__mro__]
    kind = next((store for name, store in kinds if name in ancestors), WholeFileStore)
    first: list[Any] = [repository]
    return kind(lambda: first.pop() if first else make(), root, describe)
