"""What the HTTP answer of a store says: which bytes it holds, of which content, or why it holds none."""

from __future__ import annotations

import base64
import re
import urllib.parse

import requests

from steps.job import StepError
from steps.registry.remote import ExpiredError, TransferError

_MD5 = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64


def refused(path: str, answer: requests.Response, host: str) -> Exception:
    """The error to raise for an answer that is neither 200 nor 206: worth another try, or not."""
    status = answer.status_code
    if status in (401, 403):
        return ExpiredError(f"{path}: {host} answered {status}")
    if status == 404:
        return StepError(
            f"{path} is listed but {host} does not have it (404).",
            "Register the model again: a file was removed from its folder.",
        )
    if status in (408, 416, 425, 429) or status >= 500:
        return TransferError(f"{path}: {host} answered {status}", _retry_after(answer))
    return StepError(
        f"{host} answered {status} for {path}.", "Check the registry URI and the proxy in between."
    )


def _retry_after(answer: requests.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("Retry-After", 0)))
    except ValueError:  # an HTTP date: the usual back-off will do
        return 0.0


def span(answer: requests.Response) -> tuple[int, int | None]:
    """First byte's offset and whole size, from Content-Range (206) or Content-Length (200)."""
    if answer.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if match:
            return int(match[1]), None if match[2] == "*" else int(match[2])
    length = answer.headers.get("Content-Length")
    return 0, int(length) if length and answer.status_code == 200 else None


def md5(answer: requests.Response) -> str | None:
    """MD5 of the whole file in hexadecimal, where the store says it.

    S3's ETag is the MD5 of an object put in one part without a KMS key (S3 API reference, Object). Azure's
    Content-MD5 is about the whole blob when all of it is read, x-ms-blob-content-md5 always (Get Blob);
    Google's x-goog-hash is about the whole object (XML API, reference headers).
    """
    headers = answer.headers
    etag = headers.get("ETag", "").strip('"')
    kms = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    if "x-amz-request-id" in headers and not kms and re.fullmatch(r"[0-9a-f]{32}", etag):
        return etag
    given = headers.get("x-ms-blob-content-md5") or (
        headers.get("Content-MD5") if answer.status_code == 200 else None
    )
    if match := re.search(rf"\bmd5=({_MD5.pattern})", headers.get("x-goog-hash", "")):
        given = match[1]
    return base64.b64decode(given).hex() if given and _MD5.fullmatch(given) else None


def host(url: str) -> str:
    """The host to name in a message; a whole URL may hold a signature."""
    return urllib.parse.urlsplit(url).hostname or "the store"
