"""sagemaker-runtime: InvokeEndpoint and InvokeEndpointWithResponseStream, passed to a serving container."""

from __future__ import annotations

import binascii
import http.client
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipelines.sandbox.api import Account
from pipelines.sandbox.endpoint import Endpoint
from pipelines.sandbox.endpoints import Endpoints
from pipelines.sandbox.errors import ServiceError
from pipelines.sandbox.fleets import Variant

INVOKE_TIMEOUT_S = 60.0
STREAM_TIMEOUT_S = 480.0
MAX_BODY = 25 * 1024 * 1024
_CHUNK = 65536
_PASSED_ON = (
    "x-amzn-sagemaker-custom-attributes",
    "x-amzn-sagemaker-inference-id",
    "x-amzn-sagemaker-session-id",
)

Answer = tuple[int, list[tuple[str, str]], Iterable[bytes]]
Capture = Callable[[Endpoint, Variant, bytes, str, bytes, str], None]
"""Endpoint, variant, request body and content type, response body and content type."""


class Invocations:
    """Answers the runtime API.

    Args:
        capture: told of every successful invocation (data capture).
    """

    def __init__(self, account: Account, endpoints: Endpoints, capture: Capture) -> None:
        self._account, self._endpoints, self._capture = account, endpoints, capture

    def invoke(self, name: str, body: bytes, headers: dict[str, str], stream: bool) -> Answer:
        """One invocation.

        Args:
            headers: of the request, names in lower case.
            stream: answer as an event stream (InvokeEndpointWithResponseStream).

        Raises:
            ServiceError: ValidationError (no such endpoint or variant, body too large), or ModelError with
                the container's own status.
        """
        endpoint, variant = self._pick(name, headers.get("x-amzn-sagemaker-target-variant"))
        if len(body) > MAX_BODY:
            raise ServiceError(
                "ValidationError", f"The body has {len(body)} bytes; at most {MAX_BODY} are allowed."
            )
        accept = headers.get("x-amzn-sagemaker-accept") or headers.get("accept") or "*/*"
        passed = {k: headers[k] for k in _PASSED_ON if k in headers}
        passed |= {
            "Content-Type": headers.get("content-type") or "application/octet-stream",
            "Accept": accept,
        }
        timeout = STREAM_TIMEOUT_S if stream else INVOKE_TIMEOUT_S
        connection = http.client.HTTPConnection("127.0.0.1", variant.replica.port, timeout=timeout)
        try:
            connection.request("POST", "/invocations", body, passed)
            response = connection.getresponse()
            if response.status >= 400 or not stream:
                content = response.read()
        except TimeoutError:
            connection.close()
            raise self._model_error(variant, 0, _TIMED_OUT, _TIMED_OUT) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            status = variant.replica.exit_status()
            text = f"The container does not answer ({error})" + (
                f"; it exited with code {status}" if status else ""
            )
            raise self._model_error(variant, 503, text, text) from None
        if response.status >= 400:
            connection.close()
            raise self._refused(variant, response.status, content)
        kind = response.getheader("Content-Type", "application/octet-stream")
        answer = [("x-Amzn-Invoked-Production-Variant", variant.name)]
        custom = response.getheader("X-Amzn-SageMaker-Custom-Attributes")
        if custom:
            answer.append(("X-Amzn-SageMaker-Custom-Attributes", custom))
        if stream:
            answer += [
                ("X-Amzn-SageMaker-Content-Type", kind),
                ("Content-Type", "application/vnd.amazon.eventstream"),
            ]
            return 200, answer, _stream(response, connection)
        connection.close()
        self._capture(endpoint, variant, body, passed["Content-Type"], content, kind)
        return 200, [*answer, ("Content-Type", kind)], [content]

    def _pick(self, name: str, variant: str | None) -> tuple[Endpoint, Variant]:
        try:
            endpoint = self._endpoints.find(name)
            return endpoint, endpoint.pick(variant)
        except ServiceError:
            text = f"Endpoint {name} of account {self._account.account_id} not found."
        except LookupError as error:
            text = f"Endpoint {name} of account {self._account.account_id} cannot be invoked: {error}."
        raise ServiceError("ValidationError", text)

    def _refused(self, variant: Variant, status: int, content: bytes) -> ServiceError:
        side = "client" if status < 500 else "server"
        said = content.decode(errors="replace")
        message = f'Received {side} error ({status}) from primary with message "{said}".'
        return self._model_error(variant, status, message, said)

    def _model_error(self, variant: Variant, status: int, message: str, original: str) -> ServiceError:
        place = f"{self._account.region}:{self._account.account_id}"
        fields: dict[str, Any] = {
            "OriginalStatusCode": status,
            "OriginalMessage": original,
            "LogStreamArn": f"arn:aws:logs:{place}:{variant.replica.log_stream_arn_suffix}",
        }
        return ServiceError("ModelError", message, 424, fields)


_TIMED_OUT = (
    "Your invocation timed out while waiting for a response from container primary. Review the latency "
    "metrics for each container in Amazon CloudWatch, resolve the issue, and try again."
)


def _stream(response: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> Iterator[bytes]:
    """The container's bytes as they come, each piece a PayloadPart; a break ends with an exception."""
    try:
        while piece := response.read1(_CHUNK):
            yield encode_event({":event-type": "PayloadPart", ":message-type": "event"}, piece)
    except (OSError, http.client.HTTPException) as error:
        code = "ModelInvocationTimeExceeded" if isinstance(error, TimeoutError) else "StreamBroken"
        body = f'{{"Message": "The stream of the container broke.", "ErrorCode": "{code}"}}'.encode()
        yield encode_event({":exception-type": "ModelStreamError", ":message-type": "exception"}, body)
    finally:
        connection.close()


def encode_event(headers: dict[str, str], payload: bytes) -> bytes:
    """One message of the event stream encoding (application/vnd.amazon.eventstream), big-endian:

    total length u32, headers length u32, CRC32 of these 8 bytes, headers, payload, CRC32 of all before.
    A header is its name's length u8, name, type 7 (string), value length u16, value.
    https://smithy.io/2.0/aws/amazon-eventstream.html
    """
    kinds = {"event": "application/octet-stream", "exception": "application/json"}
    headers = {**headers, ":content-type": kinds[headers[":message-type"]]}
    encoded = b"".join(
        struct.pack("!B", len(k)) + k.encode() + struct.pack("!BH", 7, len(v)) + v.encode()
        for k, v in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(encoded) + len(payload), len(encoded))
    message = prelude + struct.pack("!I", binascii.crc32(prelude)) + encoded + payload
    return message + struct.pack("!I", binascii.crc32(message))
