"""Faults on demand: what AWS does to everybody now and then, and a sandbox by itself never does."""

from __future__ import annotations

import threading
from collections import deque

from pipelines.sandbox.errors import ServiceError


class Faults:
    """Calls and jobs that are to fail, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._calls: dict[str, deque[ServiceError]] = {}
        self._jobs: deque[str] = deque()
        self._lock = threading.Lock()

    def refuse(self, action: str, error: ServiceError, times: int = 1) -> None:
        """Let the next calls of a SageMaker action fail."""
        with self._lock:
            self._calls.setdefault(action, deque()).extend([error] * times)

    def throttle(self, action: str, times: int = 1) -> None:
        """Let the next calls of a SageMaker action be throttled."""
        self.refuse(action, ServiceError("ThrottlingException", "Rate exceeded"), times)

    def fail_jobs(self, reason: str, times: int = 1) -> None:
        """Let the next processing jobs fail before their container starts, with this FailureReason."""
        with self._lock:
            self._jobs.extend([reason] * times)

    def of_call(self, action: str) -> ServiceError | None:
        """The fault of a call that is made now."""
        with self._lock:
            waiting = self._calls.get(action)
            return waiting.popleft() if waiting else None

    def of_job(self) -> str | None:
        """The FailureReason of a job that starts now."""
        with self._lock:
            return self._jobs.popleft() if self._jobs else None
