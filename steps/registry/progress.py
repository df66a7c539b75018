"""Bytes so far, for the log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("steps.download")


@dataclass
class Progress:
    """Bytes so far, for the log: every few seconds the amount, the share and the rate since the last line."""

    total: int
    seconds: float = 5.0
    report: Callable[[str], None] = lambda line: log.info("%s", line)
    done: int = 0
    fetched: int = 0  # bytes that came over the network in this process; resumed ones did not
    _last: tuple[float, int] = field(default_factory=lambda: (time.monotonic(), 0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int, fetched: bool = True) -> None:
        with self._lock:
            self.done += count
            self.fetched += count if fetched else 0
            now = time.monotonic()
            elapsed = now - self._last[0]
            if elapsed < self.seconds:
                return
            rate = (self.fetched - self._last[1]) / elapsed
            self._last = (now, self.fetched)
            share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
            line = f"downloaded {size_text(self.done)} of {size_text(self.total)}{share}, {size_text(rate)}/s"
        self.report(line)


def size_text(count: float) -> str:
    """Bytes for a person, in powers of 1000 as storage and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
