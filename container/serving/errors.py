"""What can be wrong with a request over HTTP, and the one form of JSON in which it is said."""

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from container.serving.chat_template import ChatTemplateError
from container.serving.loop import Overloaded, Stopped
from container.serving.sequence import BadRequest
from container.serving.tokenizer import TokenizerMissing

log = logging.getLogger(__name__)
LONGEST_MESSAGE = 1024  # what it repeats of a request may be of any length


class TooLarge(ValueError):
    """The body exceeds the limit."""


class WrongType(ValueError):
    """The body is not declared to be JSON."""


class NotReady(RuntimeError):
    """The model is still loading."""


class GenerationFailed(RuntimeError):
    """The engine gave up on a request: its logits were not finite, or a step raised."""


STATUSES: dict[type[Exception], tuple[int, str]] = {
    BadRequest: (400, "invalid_request_error"),
    TokenizerMissing: (400, "invalid_request_error"),
    ChatTemplateError: (400, "invalid_request_error"),
    TooLarge: (413, "invalid_request_error"),
    WrongType: (415, "invalid_request_error"),
    Overloaded: (503, "overloaded_error"),
    NotReady: (503, "not_ready_error"),
    Stopped: (503, "not_ready_error"),
    GenerationFailed: (500, "server_error"),
}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    if len(message) > LONGEST_MESSAGE:
        message = message[: LONGEST_MESSAGE - 3] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _known(_: Request, error: Exception) -> Response:
    status, kind = STATUSES[type(error)]
    body = error_body(str(error), kind, getattr(error, "param", None), getattr(error, "code", None))
    headers = {"Retry-After": str(getattr(error, "retry_after", 5))} if status == 503 else None
    return JSONResponse(body, status, headers)


async def _unknown(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(f"internal error: {type(error).__name__}", "server_error"), 500)


async def _no_route(request: Request, error: Exception) -> Response:
    text = f"{request.method} {request.url.path} is not served here"
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (404, None)
    return JSONResponse(error_body(text, "invalid_request_error"), status, headers)


# every error of an application becomes JSON of one form
HANDLERS: dict[Any, Any] = {**dict.fromkeys(STATUSES, _known), HTTPException: _no_route, Exception: _unknown}
