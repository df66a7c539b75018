"""One endpoint: its record, the fleet that serves, the fleet that is to replace it."""

from __future__ import annotations

import threading
from typing import Any

from pipelines.sandbox.api import now
from pipelines.sandbox.fleets import Fleet, Spread, Variant


class Endpoint:
    """One endpoint.

    Attributes:
        record: as DescribeEndpoint answers it, without what the fleets add.
        fleet: serves; None until the first is healthy.
        pending: the new fleet during an update, with ``share`` of the traffic.
        phase: what the pending fleet is doing: Creating, ActivatingTraffic or Baking; `words` says more.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.fleet: Fleet | None = None
        self.pending: Fleet | None = None
        self.share = 0.0
        self.phase, self.words = "Creating", ""
        self.since = now()
        self.settled = threading.Event()
        self.cancelled = threading.Event()
        self._spread = Spread()

    @property
    def status(self) -> str:
        """EndpointStatus."""
        return str(self.record["EndpointStatus"])

    def now_doing(self, phase: str, words: str) -> None:
        """Note what the pending fleet does from this moment on."""
        self.phase, self.words, self.since = phase, words, now()

    def pick(self, variant: str | None) -> Variant:
        """The variant that answers the next request.

        Raises:
            LookupError: nothing serves, or there is no such variant.
        """
        fleets = [
            (f, w) for f, w in ((self.fleet, 1 - self.share), (self.pending, self.share)) if f and w > 0
        ]
        if not fleets:
            raise LookupError("no fleet serves")
        return fleets[self._spread.next([w for _, w in fleets])][0].pick(variant)

    def describe(self) -> dict[str, Any]:
        """DescribeEndpoint's answer."""
        found = dict(self.record)
        if self.fleet:
            found["ProductionVariants"] = [v.summary(None, "", self.since) for v in self.fleet.variants]
            capture = self.fleet.config.get("DataCaptureConfig")
            if capture:
                found["DataCaptureConfig"] = {
                    "EnableCapture": capture.get("EnableCapture", False),
                    "CaptureStatus": "Started" if capture.get("EnableCapture") else "Stopped",
                    "CurrentSamplingPercentage": capture["InitialSamplingPercentage"],
                    "DestinationS3Uri": capture["DestinationS3Uri"],
                    "KmsKeyId": capture.get("KmsKeyId", ""),
                }
        if self.pending:
            found["PendingDeploymentSummary"] = {
                "EndpointConfigName": self.pending.name,
                "ProductionVariants": [
                    v.summary(self.phase, self.words, self.since) for v in self.pending.variants
                ],
                "StartTime": self.since,
            }
        return found
