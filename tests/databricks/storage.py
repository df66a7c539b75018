"""Where files are read and written: the Files API, presigned URLs, enough of S3 for vended credentials."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

from tests.databricks.catalog import BUCKET, find_version
from tests.databricks.workspace import Refusal, Route, Workspace

_SIGNED: dict[str, Path] = {}  # what a presigned URL leads to


def model_file(request: Any, path: str) -> Path:
    """/Models/<catalog>/<schema>/<model>/<version>/<path> -> the file or folder behind it."""
    parts = path.strip("/").split("/")
    if parts[:3] == ["WorkspaceInternal", "Mlflow", "Artifacts"]:  # …/<experiment>/Runs/<run>/artifacts/…
        if not request.workspace.run_files:
            raise Refusal(403, "PERMISSION_DENIED", "The Files API is not enabled for MLflow artifacts")
        if parts[4:5] == ["Runs"] and parts[5] in request.workspace.runs:
            return request.workspace.runs[parts[5]]["folder"].joinpath(*parts[7:])
        if parts[4:5] == ["LoggedModels"] and parts[5] in request.workspace.logged_models:
            return request.workspace.logged_models[parts[5]]["folder"].joinpath(*parts[6:])
    if parts[0] != "Models" or len(parts) < 5:
        raise Refusal(404, "NOT_FOUND", f"No such path: {path}")
    return find_version(request.workspace, ".".join(parts[1:4]), parts[4]).folder.joinpath(*parts[5:])


def list_directory(request: Any, path: str) -> Any:
    folder = model_file(request, path)
    if not folder.is_dir():
        raise Refusal(404, "NOT_FOUND", f"No such directory: {path}")
    if request.command == "HEAD":
        request.send_head(200, {}, 0)
        return None
    contents = []
    for entry in sorted(folder.iterdir()):
        item: dict[str, Any] = {"path": f"{path.rstrip('/')}/{entry.name}", "name": entry.name}
        item |= {"is_directory": True} if entry.is_dir() else {"file_size": entry.stat().st_size}
        contents.append(item)
    if path.strip("/").count("/") == 4:  # the model's own folder
        contents += [{"path": f"{path}/{name}", "file_size": 1} for name in request.workspace.extra_entries]
    size = 1000  # a page; two entries a page would do as well
    start = int(request.arguments().get("page_token") or 0)
    page: dict[str, Any] = {"contents": contents[start : start + size]}
    if start + size < len(contents):
        page["next_page_token"] = str(start + size)
    return page


def read_file(request: Any, path: str) -> None:
    send_file(request, model_file(request, path))


def write_file(request: Any, path: str) -> Any:
    target = model_file(request, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(request.raw)
    return {}


def create_download_url(request: Any) -> Any:
    if request.workspace.route != "presigned":
        raise Refusal(404, "ENDPOINT_NOT_FOUND", "No API found for 'POST /fs/create-download-url'")
    return sign(request.workspace, model_file(request, request.arguments()["path"]))


def sign(workspace: Workspace, file: Path) -> dict[str, Any]:
    """A URL that needs no token, but a header that the store insists on."""
    key = secrets.token_hex(16)
    _SIGNED[key] = file
    url = f"{workspace.url}/signed/{quote(file.name)}?X-Amz-Signature={key}"
    return {"url": url, "headers": [{"name": "x-stand-in", "value": "1"}]}


def signed(request: Any, name: str) -> Any:
    file = _SIGNED.get(request.query.get("X-Amz-Signature", ""))
    elsewhere = request.query.get("from") == "redirect"
    if file is None or (request.headers.get("x-stand-in") != "1" and not elsewhere):
        raise Refusal(403, "AccessDenied", "The request signature does not match")
    if request.command == "PUT":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(request.raw)
        return {}
    send_file(request, file)
    return None


def send_file(request: Any, file: Path, headers: dict[str, str] | None = None) -> None:
    """The file, or the range asked for, with an ETag; faults may cut it, shorten it, add headers."""
    if not file.is_file():
        raise Refusal(404, "NOT_FOUND", f"No such file: {file.name}")
    fault, size = request.fault, file.stat().st_size
    if fault and fault.short:
        size -= fault.short
    start, end, status = 0, size, 200
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        start, status = int(match[1]), 206
        end = min(size, int(match[2]) + 1) if match[2] else size
    head = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    head["ETag"] = f'"{file.stat().st_mtime_ns:x}-{file.stat().st_size:x}"'
    head |= (headers or {}) | (fault.headers if fault else {})
    if status == 206:
        head["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    request.send_head(status, head, end - start)
    if request.command == "HEAD":
        return
    request.wfile.flush()
    wanted = end - start if not fault or fault.cut is None else min(end - start, fault.cut)
    with file.open("rb") as stream:
        sent = 0
        while sent < wanted:
            piece = min(wanted - sent, 1 << 20)
            count = os.sendfile(request.connection.fileno(), stream.fileno(), start + sent, piece)
            if not count:
                break
            sent += count
            request.workspace.take(count)
    with request.workspace.lock:
        request.workspace.sent += sent
    if sent < end - start:
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_WR)


def s3_head(request: Any) -> None:
    request.send_head(200, {"x-amz-bucket-region": "us-east-1", "x-amz-request-id": "1"}, 0)


def s3_list(request: Any) -> None:
    """ListObjectsV2 with a delimiter."""
    check_key(request)
    prefix = request.query.get("prefix", "")
    parts = prefix.strip("/").split("/")
    base = find_version(request.workspace, ".".join(parts[:3]), parts[3]).folder.joinpath(*parts[4:])
    rows = []
    for entry in sorted(base.iterdir()) if base.is_dir() else []:
        key = escape(f"{prefix}{entry.name}")
        if entry.is_dir():
            rows.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
        else:
            rows.append(f"<Contents><Key>{key}</Key><Size>{entry.stat().st_size}</Size></Contents>")
    head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix>"
    _send_xml(request, f"<ListBucketResult>{head}{''.join(rows)}</ListBucketResult>", 200)


def s3_get(request: Any, key: str) -> Any:
    check_key(request)
    parts = key.split("/")
    file = find_version(request.workspace, ".".join(parts[:3]), parts[3]).folder.joinpath(*parts[4:])
    if request.command == "PUT":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(request.raw)
        request.send_head(
            200, {"ETag": f'"{hashlib.md5(request.raw).hexdigest()}"', "x-amz-request-id": "1"}, 0
        )
        return None
    headers = {"x-amz-request-id": "1"}
    if file.is_file() and file.stat().st_size < 1 << 20:  # put in one part: the ETag is the content's MD5
        headers["ETag"] = f'"{hashlib.md5(file.read_bytes()).hexdigest()}"'
    send_file(request, file, headers)
    return None


def check_key(request: Any) -> None:
    """Answer as S3 does when a vended key has expired; the key is in the signature, which is not computed."""
    text = request.query.get("X-Amz-Credential") or request.headers.get("Authorization", "")
    if not any(key in text for key in request.workspace.access_keys):
        _send_xml(
            request, "<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>", 403
        )
        raise BrokenPipeError


def _send_xml(request: Any, xml: str, status: int) -> None:
    data = f'<?xml version="1.0" encoding="UTF-8"?>{xml}'.encode()
    request.send_head(status, {"Content-Type": "application/xml", "x-amz-request-id": "1"}, len(data))
    request.wfile.write(data)
    request.wfile.flush()


ROUTES: list[Route] = [
    ("GET", "/api/2.0/fs/directories(?P<path>/.*)", list_directory),
    ("HEAD", "/api/2.0/fs/directories(?P<path>/.*)", list_directory),
    ("GET", "/api/2.0/fs/files(?P<path>/.*)", read_file),
    ("HEAD", "/api/2.0/fs/files(?P<path>/.*)", read_file),
    ("PUT", "/api/2.0/fs/files(?P<path>/.*)", write_file),
    ("POST", "/api/2.0/fs/create-download-url", create_download_url),
    ("GET", "/signed/(?P<name>.*)", signed),
    ("PUT", "/signed/(?P<name>.*)", signed),
    ("HEAD", f"/{BUCKET}/?", s3_head),
    ("GET", f"/{BUCKET}/?", s3_list),
    ("GET", f"/{BUCKET}/(?P<key>.+)", s3_get),
    ("PUT", f"/{BUCKET}/(?P<key>.+)", s3_get),
]
