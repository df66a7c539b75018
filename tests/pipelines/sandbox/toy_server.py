"""What stands for a serving container in these tests: http.server answering from /opt/ml/model."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(os.environ.get("MLA_ML_ROOT", "/opt/ml"))
MODE = os.environ.get("TOY_MODE", "healthy")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(503 if MODE == "never" else 200, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body == b"refuse":
            self._answer(400, b"I refuse")
        elif body == b"die":
            os._exit(3)
        elif body == b"stream":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for i in range(3):
                self.wfile.write(f"data: {i}\n\n".encode())
                self.wfile.flush()
        else:
            files = {
                str(p.relative_to(ROOT)): p.read_text()
                for p in ROOT.rglob("*")
                if p.is_file() and "config" not in p.parts
            }
            custom = self.headers.get("X-Amzn-SageMaker-Custom-Attributes", "")
            answer = {
                "files": files,
                "body": body.decode(),
                "custom": custom,
                "environment": dict(os.environ),
            }
            self._answer(200, json.dumps(answer).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Amzn-SageMaker-Custom-Attributes", "seen")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        print(self.command, self.path, flush=True)


if MODE == "exit":
    print("cannot load the model")
    sys.exit(7)
ThreadingHTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
