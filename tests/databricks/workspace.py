"""A stand-in Databricks workspace on loopback: answers what the real mlflow and Databricks clients ask.

    with Workspace() as workspace:
        workspace.add_model("main.ml.tiny", folder, alias="champion")
        workspace.fail(r"/fs/files/.*safetensors", status=500, times=1)
        ...MLFLOW_REGISTRY_URI=databricks-uc, DATABRICKS_HOST=workspace.url...

The client's own `databricks-uc` code path runs end to end. What each area answers is in `catalog.py` (Unity
Catalog's registry and grants), `tracking.py` (runs) and `storage.py` (Files API, presigned URLs, S3).
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CLIENT_ID, CLIENT_SECRET = "3f1c0de5-app", "dose-very-secret-client-secret"
TOKEN = "dapi-very-secret-personal-token"
PRINCIPAL = "release-robot"


@dataclass
class Version:
    """A model version: its files, the run it came from, its tags."""

    folder: Path
    run_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    status: str = "READY"


@dataclass
class Model:
    """A registered model. `owner`: a user or a group."""

    owner: str = PRINCIPAL
    versions: dict[str, Version] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" matches `pattern`.

    Attributes:
        status: answer with this status and an error body; 0 answers normally, but for the rest of the fields.
        headers, body: of that answer; the body is by default Databricks' with `code` and `message`.
        cut: break the connection after so many bytes of the file's body.
        short: serve the file as if it had so many bytes less: a truncation that HTTP does not notice.
        skip: let so many matching requests pass first.
    """

    pattern: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    code: str = ""
    message: str = "fault on demand"
    cut: int | None = None
    short: int = 0
    skip: int = 0


class Refusal(Exception):
    """An error answer: status, error code and message, in Databricks' form or OAuth's (RFC 6749, 5.2)."""

    def __init__(self, status: int, code: str, message: str, oauth: bool = False) -> None:
        super().__init__(message)
        names = ("error", "error_description") if oauth else ("error_code", "message")
        self.status, self.document = status, dict(zip(names, (code, message), strict=True))


