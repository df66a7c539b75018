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
from collections.abc import Mapping, Sequence
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
HOST = "127.0.0.1"
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
    def read(cls, state: Path | None = None) -> Connection | None:
        """The pair of a state folder (MLA_STATE or .mla by default), None when none runs."""
        path = (state or state_folder()) / "sandbox.json"
        try:
            found = cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # damaged, or of another version
            return None
        with suppress(PermissionError):  # another user's process: it runs
            try:
                os.kill(found.pid, 0)
            except ProcessLookupError:
                return None
        return found

    def write(self, state: Path) -> None:
        """Tell other commands; whoever reads meanwhile sees all of it or nothing."""
        written = state / "sandbox.json.new"
        written.write_text(json.dumps(asdict(self)))
        written.replace(state / "sandbox.json")

    def settings(self) -> Settings:
        """The local environment, pointed at this MLflow server."""
        return Settings.load(
            "local", {f"mlflow.{key}_uri": self.mlflow_uri for key in ("tracking", "registry")}
        )

    def use(self) -> None:
        """Point this process at the sandbox; a shell that names an AWS_ENDPOINT_URL is taken at its word."""
        without_proxy()
        if "AWS_ENDPOINT_URL" not in os.environ:
            only_sandbox(self.endpoint_url)
        for name, value in CREDENTIALS.items():
            os.environ.setdefault(name, value)


def state_folder() -> Path:
    """Where commands without --state look for the pair that runs."""
    return Path(os.environ.get("MLA_STATE") or STATE)


def only_sandbox(endpoint_url: str) -> None:
    """Make the sandbox the only AWS that this process and its children know.

    A profile, a service's own address or AWS_IGNORE_CONFIGURED_ENDPOINT_URLS would lead elsewhere.
    """
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=endpoint_url)
    os.environ.update(dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull))


def without_proxy() -> None:
    """Keep a proxy of the shell's (HTTP_PROXY) out of what is asked on loopback."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if hosts != "*" and HOST not in (known := [one.strip() for one in hosts.split(",") if one.strip()]):
        os.environ.update(dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join([*known, HOST])))


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


def leashed(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command, output to `log`, that ends when `end` is called or this process is gone."""
    with log.open("wb") as out:
        return subprocess.Popen(
            ["sh", "-c", LEASH, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """SIGTERM to a leashed command's group, SIGKILL to what is left after `seconds`."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class MlflowServer:
    """A real MLflow tracking server and registry on loopback: SQLite store, artifacts served over HTTP."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        port = free_port(port)
        self.uri = f"http://{HOST}:{port}"
        command = [
            sys.executable, "-m", "mlflow", "server", "--workers", "1",
            "--host", HOST, "--port", str(port),
            "--backend-store-uri", f"sqlite:///{(folder / 'mlflow.db').resolve()}",
            "--artifacts-destination", str((folder / "artifacts").resolve()),
        ]  # fmt: skip
        # Neither background jobs (a process of 250 MB) nor usage reports.
        variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        # Not the caller's MLFLOW_ variables: the server would take MLFLOW_REGISTRY_URI for its own registry.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self._process = leashed(command, {**inherited, **variables}, self.log)

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
        end(self._process, seconds)


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
        without_proxy()
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
        only_sandbox(self._sandbox.endpoint_url)
        self.connection = Connection(self._sandbox.endpoint_url, self.mlflow.uri, os.getpid())
        self.settings = self.connection.settings()
        os.environ["AWS_DEFAULT_REGION"] = self.settings.region
        prepare_account(
            self._sandbox.endpoint_url,
            bucket=self.settings.bucket,
            role_name=self.settings.role_name,
            region=self.settings.region,
        )
        self.connection.write(self.state)

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
            probe.bind((HOST, port))
        except OSError:
            raise UserError(f"port {port} is taken", HOST, "choose another, or 0 for any free one") from None
        return int(probe.getsockname()[1])
