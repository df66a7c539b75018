"""Data capture: what an endpoint was asked and answered, as JSON lines in S3.

One file a captured request; layout and members as in
https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-data-capture-endpoint.html
"""

from __future__ import annotations

import base64
import datetime
import json
import uuid
from typing import Any

from pipelines.sandbox.backends import Backends, NoSuchObject, parse_s3_uri
from pipelines.sandbox.endpoint import Endpoint
from pipelines.sandbox.fleets import Spread, Variant


class Capture:
    """Writes captures for the endpoints whose configuration asks for them."""

    def __init__(self, backends: Backends) -> None:
        self._backends, self._spread = backends, Spread()

    def __call__(
        self,
        endpoint: Endpoint,
        variant: Variant,
        asked: bytes,
        asked_type: str,
        answer: bytes,
        answer_type: str,
    ) -> None:
        """Keep one request and answer, if it is this one's turn by the sampling percentage."""
        fleet = endpoint.fleet
        config = fleet.config.get("DataCaptureConfig", {}) if fleet else {}
        percent = config.get("InitialSamplingPercentage", 0)
        if (
            not config.get("EnableCapture")
            or percent == 0
            or self._spread.next([percent, 100 - percent]) != 0
        ):
            return
        modes = {option["CaptureMode"] for option in config["CaptureOptions"]}
        both = "InputAndOutput" in modes
        data: dict[str, Any] = {}
        if both or "Input" in modes:
            data["endpointInput"] = _part("INPUT", asked, asked_type, config)
        if both or "Output" in modes:
            data["endpointOutput"] = _part("OUTPUT", answer, answer_type, config)
        time, identifier = datetime.datetime.now(datetime.UTC), str(uuid.uuid4())
        meta = {"eventId": identifier, "inferenceTime": time.strftime("%Y-%m-%dT%H:%M:%SZ")}
        line = json.dumps({"captureData": data, "eventMetadata": meta, "eventVersion": "0"}) + "\n"
        bucket, prefix = parse_s3_uri(config["DestinationS3Uri"])
        folder = f"{endpoint.record['EndpointName']}/{variant.name}/{time:%Y/%m/%d/%H}"
        key = f"{prefix.rstrip('/')}/{folder}/{time:%M-%S}-{identifier}.jsonl".lstrip("/")
        try:
            self._backends.put_object(bucket, key, line.encode(), config.get("KmsKeyId"))
        except NoSuchObject:
            return  # SageMaker, too, answers the request when capturing fails


def _part(mode: str, content: bytes, content_type: str, config: dict[str, Any]) -> dict[str, Any]:
    headers = config.get("CaptureContentTypeHeader", {})
    for encoding, member in (("JSON", "JsonContentTypes"), ("CSV", "CsvContentTypes")):
        if content_type in headers.get(member, []):
            return {
                "observedContentType": content_type,
                "mode": mode,
                "data": content.decode(errors="replace"),
                "encoding": encoding,
            }
    data = base64.b64encode(content).decode()
    return {"observedContentType": content_type, "mode": mode, "data": data, "encoding": "BASE64"}
