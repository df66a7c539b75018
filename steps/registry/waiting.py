"""Chunks that are on disk and wait in memory to be hashed, so that most of a file is not read a second time.

Reading 1 GB back from the page cache costs about a third of what hashing it does. Parts arrive side by side
and are hashed in order, so a chunk waits until all before it came. The memory for that is bounded; what it
cannot hold is read back.
"""

from __future__ import annotations

import threading


class Memory:
    """How many bytes may wait, for all files of a download together."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Reserve `count` bytes; False when they are not free."""
        with self._lock:
            if count > self._free:
                return False
            self._free -= count
            return True

    def give(self, count: int) -> None:
        """Return what was taken."""
        with self._lock:
            self._free += count


class Waiting:
    """The waiting chunks of one file, by their offset. The caller's lock guards it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._chunks: dict[int, bytes] = {}

    def put(self, position: int, chunk: bytes) -> None:
        """Keep `chunk` if the memory has room."""
        if self._memory.take(len(chunk)):
            self._chunks[position] = chunk

    def pop(self, position: int) -> bytes | None:
        """The chunk at `position`, None if it was not kept."""
        chunk = self._chunks.pop(position, None)
        if chunk is not None:
            self._memory.give(len(chunk))
        return chunk

    def gap(self, position: int, end: int) -> int:
        """Bytes from `position` to the next waiting chunk, at most to `end`."""
        return min((start for start in self._chunks if position < start < end), default=end) - position

    def clear(self) -> None:
        """Drop all chunks: the file has another content now."""
        for position in list(self._chunks):
            self.pop(position)
