"""A child's output to CloudWatch Logs, line by line as it comes."""

from __future__ import annotations

import collections
import threading
import time

from pipelines.sandbox.backends import Backends
from pipelines.sandbox.processes import Child

MAX_EVENT_BYTES = 256 * 1024  # CloudWatch Logs' limit of one event
PROCESSING_GROUP = "/aws/sagemaker/ProcessingJobs"
TAIL_LINES = 20


class LogReader:
    """Follows one child until its output ends.

    Args:
        group: log group, made when missing.
        stream: log stream, made when missing, so that it can be listed before the first line.
    """

    def __init__(self, backends: Backends, child: Child, group: str, stream: str) -> None:
        self._backends, self._child, self._group, self._stream = backends, child, group, stream
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        backends.put_log_events(group, stream, [])
        self._thread = threading.Thread(target=self._follow, name=f"log-{stream}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = 2.0) -> None:
        """Wait until the last line is stored; a grandchild that keeps the pipe open is not waited for."""
        self._thread.join(timeout_s)

    def tail(self) -> str:
        """The last lines, for an error message."""
        return "\n".join(self._tail)

    def _follow(self) -> None:
        while chunk := self._child.output.readline(MAX_EVENT_BYTES):
            line = chunk.decode(errors="replace").rstrip("\r\n")
            self._tail.append(line)
            event = {"timestamp": int(time.time() * 1000), "message": line}
            self._backends.put_log_events(self._group, self._stream, [event])
