"""Connects asyncio requests with the engine's own thread: submissions one way, tokens the other."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many

from container.serving.base_engine import BaseEngine
from container.serving.metrics import Metrics
from container.serving.sequence import BadRequest, Sampling, Sequence, Step

log = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The queue is full; `retry_after` seconds is when it is worth trying again."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(RuntimeError):
    """The engine takes no more requests."""


class Streams:
    """The steps of one request's sequences as they happen, each with its sequence's index.

    With `ends_only` just the last step of each comes: a whole answer needs no other, and every one of them
    would wake the event loop. Leaving the `async with` early cancels what has not ended.
    """

    def __init__(self, loop: "EngineLoop", sequences: list[Sequence], ends_only: bool):
        self.sequences, self.ends_only = sequences, ends_only
        self.home = asyncio.get_running_loop()
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Step] | None] = asyncio.Queue()
        self._open = set(range(len(sequences)))

    def put(self, index: int, step: Step) -> None:
        """Called on the event loop."""
        self._queue.put_nowait((index, step))

    def leave(self) -> None:
        """Ends the iteration: nobody wants the rest."""
        self._queue.put_nowait(None)

    async def __aenter__(self) -> "Streams":
        return self

    async def __aexit__(self, *_: object) -> None:
        for index in self._open:
            self._loop.cancel(self.sequences[index])

    async def __aiter__(self) -> AsyncIterator[tuple[int, Step]]:
        while self._open and (event := await self._queue.get()) is not None:
            if event[1].finish_reason is not None:
                self._open.discard(event[0])
            yield event


class EngineLoop:
    """Runs `engine.step` in one thread for as long as there is work."""

    def __init__(self, engine: BaseEngine, metrics: Metrics, max_queue: int):
        self.engine, self.metrics, self.max_queue = engine, metrics, max_queue
        self._inbox: deque[tuple[str, Sequence]] = deque()
        self._homes: dict[Sequence, tuple[Streams, int]] = {}
        self._wake = threading.Event()
        self._stopping = self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def interrupt(self) -> None:
        """Ends the thread after the step it is in and fails what is unfinished then; does not wait for it."""
        self._stopping = True
        self._wake.set()

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the thread after the step it is in, then the engine."""
        self.interrupt()
        self._thread.join(timeout)
        self.engine.close()

    def submit(self, prompts: Many[list[int]], sampling: Many[Sampling], ends_only: bool = False) -> Streams:
        """Queues one sequence for each prompt, all or none. Raises BadRequest, Overloaded or Stopped."""
        self.check_room(len(prompts))
        sequences = [self.engine.prepare(p, s) for p, s in zip(prompts, sampling, strict=True)]
        streams = Streams(self, sequences, ends_only)
        for index, sequence in enumerate(sequences):
            self._homes[sequence] = streams, index
        self._inbox.extend(("add", sequence) for sequence in sequences)
        self._wake.set()
        return streams

    def check_room(self, count: int) -> None:
        """Raises what `submit` would for `count` sequences at this moment, whatever they are."""
        if self._failed or self._stopping:
            raise Stopped("the engine has stopped; try another instance")
        if count > self.max_queue:
            raise BadRequest(
                f"{count} completions at once are more than MLA_MAX_QUEUE, {self.max_queue}", "n"
            )
        waiting = self.engine.waiting + len(self._inbox)
        if waiting + count > self.max_queue:
            raise Overloaded(waiting, self._retry_after(waiting))

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence early, between two steps."""
        self._inbox.append(("cancel", sequence))
        self._wake.set()

    def _retry_after(self, waiting: int) -> int:
        # the queue empties at about the pace at which requests have been finishing
        pace = self.metrics.finished_per_second()
        return max(1, min(60, round(waiting / pace))) if pace else 1

    @property
    def failed(self) -> bool:
        """Whether the thread died of an error, which only a restart mends."""
        return self._failed

    @property
    def stopping(self) -> bool:
        return self._stopping

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            self._failed = not self._stopping
            log.exception("the engine's thread failed; the server reports itself unhealthy")
        message = "the engine has stopped" if self._failed else "the server is stopping; try again"
        for sequence in list(self._homes):
            sequence.error, sequence.finish_reason = message, "error"
        self._deliver([Step(sequence, None, "", "error") for sequence in list(self._homes)])

    def _serve(self) -> None:
        while not self._stopping:
            self._take_inbox()
            if not self.engine.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            started = time.monotonic()
            steps = self.engine.step()
            seconds = time.monotonic() - started
            self._deliver(steps)
            self.metrics.step(self.engine, steps, seconds)
            for step in steps:
                if step.finish_reason is not None:
                    self.metrics.finished(step.sequence)

    def _take_inbox(self) -> None:
        while self._inbox:
            action, sequence = self._inbox.popleft()
            if action == "add":
                self.engine.enqueue(sequence)
            elif self._homes.pop(sequence, None):
                self.engine.abort(sequence)
                self.metrics.finished(sequence)

    def _deliver(self, steps: Many[Step]) -> None:
        """Hands steps to their requests; an event loop is woken once for all of them."""
        wanted: dict[asyncio.AbstractEventLoop, list[tuple[Streams, int, Step]]] = {}
        for step in steps:
            ended = step.finish_reason is not None
            home = self._homes.pop(step.sequence, None) if ended else self._homes.get(step.sequence)
            if home is not None and (ended or not home[0].ends_only):
                wanted.setdefault(home[0].home, []).append((*home, step))
        for loop, events in wanted.items():
            loop.call_soon_threadsafe(_put_all, events)


def _put_all(events: Many[tuple[Streams, int, Step]]) -> None:
    for streams, index, step in events:
        streams.put(index, step)
