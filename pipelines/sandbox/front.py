"""The WSGI application: SageMaker's API and runtime are answered here, everything else by moto."""

from __future__ import annotations

import io
import json
import logging
import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

from pipelines.sandbox.api import Api
from pipelines.sandbox.calls import CallLog
from pipelines.sandbox.errors import ServiceError, not_emulated
from pipelines.sandbox.iam import simulate

_log = logging.getLogger(__name__)
_INVOCATION = re.compile(r"/endpoints/([^/]+)/(invocations|invocations-response-stream|async-invocations)")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Headers = list[tuple[str, str]]
Answer = tuple[int, Headers, Iterable[bytes]]
Invoke = Callable[[str, bytes, dict[str, str], bool], Answer]
"""Endpoint name, body, request headers (lower case), whether to stream -> answer."""


class Front:
    """Routes one request.

    Args:
        moto: the WSGI application for all other services.
        invoke: answers sagemaker-runtime.
        put_events: answers EventBridge's PutEvents (moto fails on pipeline targets).
        calls: every signed request is noted here.
    """

    def __init__(
        self,
        api: Api,
        moto: Callable[..., Iterable[bytes]],
        invoke: Invoke | None = None,
        put_events: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        calls: CallLog | None = None,
    ) -> None:
        self._api, self._moto, self._invoke, self._put_events = api, moto, invoke, put_events
        self._calls = calls or CallLog()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI call."""
        self._calls.see(environ)
        route = self._route(environ)
        if route is None:
            return self._moto(environ, start_response)
        try:
            status, headers, body = route(_read(environ))
        except ServiceError as error:
            status, headers, body = _json_error(error)
        except Exception as error:  # a fault here must reach the client as one, not hang it
            _log.error("%s", traceback.format_exc())
            status, headers, body = _json_error(
                ServiceError("InternalFailure", f"Sandbox fault: {error!r}", 500)
            )
        start_response(f"{status} -", headers)
        return body

    def _route(self, environ: Environ) -> Callable[[bytes], Answer] | None:
        target, path = environ.get("HTTP_X_AMZ_TARGET", ""), environ.get("PATH_INFO", "")
        if target.startswith("SageMaker."):
            return lambda body: self._sagemaker(target.split(".", 1)[1], body)
        if target == "AWSEvents.PutEvents" and self._put_events:
            put_events = self._put_events
            return lambda body: _json(put_events(json.loads(body)))
        if target.startswith("ServiceQuotas"):
            operation = f"service-quotas:{target.split('.', 1)[1]}"
            return lambda body: _json_error(not_emulated(operation, "Only a real account has quotas."))
        scope = _scope(environ)
        match = _INVOCATION.fullmatch(path)
        if match and scope in ("sagemaker", ""):
            return lambda body: self._runtime(unquote(match[1]), match[2], body, environ)
        if scope == "sagemaker":
            raise_for = f"{environ.get('REQUEST_METHOD')} {path} of a SageMaker service"
            return lambda body: _json_error(not_emulated(raise_for))
        if scope == "iam" and environ.get("REQUEST_METHOD") == "POST":
            body = _read(environ)
            environ["wsgi.input"] = io.BytesIO(body)  # moto reads it again when it is another action
            form = parse_qs(body.decode(errors="replace"))
            if form.get("Action") == ["SimulatePrincipalPolicy"]:
                return lambda _: self._simulate(form)
        return None

    def _sagemaker(self, action: str, body: bytes) -> Answer:
        params = json.loads(body or b"{}")
        if not isinstance(params, dict):
            raise ServiceError("SerializationException", "The request body is not a JSON object.")
        return _json(self._api.call(action, params))

    def _runtime(self, name: str, kind: str, body: bytes, environ: Environ) -> Answer:
        if self._invoke is None or kind == "async-invocations":
            raise not_emulated("sagemaker-runtime:InvokeEndpointAsync", "InvokeEndpoint is.")
        headers = {k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k.startswith("HTTP_")}
        headers["content-type"] = environ.get("CONTENT_TYPE", "")
        return self._invoke(name, body, headers, kind == "invocations-response-stream")

    def _simulate(self, form: dict[str, list[str]]) -> Answer:
        headers = [("Content-Type", "text/xml")]
        try:
            return 200, headers, [simulate(self._api.account, form).encode()]
        except ServiceError as error:
            text = (
                f"<ErrorResponse><Error><Type>Sender</Type><Code>{error.code}</Code>"
                f"<Message>{escape(error.message)}</Message></Error></ErrorResponse>"
            )
            return error.status, headers, [text.encode()]


def _read(environ: Environ) -> bytes:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    stream = environ["wsgi.input"]
    return stream.read(length) if length else (stream.read() if environ.get("wsgi.input_terminated") else b"")


def _scope(environ: Environ) -> str:
    """The service a request was signed for, from its credential scope; empty for an unsigned one."""
    match = re.search(
        r"Credential=[^/]+/\d+/[^/]+/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", "")
    )
    return match[1] if match else ""


def _json(answer: dict[str, Any]) -> Answer:
    return 200, [("Content-Type", "application/x-amz-json-1.1")], [json.dumps(answer).encode()]


def _json_error(error: ServiceError) -> Answer:
    body = {"__type": error.code, "message": error.message, "Message": error.message} | error.fields
    headers = [("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-ErrorType", error.code)]
    return error.status, headers, [json.dumps(body).encode()]
