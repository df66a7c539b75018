"""Child processes of the sandbox: started, signalled and, whatever happens, ended.

Linux ends a child when the *thread* that forked it ends (PR_SET_PDEATHSIG), so every child is forked by one
thread that lives as long as the sandbox; a sandbox that is killed outright then takes its children along.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO


class Child:
    """A running command, leader of its own process group."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen

    @property
    def output(self) -> IO[bytes]:
        """Standard output and error together."""
        assert self._popen.stdout is not None
        return self._popen.stdout

    def wait(self, timeout_s: float | None = None) -> int:
        """Exit status; raises subprocess.TimeoutExpired."""
        return self._popen.wait(timeout_s)

    def exit_status(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._popen.poll()

    def stop(self, grace_s: float) -> int:
        """SIGTERM to the command, SIGKILL to its group after ``grace_s`` seconds; returns the exit status."""
        if self._popen.poll() is None:
            _signal(_command_pid(self._popen.pid), signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)
        self.kill()
        return self._popen.wait()

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)


class Children:
    """Starts children and ends those that are left."""

    def __init__(self) -> None:
        self._requests: queue.Queue[tuple[Future[Child], Sequence[str], Mapping[str, str], Path] | None] = (
            queue.Queue()
        )
        self._living: set[Child] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="sandbox-children", daemon=True)
        self._thread.start()

    def start(self, argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> Child:
        """Run a command with exactly this environment in a folder.

        Raises:
            OSError: it cannot be started, such as FileNotFoundError.
            RuntimeError: the sandbox is stopping.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the sandbox is stopping")
        answer: Future[Child] = Future()
        self._requests.put((answer, argv, environment, folder))
        return answer.result()

    def close(self, grace_s: float) -> None:
        """End every child: SIGTERM to all, then SIGKILL after ``grace_s`` seconds."""
        self._requests.put(None)
        self._thread.join()
        with self._lock:
            left = [c for c in self._living if c.exit_status() is None]
        enders = [threading.Thread(target=c.stop, args=(grace_s,)) for c in left]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            answer, argv, environment, folder = request
            try:
                child = Child(
                    subprocess.Popen(
                        list(argv),
                        env=dict(environment),
                        cwd=folder,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            except Exception as error:
                answer.set_exception(error)
                continue
            with self._lock:
                self._living = {c for c in self._living if c.exit_status() is None} | {child}
            answer.set_result(child)


def _command_pid(pid: int) -> int:
    """The command itself: below bwrap's monitor and init, which die of SIGTERM without passing it on."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() != "bwrap":
                return pid
            below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return pid
        if below:
            pid = int(below[0])
        else:
            time.sleep(0.01)
    return pid


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
