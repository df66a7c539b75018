"""The sandbox as a whole: puts the parts together, serves them on loopback, takes everything down again."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from werkzeug.serving import BaseWSGIServer, make_server

from pipelines.sandbox.api import Account, Api, Tags
from pipelines.sandbox.backends import Backends
from pipelines.sandbox.calls import EVENTS, PIPELINE, CallLog
from pipelines.sandbox.capture import Capture
from pipelines.sandbox.containers import Runtime
from pipelines.sandbox.endpoints import Endpoints
from pipelines.sandbox.events import (
    Events,
    endpoint_event,
    execution_event,
    model_package_event,
    step_event,
)
from pipelines.sandbox.executions import Execution, Executions
from pipelines.sandbox.faults import Faults
from pipelines.sandbox.front import Answer, Front
from pipelines.sandbox.interpreter import Interpreter
from pipelines.sandbox.invocations import Invocations
from pipelines.sandbox.isolation import choose
from pipelines.sandbox.jobs import ProcessingJobs
from pipelines.sandbox.models import EndpointConfigs, Models
from pipelines.sandbox.objects import Objects
from pipelines.sandbox.pipelines import Pipelines
from pipelines.sandbox.processes import Children
from pipelines.sandbox.registry import Registry
from pipelines.sandbox.steps import Steps

HOST = "127.0.0.1"
_SCRATCH = ("objects", "jobs", "endpoints")  # folders below state_dir
SERVE_COMMAND = (sys.executable, "-m", "container.serving")
REPOSITORY = Path(__file__).resolve().parents[2]
_SECRET = {"AWS_SECRET_ACCESS_KEY": "sandbox"}  # the key id is the container's own name
_running = threading.Lock()


class PortTaken(OSError):
    """The port asked for is in use."""


class Sandbox:
    """AWS on loopback: ``with Sandbox(folder) as sandbox: boto3.client("s3",
    endpoint_url=sandbox.endpoint_url)``.

    One at a time in a process, because moto's state belongs to the process. All state is in memory or in
    scratch files below ``state_dir``; nothing outlives ``stop``.

    Args:
        state_dir: scratch folder; made when missing.
        port: TCP port, 0 for a free one.
        job_environment: variables that every job and endpoint gets below its own, such as MLA_KERNEL_CACHE.
        serve_command: what an endpoint's container runs; the image's ``serve`` by default.
        code: working directory of every job and endpoint.
        isolation: ``bubblewrap``, ``unshare`` or ``environment``; the strongest that works by default.
        grace_s: seconds between SIGTERM and SIGKILL.
        startup_s: replaces every variant's health-check timeout, whose smallest value in the API is 60 s.
        retry_scale: seconds that stand for one second of a step's retry policies.

    Attributes:
        events: the event bus; ``events.copies = 2`` delivers every event twice.
        faults: throttled calls, jobs without capacity and their like, on demand.
        calls: what was asked of this account, and by whom.
    """

    def __init__(
        self,
        state_dir: Path,
        port: int = 0,
        job_environment: Mapping[str, str] | None = None,
        *,
        serve_command: Sequence[str] = SERVE_COMMAND,
        code: Path = REPOSITORY,
        region: str = "us-east-1",
        isolation: str | None = None,
        grace_s: float = 5.0,
        startup_s: float | None = None,
        retry_scale: float = 1.0,
    ) -> None:
        self.account = Account(region=region)
        self._state_dir, self._port, self._code = Path(state_dir).resolve(), port, code
        self._job_environment = dict(job_environment or {})
        self._serve_command, self._grace_s, self._startup_s = list(serve_command), grace_s, startup_s
        self._isolation, self._retry_scale = choose(isolation), retry_scale
        self._server: BaseWSGIServer | None = None

    @property
    def endpoint_url(self) -> str:
        """What AWS_ENDPOINT_URL must be; only while it runs."""
        if self._server is None:
            raise RuntimeError("the sandbox is not running: use it as a context manager, or call start()")
        return f"http://{HOST}:{self._server.socket.getsockname()[1]}"

    @property
    def isolation(self) -> str:
        """How jobs get their own /opt/ml: bubblewrap, unshare or environment."""
        return self._isolation.name

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Serve in background threads.

        Raises:
            PortTaken: the port is in use.
            RuntimeError: a sandbox already runs in this process.
        """
        if not _running.acquire(blocking=False):
            raise RuntimeError(
                "a sandbox already runs in this process; stop it first, or start another process"
            )
        try:
            self._build()
        except BaseException:
            _running.release()
            raise

    def stop(self) -> None:
        """End every job, endpoint and execution, then the server. May be called twice."""
        if self._server is None:
            return
        self._executions.stop_all()
        self._endpoints.cancel_all()
        self._children.close(self._grace_s)
        self._jobs.join(self._grace_s)
        self.events.close()
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        self._clear_scratch()
        _running.release()

    def _clear_scratch(self) -> None:
        for part in _SCRATCH:
            shutil.rmtree(self._state_dir / part, ignore_errors=True)

    def _build(self) -> None:
        # moto keeps an object below this size in memory, a larger one in a temporary file
        os.environ.setdefault("MOTO_S3_DEFAULT_KEY_BUFFER_SIZE", str(1 << 20))
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.faults = Faults()
        api, tags, backends = Api(self.account, faults=self.faults), Tags(), Backends(self.account)
        backends.reset()
        self._clear_scratch()  # of a sandbox that was killed
        moto = DomainDispatcherApplication(create_backend_app)
        self.calls = CallLog()
        front = Front(api, moto, self._invoke, self._put_events, self.calls)
        server = _make_server(self._port, front)
        self._children = Children()
        runtime = Runtime(
            account=self.account,
            backends=backends,
            objects=Objects(backends, self._state_dir / "objects"),
            children=self._children,
            isolation=self._isolation,
            folder=self._state_dir,
            code=self._code,
            environment=self._variables(server.socket.getsockname()[1]),
            grace_s=self._grace_s,
            calls=self.calls,
        )
        self._wire(api, tags, runtime)
        self._server = server
        threading.Thread(target=server.serve_forever, name="sandbox-server", daemon=True).start()

    def _wire(self, api: Api, tags: Tags, runtime: Runtime) -> None:
        account, backends = self.account, runtime.backends
        events, steps_api = api.noting(self.calls, EVENTS), api.noting(self.calls, PIPELINE)
        self.events = Events(account, backends, lambda params: events.call("StartPipelineExecution", params))
        registry = Registry(account, tags, self._on_package)
        models = Models(account, backends, tags, registry.find)
        configs = EndpointConfigs(account, models, tags)
        self._endpoints = Endpoints(
            account, runtime, models, configs, tags, self._serve_command, self._startup_s, self._on_endpoint
        )
        self._invocations = Invocations(account, self._endpoints, Capture(backends))
        self._jobs = ProcessingJobs(account, runtime, tags, self.faults)
        pipelines = Pipelines(account, backends, tags)
        steps = Steps(steps_api, self._jobs.wait, self._endpoints.wait)
        self._executions = Executions(
            account,
            pipelines,
            lambda execution: Interpreter(
                execution, steps, self._executions, backends, self._on_step, self._retry_scale
            ).run(),
            self._on_execution,
        )
        for part in (
            tags,
            self._jobs,
            pipelines,
            self._executions,
            registry,
            models,
            configs,
            self._endpoints,
        ):
            api.register(part.actions())

    def _invoke(self, name: str, body: bytes, headers: dict[str, str], stream: bool) -> Answer:
        return self._invocations.invoke(name, body, headers, stream)

    def _put_events(self, params: dict[str, Any]) -> dict[str, Any]:
        return self.events.put_events(params)

    def _variables(self, port: int) -> dict[str, str]:
        region = self.account.region
        own = {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
            "AWS_DEFAULT_REGION": region,
            "AWS_REGION": region,
        }
        return {**self._job_environment, **_SECRET, **own}

    def _on_execution(self, execution: Execution, previous: str) -> None:
        detail = execution_event(execution.record, previous)
        title = "SageMaker Model Building Pipeline Execution Status Change"
        self.events.emit(title, detail, execution.record["PipelineArn"], execution.arn)

    def _on_step(self, execution: Execution, kind: str, record: dict[str, Any], previous: str) -> None:
        detail = step_event(execution.record, kind, record, previous)
        title = "SageMaker Model Building Pipeline Execution Step Status Change"
        self.events.emit(title, detail, execution.record["PipelineArn"], execution.arn)

    def _on_package(self, record: dict[str, Any]) -> None:
        detail = model_package_event(record)
        self.events.emit("SageMaker Model Package State Change", detail, record["ModelPackageArn"])

    def _on_endpoint(self, description: dict[str, Any]) -> None:
        detail = endpoint_event(description)
        self.events.emit("SageMaker Endpoint State Change", detail, description["EndpointArn"])


def _make_server(port: int, app: Any) -> BaseWSGIServer:
    from moto.moto_server.werkzeug_app import MotoRequestHandler

    class Handler(MotoRequestHandler):
        disable_nagle_algorithm = (
            True  # headers and body are separate writes: 40 ms each with delayed ACK otherwise
        )

        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    # werkzeug ends the process when it cannot bind, so it is given a socket that is bound already
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise PortTaken(
            f"port {port} on {HOST}: {error.strerror}; choose another one, or 0 for a free one"
        ) from None
    with listener:
        return make_server(HOST, port, app, threaded=True, request_handler=Handler, fd=listener.fileno())
