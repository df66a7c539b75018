"""One serving container of an endpoint: started from its model, asked /ping until it answers 200."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from pipelines.sandbox.containers import Container, ContainerFailure, Runtime

LOG_GROUP = "/aws/sagemaker/Endpoints/"
PING_EVERY_S = 0.1
PING_TIMEOUT_S = 2.0
DEFAULT_STARTUP_S = 600
_ports: set[int] = set()
_ports_lock = threading.Lock()


class Replica:
    """A serving container.

    Args:
        endpoint: name of the endpoint, part of the log group.
        variant: the production variant of the endpoint configuration.
        model: what the container runs (Image, Environment, model data).
        serve: the command in place of the image's ``serve``.
        number: unique within the endpoint.
    """

    def __init__(
        self,
        runtime: Runtime,
        endpoint: str,
        variant: dict[str, Any],
        model: dict[str, Any],
        serve: Sequence[str],
        number: int,
    ) -> None:
        self._variant, self._model, self._serve = variant, model, serve
        self._container = Container(runtime, "endpoints", f"{endpoint}-{number}")
        self._log = (LOG_GROUP + endpoint, f"{variant['VariantName']}/i-{number:017x}")
        self.port = _free_port()

    @property
    def log_stream_arn_suffix(self) -> str:
        """``log-group:...:log-stream:...`` of its output."""
        return f"log-group:{self._log[0]}:log-stream:{self._log[1]}"

    def start(self) -> None:
        """Fetch the model's files and run the command.

        Raises:
            ContainerFailure: files are missing, or the command cannot run.
        """
        self._container.path("/opt/ml/model").mkdir(exist_ok=True)
        if "ModelDataUrl" in self._model:
            self._container.unpack(self._model["ModelDataUrl"], "/opt/ml/model", "model data")
        elif "ModelDataSource" in self._model:
            self._fetch(self._model["ModelDataSource"], "/opt/ml/model", "model data")
        for source in self._model.get("AdditionalModelDataSources", []):
            place = f"/opt/ml/additional-model-data-sources/{source['ChannelName']}"
            self._fetch(source, place, f"additional model data '{source['ChannelName']}'")
        environment = self._model.get("Environment", {}) | {"SAGEMAKER_BIND_TO_PORT": str(self.port)}
        self._container.start(self._serve, environment, *self._log)

    def wait_healthy(self, timeout_s: float | None, cancelled: threading.Event) -> None:
        """Wait until /ping answers 200.

        Args:
            timeout_s: instead of the variant's ContainerStartupHealthCheckTimeoutInSeconds.

        Raises:
            ContainerFailure: it ended, or did not answer in time; with the last lines of its output.
        """
        if timeout_s is None:
            timeout_s = self._variant.get("ContainerStartupHealthCheckTimeoutInSeconds", DEFAULT_STARTUP_S)
        deadline = time.monotonic() + timeout_s
        while not self.healthy():
            status = self._container.exit_status()
            if status is not None:
                self._container.stop()
                raise self._unhealthy(f"It exited with code {status}.")
            if time.monotonic() > deadline:
                raise self._unhealthy(f"It did not answer 200 within {timeout_s:g} s.")
            if cancelled.wait(PING_EVERY_S):
                raise ContainerFailure("The deployment was cancelled.")

    def healthy(self) -> bool:
        """Whether /ping answers 200 now."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PING_TIMEOUT_S)
        try:
            connection.request("GET", "/ping")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def exit_status(self) -> int | None:
        """Exit status of the process, None while it runs."""
        return self._container.exit_status()

    def stop(self) -> None:
        """SIGTERM, later SIGKILL; its files are removed."""
        self._container.stop()
        self._container.remove()
        with _ports_lock:
            _ports.discard(self.port)

    def _fetch(self, source: dict[str, Any], place: str, what: str) -> None:
        data = source["S3DataSource"]
        if data["CompressionType"] == "Gzip":
            self._container.unpack(data["S3Uri"], place, what)
        else:
            self._container.download(data["S3Uri"], place, what)

    def _unhealthy(self, why: str) -> ContainerFailure:
        said = self._container.log_tail()
        name = self._variant["VariantName"]
        text = (
            f"The primary container for production variant {name} did not pass the ping health check. {why} "
            f"Please check CloudWatch logs for this endpoint, {self._log[0]}."
        )
        return ContainerFailure(f"{text} Its last lines: {said[-400:]}" if said else text)


def _free_port() -> int:
    """A port that is free now and given to no other replica."""
    with _ports_lock:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            if port not in _ports:
                _ports.add(port)
                return int(port)
