"""Connects asyncio requests with the engine's own thread: submissions one way, tokens the other."""

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many

from container.serving.base_engine import BaseEngine
from container.serving.metrics import Metrics
from container.serving.sequence import Sampling, Sequence, Step

log = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The queue is full; `retry_after` seconds is when it is worth trying again."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(RuntimeError):
    """The engine takes no more requests."""


class Stream:
    """The steps of one sequence as they happen. Leaving the `async with` early cancels the sequence."""

    def __init__(self, loop: "EngineLoop", sequence: Sequence):
        self.sequence = sequence
        self._loop = loop
        self._queue: asyncio.Queue[Step] = asyncio.Queue()
        self._home = asyncio.get_running_loop()
        self._done = False

    def deliver(self, step: Step) -> None:
        """Called on the engine's thread."""
        self._home.call_soon_threadsafe(self._queue.put_nowait, step)

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._done:
            self._loop.cancel(self)

    async def __aiter__(self) -> AsyncIterator[Step]:
        while not self._done:
            step = await self._queue.get()
            self._done = step.finish_reason is not None
            yield step


class EngineLoop:
    """Runs `engine.step` in one thread for as long as there is work."""

    def __init__(self, engine: BaseEngine, metrics: Metrics, max_queue: int):
        self.engine, self.metrics, self.max_queue = engine, metrics, max_queue
        self._inbox: deque[tuple[str, Stream]] = deque()
        self._streams: dict[int, Stream] = {}
        self._wake = threading.Event()
        self._stopping = self._failed = False
        self._pending = 0  # submitted, not yet running or finished
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the thread after the step it is in, then the engine."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        self.engine.close()

    def submit(self, prompts: Many[str | list[int]], sampling: Many[Sampling]) -> list[Stream]:
        """One stream for each prompt, all or none. Raises BadRequest or Overloaded."""
        if self._failed or self._stopping:
            raise Stopped("the engine has stopped; try another instance")
        waiting = self.engine.waiting + len(self._inbox)
        if waiting + len(prompts) > self.max_queue:
            raise Overloaded(waiting, self._retry_after(waiting))
        streams = [Stream(self, self.engine.prepare(p, s)) for p, s in zip(prompts, sampling, strict=True)]
        self._inbox.extend(("add", stream) for stream in streams)
        self._wake.set()
        return streams

    def cancel(self, stream: Stream) -> None:
        self._inbox.append(("cancel", stream))
        self._wake.set()

    def _retry_after(self, waiting: int) -> int:
        # the queue empties at about the pace at which requests have been finishing
        pace = self.metrics.finished_per_second()
        return max(1, min(60, round(waiting / pace))) if pace else 1

    @property
    def failed(self) -> bool:
        """Whether the thread died of an error, which only a restart mends."""
        return self._failed

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            self._failed = not self._stopping
            log.exception("the engine's thread failed; the server reports itself unhealthy")
        for stream in itertools.chain(self._streams.values(), (s for _, s in self._inbox)):
            stream.sequence.error = "the engine has stopped"
            stream.sequence.finish_reason = "error" if self._failed else "abort"
            stream.deliver(Step(stream.sequence, None, "", stream.sequence.finish_reason))

    def _serve(self) -> None:
        while not self._stopping:
            self._take_inbox()
            if not self.engine.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            started = time.monotonic()
            steps = self.engine.step()
            self.metrics.step(self.engine, steps, time.monotonic() - started)
            for step in steps:
                self._deliver(step)

    def _take_inbox(self) -> None:
        while self._inbox:
            action, stream = self._inbox.popleft()
            if action == "add":
                self._streams[stream.sequence.id] = stream
                self.engine.enqueue(stream.sequence)
            elif self._streams.pop(stream.sequence.id, None):
                self.engine.abort(stream.sequence)
                self.metrics.finished(stream.sequence)

    def _deliver(self, step: Step) -> None:
        if step.finish_reason is not None:
            self.metrics.finished(step.sequence)
            stream = self._streams.pop(step.sequence.id, None)
        else:
            stream = self._streams.get(step.sequence.id)
        if stream is not None:
            stream.deliver(step)
