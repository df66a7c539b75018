"""An endpoint at one moment, and followed while it moves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError, HTTPClientError

from steps import aws
from steps.job import StepError, log

MOVING = {"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"}
# The second serves, with instances of both configurations: a rolling update failed, and so did its way back.
UPDATABLE = {"InService", "UpdateRollbackFailed"}
FIRST_POLL_SECONDS, SLOWEST_POLL_SECONDS = 0.5, 15.0


@dataclass(frozen=True)
class Endpoint:
    """An endpoint as DescribeEndpoint shows it at one moment.

    pending: the configuration that an update in progress brings, None when there is none.
    """

    name: str
    arn: str
    status: str
    config: str | None
    pending: str | None
    failure: str
    progress: str

    @classmethod
    def find(cls, sagemaker: Any, name: str) -> Endpoint | None:
        """The endpoint, or None when there is none of that name."""
        try:
            answer = sagemaker.describe_endpoint(EndpointName=name)
        except ClientError as error:
            if aws.is_missing(error):
                return None
            raise StepError(f"Reading endpoint '{name}' failed: {error}", "Check the job's role.") from error
        return cls(
            name=name,
            arn=answer["EndpointArn"],
            status=answer["EndpointStatus"],
            config=answer.get("EndpointConfigName"),
            pending=answer.get("PendingDeploymentSummary", {}).get("EndpointConfigName"),
            failure=answer.get("FailureReason", ""),
            progress=_progress(answer),
        )

    @property
    def moving(self) -> bool:
        """Whether the service is changing it, so that it takes no update."""
        return self.status in MOVING

    def serves(self, config: str) -> bool:
        """Whether all of it is in service with `config`."""
        return self.status == "InService" and self.config == config

    def require_updatable(self) -> None:
        """Raise StepError when the service would refuse an update in this state for good."""
        if self.status not in UPDATABLE:
            raise StepError(
                f"Endpoint '{self.name}' is {self.status} and takes no update: "
                f"{self.failure or 'no reason given'}.",
                "Delete it (aws sagemaker delete-endpoint) and start the pipeline again: it creates it anew.",
            )


def wait_until_settled(sagemaker: Any, name: str, timeout: float) -> Endpoint | None:
    """Follow the endpoint until it stops moving, with a log line at every change.

    Returns:
        the settled endpoint; None when it was being deleted and is gone.
    Raises:
        StepError: it still moved, or could not be asked, after `timeout` seconds.
    """
    deadline, poll, shown, status = time.monotonic() + timeout, FIRST_POLL_SECONDS, "", "not to be asked"
    while True:
        try:
            endpoint = Endpoint.find(sagemaker, name)
        except HTTPClientError as error:  # the service goes on with it, whoever can ask
            log.warning("no answer about %s: %s", name, error)
        else:
            if endpoint and endpoint.progress != shown:
                shown = endpoint.progress
                log.info("%s: %s", name, shown)
            if not endpoint or not endpoint.moving:
                return endpoint
            status = endpoint.status
        if time.monotonic() > deadline:
            raise StepError(
                f"Endpoint '{name}' is still {status} after {timeout:.0f} s.",
                "The service goes on with it: look at the endpoint, then start the pipeline again, "
                "which waits for an update in progress.",
            )
        time.sleep(poll)
        poll = min(poll * 1.3, SLOWEST_POLL_SECONDS)


def _progress(answer: dict[str, Any]) -> str:
    """One line: status, and per variant its instances, traffic weight and state, old and new."""
    parts = [answer["EndpointStatus"]]
    pending = answer.get("PendingDeploymentSummary", {})
    for side, variants in (
        ("live", answer.get("ProductionVariants", [])),
        ("new", pending.get("ProductionVariants", [])),
    ):
        for variant in variants:
            states = [
                state.get("StatusMessage") or state["Status"] for state in variant.get("VariantStatus", [])
            ]
            parts.append(
                f"{side} {variant['VariantName']}: {variant.get('CurrentInstanceCount', 0)} instances, "
                f"weight {variant.get('CurrentWeight', 0):g}" + (f" ({'; '.join(states)})" if states else "")
            )
    return " | ".join(parts)
