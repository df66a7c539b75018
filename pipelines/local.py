"""AWS and MLflow on this machine: the sandbox and a real `mlflow server`, one pair per state folder.

The folder (.mla) holds the MLflow store, the compile cache, the sandbox's scratch, a lock, and sandbox.json,
from which other commands learn where the two listen.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.sandbox import Sandbox
    from pipelines.sandbox.calls import CallLog

STATE = Path(".mla")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "sandbox", "AWS_SECRET_ACCESS_KEY": "sandbox"}
MLFLOW_SECONDS = 180  # the first start on a slow disk creates the database
# A child that must not outlive its parent, not even one that is killed: when the pipe on standard input
# closes, the whole process group is told to stop.
LEASH = 'exec 3<&0; "$@" 3<&- & child=$!; trap "" TERM; { cat <&3 >/dev/null; kill -TERM 0; } & wait $child'


@dataclass(frozen=True)
class Connection:
    """Where a running pair listens."""

    endpoint_url: str
    mlflow_uri: str
    pid: int

    @classmethod
    def read(cls, state: Path = STATE) -> Connection | None:
        """The pair of a state folder, None when none runs."""
        try:
            found = cls(**json.loads((state / "sandbox.json").read_text()))
            os.kill(found.pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return found

    def settings(self) -> Settings:
        """The local environment, pointed at this MLflow server."""
        return Settings.load(
            "local", {f"mlflow.{key}_uri": self.mlflow_uri for key in ("tracking", "registry")}
        )

    def use(self) -> None:
        """Point boto3 in this process at the sandbox, unless the environment already says otherwise."""
        os.environ.setdefault("AWS_ENDPOINT_URL", self.endpoint_url)
        for name, value in CREDENTIALS.items():
            os.environ.setdefault(name, value)


class Lock:
    """Held while a state folder is in use; a second user is refused with the first one's process id."""

    def __init__(self, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._file = (state / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise UserError(
                f"another `mla-pipeline run` or `sandbox` is running (process {holder})",
                str(state.resolve()),
                "wait for it, stop it, or give another folder with --state",
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Let the next one in."""
        self._file.close()


class MlflowServer:
    """A real MLflow tracking server and registry on loopback: SQLite store, artifacts served over HTTP."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        port = free_port(port)
        self.uri = f"http://127.0.0.1:{port}"
        command = [
            sys.executable, "-m", "mlflow", "server", "--workers", "1",
            "--host", "127.0.0.1", "--port", str(port),
            "--backend-store-uri", f"sqlite:///{(folder / 'mlflow.db').resolve()}",
            "--artifacts-destination", str((folder / "artifacts").resolve()),
        ]  # fmt: skip
        # Neither background jobs (a process of 250 MB) nor usage reports.
        variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        # Not the caller's MLFLOW_ variables: the server would take MLFLOW_REGISTRY_URI for its own registry.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self._process = subprocess.Popen(
            ["sh", "-c", LEASH, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**inherited, **variables},
            start_new_session=True,
        )

    def wait_until_healthy(self) -> None:
        """Returns once the server answers. Raises UserError with its last words when it does not."""
        deadline = time.monotonic() + MLFLOW_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    words = self.log.read_text(errors="replace").strip().splitlines() or [
                        "(it wrote nothing)"
                    ]
                    fix = "read the log; a damaged store is renewed by removing the folder"
                    raise UserError(
                        f"mlflow server does not start: {words[-1]}", str(self.log), fix
                    ) from None
            time.sleep(0.1)

    def has_alias(self, name: str, alias: str) -> bool:
        """Whether the registry has the alias; by plain HTTP, because importing mlflow takes seconds."""
        query = urllib.parse.urlencode({"name": name, "alias": alias})
        try:
            with urllib.request.urlopen(
                f"{self.uri}/api/2.0/mlflow/registered-models/alias?{query}", timeout=30
            ):
                return True
        except urllib.error.HTTPError as error:
            code = json.loads(error.read() or b"{}").get("error_code")
            if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model; no such alias
                return False
            raise

    def stop(self, seconds: float = 10.0) -> None:
        """SIGTERM to the whole group, SIGKILL to what is left after `seconds`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Local:
    """Context manager: lock, MLflow server and sandbox, started side by side; all stopped at the end.

    port: of the sandbox; 0 takes a free one. mlflow_port: likewise.
    job_environment: further variables of every job and endpoint, below their own.
    """

    def __init__(
        self,
        state: Path = STATE,
        port: int = 0,
        mlflow_port: int = 0,
        job_environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state, self._port, self._mlflow_port = state.resolve(), port, mlflow_port
        self._job_environment = dict(job_environment or {})
        self._sandbox: Sandbox | None = None

    def __enter__(self) -> Local:
        self._lock = Lock(self.state)
        try:
            if self._port:
                free_port(self._port)
            self.mlflow = MlflowServer(self.state / "mlflow", self._mlflow_port)
        except BaseException:
            self._lock.release()
            raise
        try:
            self._start_sandbox()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def calls(self) -> CallLog:
        """What was asked of the sandbox's account, and by whom; only while it runs."""
        assert self._sandbox
        return self._sandbox.calls

    def _start_sandbox(self) -> None:
        from pipelines.sandbox import Sandbox
        from pipelines.sandbox.account import prepare_account

        jobs = {"MLA_KERNEL_CACHE": str(self.state / "kernels"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        jobs |= self._job_environment
        self._sandbox = Sandbox(self.state / "sandbox", port=self._port, job_environment=jobs)
        self._sandbox.__enter__()
        # Not setdefault: a run of its own must never reach an account that the shell is pointed at.
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=self._sandbox.endpoint_url)
        os.environ.pop("AWS_PROFILE", None)
        os.environ.pop("AWS_SESSION_TOKEN", None)
        self.connection = Connection(self._sandbox.endpoint_url, self.mlflow.uri, os.getpid())
        self.settings = self.connection.settings()
        os.environ["AWS_DEFAULT_REGION"] = self.settings.region
        prepare_account(
            self._sandbox.endpoint_url,
            bucket=self.settings.bucket,
            role_name=self.settings.role_name,
            region=self.settings.region,
        )
        (self.state / "sandbox.json").write_text(json.dumps(asdict(self.connection)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.state / "sandbox.json").unlink(missing_ok=True)
        try:
            if self._sandbox:
                self._sandbox.__exit__(kind, error, trace)
        finally:
            self.mlflow.stop()
            self._lock.release()


def free_port(port: int = 0) -> int:
    """A port of loopback that nobody listens on: the given one, or any for 0. Raises UserError when taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} is taken", "127.0.0.1", "choose another, or 0 for any free one"
            ) from None
        return int(probe.getsockname()[1])