class Workspace:
    """The server and its state. `route`: how Unity Catalog hands out files (vended, files or presigned)."""

    def __init__(self, route: str = "files") -> None:
        self.route = route
        self.models: dict[str, Model] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.logged_models: dict[str, dict[str, Any]] = {}  # of MLflow 3, beside the runs
        self.run_files = True  # whether the Files API serves runs' artifacts
        self.missing_grants: set[tuple[str, str]] = set()  # (privilege, securable) that the principal lacks
        self.groups: list[str] = []  # that the principal is in
        self.extra_entries: list[str] = []  # names that the Files API lists besides the real ones
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.authorizations: set[str] = set()  # every Authorization header that came
        self.sent = 0  # bytes of file bodies
        self.bytes_per_second = (
            0.0  # of all file bodies together, as a network card would limit them; 0: no limit
        )
        self._free_at = 0.0
        self.tokens: set[str] = {TOKEN}
        self.access_keys: set[str] = set()  # vended S3 keys that still work
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Workspace:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_model(self, name: str, folder: Path, alias: str = "", run_id: str = "") -> str:
        """Register `folder` as the next version of `name`. Returns the version."""
        model = self.models.setdefault(name, Model())
        version = str(len(model.versions) + 1)
        model.versions[version] = Version(folder, run_id)
        if alias:
            model.aliases[alias] = version
        return version

    def fail(self, pattern: str, **what: Any) -> Fault:
        """Add a Fault."""
        fault = Fault(pattern, **what)
        self.faults.append(fault)
        return fault

    def expire_keys(self) -> None:
        """Make every vended S3 key invalid, as after its hour."""
        self.access_keys.clear()

    def count(self, pattern: str) -> int:
        """Requests so far whose "METHOD path" matches."""
        return sum(bool(re.search(pattern, line)) for line in self.requests)

    def fault_for(self, line: str) -> Fault | None:
        """The fault that applies to this request, if any; counts it."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def take(self, count: int) -> None:
        """Wait until the limited rate has room for `count` bytes."""
        if self.bytes_per_second:
            with self.lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + count / self.bytes_per_second
                wait = self._free_at - now
            time.sleep(wait)

    def require(self, privilege: str, securable: str) -> None:
        """Answer 403 as Unity Catalog does when the principal lacks the privilege."""
        if (privilege, securable) in self.missing_grants:
            kind = {1: "Catalog", 2: "Schema"}.get(securable.count(".") + 1, "Routine or Model")
            raise Refusal(
                403,
                "PERMISSION_DENIED",
                f"User does not have {privilege.replace('_', ' ')} on {kind} '{securable}'.",
            )

    def issue_token(self, basic: str, form: dict[str, str]) -> dict[str, Any]:
        """OAuth 2.0 client credentials grant."""
        given = base64.b64decode(basic.removeprefix("Basic ")).decode() if basic else ""
        if given != f"{CLIENT_ID}:{CLIENT_SECRET}" or form.get("grant_type") != "client_credentials":
            raise Refusal(401, "invalid_client", "Client authentication failed", oauth=True)
        token = f"very-secret-{secrets.token_hex(16)}"
        self.tokens.add(token)
        return {"access_token": token, "token_type": "Bearer", "expires_in": 3600, "scope": "all-apis"}


Route = tuple[str, str, Callable[..., Any]]


def _handler(workspace: Workspace) -> type[BaseHTTPRequestHandler]:
    from tests.databricks import catalog, storage, tracking

    routes: list[Route] = [*catalog.ROUTES, *tracking.ROUTES, *storage.ROUTES]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        fault: Fault | None = None

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            self.workspace, self.url_path = workspace, urllib.parse.unquote(parts.path)
            self.query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
            self.raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            line = f"{self.command} {self.url_path}"
            with workspace.lock:
                workspace.requests.append(line)
                workspace.authorizations.add(self.headers.get("Authorization", ""))
            try:
                self.fault = workspace.fault_for(line)
                if self.fault and self.fault.status:
                    self.answer_fault(self.fault)
                else:
                    self.dispatch(line)
            except Refusal as refusal:
                self.send_json(refusal.document, refusal.status)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def dispatch(self, line: str) -> None:
            if self.url_path == "/.well-known/databricks-config":
                return self.send_json({"oidc_endpoint": f"{workspace.url}/oidc", "workspace_id": "1"})
            if self.url_path == "/oidc/.well-known/oauth-authorization-server":
                return self.send_json(
                    {
                        "authorization_endpoint": f"{workspace.url}/oidc/v1/authorize",
                        "token_endpoint": f"{workspace.url}/oidc/v1/token",
                    }
                )
            if self.url_path == "/oidc/v1/token":
                form = dict(urllib.parse.parse_qsl(self.raw.decode()))
                return self.send_json(workspace.issue_token(self.headers.get("Authorization", ""), form))
            if self.url_path.startswith("/api/"):
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token not in workspace.tokens:
                    raise Refusal(401, "UNAUTHENTICATED", "Invalid access token or token expired.")
            for method, pattern, function in routes:
                match = re.fullmatch(pattern, self.url_path)
                if match and self.command == method:
                    result = function(self, **match.groupdict())
                    if result is not None:
                        self.send_json(result)
                    return None
            raise Refusal(404, "ENDPOINT_NOT_FOUND", f"No API found for '{line}'")

        def arguments(self) -> dict[str, Any]:
            """Query and JSON body together, as the registry's GETs use either."""
            body = json.loads(self.raw) if self.raw.strip() else {}
            return {**self.query, **body}

        def send_json(self, document: Any, status: int = 200) -> None:
            data = json.dumps(document).encode()
            self.send_head(status, {"Content-Type": "application/json"}, len(data))
            if self.command != "HEAD":
                self.wfile.write(data)

        def send_head(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def answer_fault(self, fault: Fault) -> None:
            code = fault.code or {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}.get(
                fault.status, "REQUEST_LIMIT_EXCEEDED" if fault.status == 429 else "INTERNAL_ERROR"
            )
            data = json.dumps(fault.body or {"error_code": code, "message": fault.message}).encode()
            self.send_head(fault.status, {"Content-Type": "application/json", **fault.headers}, len(data))
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow stamps its records."""
    return int(time.time() * 1000)
