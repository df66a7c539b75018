"""The calls that reached this account: who asked for what, as IAM would have to allow it.

A job's access key id is its own name, so a request's credential scope tells callers apart; steps, rules and
the service's own file transfers are added where they happen. `tests/e2e` walks the log against the roles of
config/infrastructure.yaml.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from botocore.parsers import RpcV2CBORParser

MAX_DISTINCT = 20_000
USER = "sandbox"  # access key id of clients outside, and their caller in the log
PIPELINE, EVENTS = "pipeline", "events"  # the service acting with the pipeline's or the rule's role
_CREDENTIAL = re.compile(r"Credential=([^/]+)/\d+/[^/]+/([^/]+)/aws4_request")
_CBOR = re.compile(r"/service/[^/]+/operation/(\w+)")
_INVOCATION = re.compile(r"/endpoints/([^/]+)/invocations(-response-stream)?")


@dataclass(frozen=True)
class RecordedCall:
    """One request. `caller`: a job's name, or one of USER, PIPELINE, EVENTS, `endpoint`.

    service and operation as botocore names them. parameters: what names resources; bodies of objects are
    left out.
    """

    caller: str
    service: str
    operation: str
    parameters: Mapping[str, Any] = field(hash=False)

    @property
    def step(self) -> str:
        """The pipeline step of a job `pipelines-<execution>-<step>-<random>`, else the caller."""
        parts = self.caller.split("-")
        return "-".join(parts[2:-1]) if parts[0] == "pipelines" and len(parts) > 3 else self.caller


class CallLog:
    """Distinct calls in the order in which they first came; beyond MAX_DISTINCT the oldest are forgotten."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str, str, str], RecordedCall] = {}
        self._lock = threading.Lock()

    def add(self, caller: str, service: str, operation: str, parameters: Mapping[str, Any]) -> None:
        """Note a call; a repeated one is kept once."""
        key = (caller, service, operation, json.dumps(parameters, sort_keys=True, default=str))
        with self._lock:
            self._calls.setdefault(key, RecordedCall(caller, service, operation, parameters))
            if len(self._calls) > MAX_DISTINCT:
                del self._calls[next(iter(self._calls))]

    def all(self) -> list[RecordedCall]:
        """A copy of the log."""
        with self._lock:
            return list(self._calls.values())

    def see(self, environ: dict[str, Any]) -> None:
        """Note an HTTP request; its body stays readable. An unsigned one, or of no known form, passes."""
        signed = _CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
        if not signed:
            return
        caller, service = signed.groups()
        if found := _identify(service, environ):
            self.add(caller, *found)


def _identify(signed_for: str, environ: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """(service, operation, parameters) of a request."""
    path, target = environ.get("PATH_INFO", ""), environ.get("HTTP_X_AMZ_TARGET", "")
    if signed_for == "s3":
        return "s3", *_s3(environ)
    if match := _INVOCATION.fullmatch(path):
        operation = "InvokeEndpointWithResponseStream" if match[2] else "InvokeEndpoint"
        return "sagemaker-runtime", operation, {"EndpointName": unquote(match[1])}
    if match := _CBOR.fullmatch(path):
        return _service(signed_for), match[1], _cbor(_body(environ))
    if target:
        return _service(signed_for), target.rpartition(".")[2], _json(_body(environ))
    if environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
        form = {key: values[0] for key, values in parse_qs(_body(environ).decode(errors="replace")).items()}
        return _service(signed_for), form.pop("Action", "unknown"), form
    return None


def _service(signed_for: str) -> str:
    return {"monitoring": "cloudwatch", "servicequotas": "service-quotas"}.get(signed_for, signed_for)


def _body(environ: dict[str, Any]) -> bytes:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    return bytes(body)


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _cbor(body: bytes) -> dict[str, Any]:
    parser = RpcV2CBORParser()
    found = parser.parse_data_item(parser.get_peekable_stream_from_bytes(body)) if body else {}
    return found if isinstance(found, dict) else {}


def _s3(environ: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Operation and its bucket, key and prefix, of a path-style request."""
    bucket, _, key = environ.get("PATH_INFO", "").lstrip("/").partition("/")
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    parameters = {"Bucket": bucket} | ({"Key": key} if key else {})
    method = environ.get("REQUEST_METHOD", "")
    if method == "GET" and not key and not set(query) & _SUBRESOURCES:
        parameters["Prefix"] = query.get("prefix", [""])[0]
        return ("ListObjectsV2" if "list-type" in query else "ListObjects"), parameters
    for marker, operation in _MARKED.get((method, bool(key)), {}).items():
        if marker in query or (marker == "copy" and "HTTP_X_AMZ_COPY_SOURCE" in environ):
            return operation, parameters
    if set(query) & _SUBRESOURCES:
        return f"{method} {'&'.join(sorted(set(query) & _SUBRESOURCES))}", parameters
    return _PLAIN.get((method, bool(key)), method), parameters


_SUBRESOURCES = {
    "acl", "cors", "encryption", "lifecycle", "location", "logging", "notification", "policy", "tagging",
    "versioning", "versions", "uploads", "website",
}  # fmt: skip
_MARKED = {
    ("GET", False): {"location": "GetBucketLocation"},
    ("POST", False): {"delete": "DeleteObjects"},
    ("PUT", True): {"partNumber": "UploadPart", "copy": "CopyObject"},
    ("POST", True): {"uploads": "CreateMultipartUpload", "uploadId": "CompleteMultipartUpload"},
    ("DELETE", True): {"uploadId": "AbortMultipartUpload"},
}
_PLAIN = {
    ("HEAD", False): "HeadBucket",
    ("PUT", False): "CreateBucket",
    ("DELETE", False): "DeleteBucket",
    ("GET", True): "GetObject",
    ("HEAD", True): "HeadObject",
    ("PUT", True): "PutObject",
    ("DELETE", True): "DeleteObject",
}
